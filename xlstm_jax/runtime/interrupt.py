"""SIGTERM and SIGINT end a run within a grace, wherever it is.

A thread of its own reads the signals, as the main thread may be inside a
compilation or a step for minutes. Only what Python ships is imported here, so
that signals are noted before the imports that take seconds.

Processes agree on where to stop: each counts the borders that it has passed,
between steps and between the batches of an evaluation, and all stop at the
greatest count that any of them had when it heard of the signal.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from xlstm_jax.runtime.status import Status

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  (a request, no error)
  """Raised inside an evaluation that is to end."""


class Interrupt:
  """Whether the run has been asked to stop, and where it does.

  Attributes:
    grace: seconds between the signal and the end of the run.
    early: how many seconds before that this process ends, of several: the
      first one is to be the last.
    doing: says what the run is doing, for its last words.
  """

  def __init__(self):
    self.grace = 30.0
    self.early = 0.0
    self.doing: Callable[[], str] = lambda: "starting"
    self._agree: Callable[[int], int] = lambda passed: passed
    self._connected = threading.Event()
    # Taken by the first signal, for good.
    self._first = threading.Lock()
    self._over = threading.Event()
    # Held while the processes agree, so that none passes a border meanwhile.
    self._lock = threading.Lock()
    self._passed = 0
    self._stop_at: int | None = None

  def connect(self, agree: Callable[[int], int] | None = None) -> None:
    """The other processes are known.

    Args:
      agree: tells them of the signal, and turns this process's count of
        borders into the one to stop at; called in another thread. None where
        there is one process.
    """
    self._agree = agree or self._agree
    self._connected.set()

  def note(self, cause: str) -> None:
    """Starts the grace and finds out where to stop, in other threads.

    Called by the thread that hears signals and by the one that hears the other
    processes; only the first call has an effect.
    """
    if not self._first.acquire(blocking=False):
      return
    since = time.monotonic()
    print(
      f"{cause}: stopping after this step, at the latest in "
      f"{self._seconds():g} s",
      file=sys.stderr,
      flush=True,
    )
    threading.Thread(target=self._settle, daemon=True).start()
    threading.Thread(target=self._limit, args=[since], daemon=True).start()

  def reached(self) -> bool:
    """Whether to stop at this border; if not, it is passed."""
    with self._lock:
      if not self._is_here():
        self._passed += 1
        return False
      return True

  def check(self) -> None:
    """Raises `Stopped` if this border is `reached`."""
    if self.reached():
      raise Stopped

  def is_ahead(self) -> bool:
    """Whether the next border is the one to stop at; never waits."""
    if not self._lock.acquire(blocking=False):
      return False
    try:
      return self._is_here()
    finally:
      self._lock.release()

  def close(self) -> None:
    """The run has ended by itself."""
    self._over.set()

  @property
  def passed(self) -> int:
    """Borders passed."""
    return self._passed

  def _is_here(self) -> bool:
    return self._stop_at is not None and self._passed >= self._stop_at

  def _settle(self) -> None:
    self._connected.wait()
    with self._lock:
      self._stop_at = self._agree(self._passed)

  def _limit(self, since: float) -> None:
    """Ends the process unless it ends itself within the grace."""
    # The grace may be set while this waits: the signal can come before the
    # configuration is read.
    while (left := since + self._seconds() - time.monotonic()) > 0:
      if self._over.wait(min(left, 0.05)):
        return
    print(
      f"stopped   {self._seconds():g} s after the signal, while "
      f"{self.doing()}; run again to continue from the last committed "
      "checkpoint",
      flush=True,
    )
    os._exit(Status.PREEMPTED)

  def _seconds(self) -> float:
    """Between the signal and the end of this process."""
    return max(self.grace - self.early, self.grace / 2)


@contextlib.contextmanager
def noted() -> Iterator[Interrupt]:
  """Within, the first SIGTERM or SIGINT is noted, a second ends the process."""
  interrupt = Interrupt()
  if threading.current_thread() is not threading.main_thread():
    # Only the main thread may handle signals.
    yield interrupt
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  # Python's own handlers run in the main thread; this one only has to exist
  # for the number of the signal to be written.
  handlers = {n: signal.signal(n, lambda *_: None) for n in SIGNALS}
  descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(
    target=_listen, args=(reader, interrupt), daemon=True
  ).start()
  try:
    yield interrupt
  finally:
    interrupt.close()
    signal.set_wakeup_fd(descriptor)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    os.close(writer)


def _listen(reader: int, interrupt: Interrupt) -> None:
  heard = False
  while byte := os.read(reader, 1):
    if byte[0] not in SIGNALS:
      continue
    number = signal.Signals(byte[0])
    if heard:
      print(f"{number.name}: stopped at once", file=sys.stderr, flush=True)
      os._exit(128 + number)
    heard = True
    interrupt.note(number.name)
  os.close(reader)
