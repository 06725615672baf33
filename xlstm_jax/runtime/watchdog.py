"""Ends a run that hangs, with the stacks of all its threads."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax
from etils import epath

from xlstm_jax import metrics
from xlstm_jax.runtime.status import Status


class Watchdog:
  """Watches that every activity of a run ends in time.

  Args:
    clock: knows the activity.
    seconds: by activity, how long it may take.
    workdir: takes the stacks, in hang-PROCESS.txt.
    behind: says which processes are missing; may hang itself.
  """

  def __init__(
    self,
    clock: metrics.Clock,
    seconds: Mapping[str, float],
    workdir: epath.Path,
    *,
    behind: Callable[[], str],
  ):
    self._clock = clock
    self._seconds = seconds
    self._path = workdir / f"hang-{jax.process_index()}.txt"
    self._behind = behind
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Watches no more."""
    self._closed.set()
    self._thread.join()

  def _watch(self) -> None:
    tick = min(1.0, min(self._seconds.values()) / 10)
    changes, waited = self._clock.changes, 0.0
    # Ticks are counted: a process that was suspended has not hung.
    while not self._closed.wait(tick):
      waited += tick
      # Read before `changes`, as the clock sets it after: an activity that is
      # not the one waited for comes with a change.
      activity, now = self._clock.activity, self._clock.changes
      if changes != now:
        changes, waited = now, 0.0
      if waited > self._seconds[activity]:
        self._bark(activity)

  def _bark(self, activity: str) -> None:
    title = (
      f"hang      {activity!r} did not end within "
      f"{self._seconds[activity]:g} s in process {jax.process_index()}"
    )
    print(f"{title}; the stacks of its threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    # Neither the workdir nor the other processes need answer.
    for work in (lambda: self._save(title), self._name_who_is_behind):
      thread = threading.Thread(target=work, daemon=True)
      thread.start()
      thread.join(10)
    os._exit(Status.HUNG)

  def _save(self, title: str) -> None:
    with open(self._path, "a") as file:
      file.write(f"{time.strftime('%FT%T%z')} {title}\n")
      file.flush()
      faulthandler.dump_traceback(file)

  def _name_who_is_behind(self) -> None:
    if jax.process_count() > 1:
      print(f"hang      {self._behind()}", file=sys.stderr, flush=True)
