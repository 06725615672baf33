"""What the processes of a run tell each other, and who is missing."""

import json
import sys
import threading
import time
from collections.abc import Callable

import jax

from xlstm_jax.jax_internals import coordination_client

# Begins every key in the coordination service's store.
_KEY = "xlstm_jax"


class Missing(RuntimeError):  # noqa: N818  (it is read as a state)
  """Some processes did not come to a meeting in time; the message says who."""


def meet(name: str, *, seconds: float) -> None:
  """Returns when all processes have called this with the same, new name.

  Raises:
    Missing: some have not, in time.
  """
  client = coordination_client()
  if client is None:
    return
  client.key_value_set(f"{_KEY}/{name}/{jax.process_index()}", "")
  try:
    client.wait_at_barrier(f"{_KEY}/{name}", int(seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    absent = set(range(jax.process_count())) - set(_told(name))
    raise Missing(
      f"Not all processes came to {name!r} within {seconds:g} s; missing: "
      f"{', '.join(map(str, sorted(absent))) or error}."
    ) from error


class Peers:
  """What the processes tell each other while they train.

  Args:
    passed: counts the borders that this process has passed.
    doing: says what this process does.
    heard: called when another process was told to stop.
  """

  _SECONDS = 1.0

  def __init__(
    self,
    *,
    passed: Callable[[], int],
    doing: Callable[[], str],
    heard: Callable[[str], None],
  ):
    self._passed = passed
    self._doing = doing
    self._heard = heard
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._talk, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Falls silent."""
    self._closed.set()
    self._thread.join()

  def agree(self, passed: int) -> int:
    """The border at which all stop: the furthest that one has passed."""
    coordination_client().key_value_set(
      f"{_KEY}/stop/{jax.process_index()}", str(passed), allow_overwrite=True
    )
    while len(told := _told("stop")) < jax.process_count():
      time.sleep(0.02)
    return max(map(int, told.values()))

  def behind(self) -> str:
    """Which processes are behind the others, or silent."""
    told = {n: json.loads(text) for n, text in _told("progress").items()}
    furthest = max((one["passed"] for one in told.values()), default=0)
    newest = max((one["time"] for one in told.values()), default=0.0)
    lines = []
    for index in range(jax.process_count()):
      one = told.get(index)
      if one is None:
        lines.append(f"process {index} never began")
      elif newest - one["time"] > 5 * self._SECONDS:
        silent = newest - one["time"]
        lines.append(f"process {index} is silent for {silent:.0f} s")
      elif one["passed"] < furthest:
        steps = furthest - one["passed"]
        lines.append(f"process {index} is {steps} behind, at {one['doing']}")
    return "; ".join(lines) or "no process is behind the others"

  def _talk(self) -> None:
    try:
      while not self._closed.is_set():
        progress = {
          "passed": self._passed(),
          "doing": self._doing(),
          "time": time.time(),
        }
        coordination_client().key_value_set(
          f"{_KEY}/progress/{jax.process_index()}",
          json.dumps(progress),
          allow_overwrite=True,
        )
        for index in _told("stop"):
          self._heard(f"process {index} was told to stop")
        self._closed.wait(self._SECONDS)
    except jax.errors.JaxRuntimeError as error:
      print(f"The coordinator is gone: {error}", file=sys.stderr, flush=True)


def _told(what: str) -> dict[int, str]:
  """What every process that did told last."""
  return {
    int(key.rsplit("/", 1)[1]): value
    for key, value in coordination_client().key_value_dir_get(f"{_KEY}/{what}/")
  }
