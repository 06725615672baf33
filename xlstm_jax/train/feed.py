"""Puts batches of the pipeline on the mesh; every process reads a part."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from xlstm_jax import sharding
from xlstm_jax.data import pipeline
from xlstm_jax.train import rollbacks as decisions
from xlstm_jax.train.rollbacks import Rollback
from xlstm_jax.train.run import Run
from xlstm_jax.train.step import Batch


class Feed:
  """Global batches in order, without those that rollbacks leave out.

  A thread waits for the data, so that the wait can be abandoned.

  Args:
    run: the run whose data are read.
    position: number of the first batch.
    rollbacks: the run's rollbacks.
  """

  def __init__(self, run: Run, position: int, rollbacks: Sequence[Rollback]):
    self._where = sharding.batch_sharding(run.mesh)
    self._shape = (run.cfg.batch_size, run.cfg.data.context)
    self._rows = share(self._where, self._shape, jax.process_index())
    self._batches = _numbered(run, position, rollbacks, self._rows)
    self._ready = queue.Queue(maxsize=1)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._read, daemon=True)
    self._thread.start()

  def next(self, *, unless: Callable[[], bool]) -> tuple[int, Batch] | None:
    """The next batch and its number, or None if `unless` comes true first.

    Raises:
      UserError: the data cannot be read.
    """
    while True:
      try:
        item = self._ready.get(timeout=0.1)
      except queue.Empty:
        if unless():
          return None
        continue
      if isinstance(item, BaseException):
        raise item
      position, batch = item
      return position, {name: self._place(x) for name, x in batch.items()}

  def close(self) -> None:
    """Ends the thread, unless it waits for data that never come."""
    self._closed.set()
    self._thread.join(timeout=1)

  def _read(self) -> None:
    try:
      for item in self._batches:
        if not self._hand_over(item):
          return
    except BaseException as error:
      # Raised again in `next`.
      self._hand_over(error)

  def _hand_over(self, item) -> bool:
    while not self._closed.is_set():
      try:
        self._ready.put(item, timeout=0.1)
      except queue.Full:
        continue
      return True
    return False

  def _place(self, rows_BT: np.ndarray) -> jax.Array:
    def part(at):
      places = np.searchsorted(self._rows, np.arange(self._shape[0])[at[0]])
      return rows_BT[places, at[1]]

    return jax.make_array_from_callback(self._shape, self._where, part)


def _numbered(
  run: Run,
  position: int,
  rollbacks: Sequence[Rollback],
  rows: np.ndarray,
) -> Iterator[tuple[int, pipeline.Batch]]:
  size = run.cfg.batch_size
  while True:
    position = decisions.following(rollbacks, position, batch_size=size)
    batches = pipeline.batches(
      run.cfg.data, batch_size=size, position=position, rows=rows
    )
    for number, batch in zip(itertools.count(position), batches):
      position = number
      if decisions.following(rollbacks, number, batch_size=size) != number:
        break
      yield number, batch


def share(
  where: jax.NamedSharding, shape: tuple[int, int], process: int
) -> np.ndarray:
  """The rows of a batch that the devices of a process hold, in order.

  They need not be consecutive: a mesh follows the network of a TPU slice, in
  which the four chips of a host form a square. Processes whose devices split
  heads or time read the same rows.
  """
  held = where.devices_indices_map(shape)
  parts = [
    np.arange(shape[0])[at[0]]
    for device, at in held.items()
    if device.process_index == process
  ]
  return np.unique(np.concatenate(parts))
