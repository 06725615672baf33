"""Signals are noted wherever the main thread is, and end it in time."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from xlstm_jax.runtime import interrupt
from xlstm_jax.runtime.interrupt import Interrupt, Stopped
from xlstm_jax.runtime.status import Status

PATIENCE = 300
# A grace that ends no test on a machine that is busy with others.
NEVER = 1e6


def wait_until(condition):
  deadline = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_stops_at_the_next_border(number, capsys):
  before = {n: signal.getsignal(n) for n in interrupt.SIGNALS}
  with interrupt.noted() as stopped:
    stopped.grace = NEVER
    stopped.connect()
    assert not stopped.is_ahead()
    assert not stopped.reached()
    stopped.check()
    os.kill(os.getpid(), number)
    wait_until(stopped.is_ahead)
    assert stopped.reached()
    with pytest.raises(Stopped):
      stopped.check()
    assert stopped.passed == 2
  assert {n: signal.getsignal(n) for n in interrupt.SIGNALS} == before
  assert f"{number.name}: stopping after this step" in capsys.readouterr().err


def test_a_signal_before_the_others_are_known_waits_for_them(capsys):
  with interrupt.noted() as stopped:
    stopped.grace = NEVER
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: "SIGTERM" in capsys.readouterr().err)
    assert not stopped.is_ahead()
    stopped.connect()
    wait_until(stopped.is_ahead)
    assert stopped.reached()


def test_all_stop_where_the_one_furthest_on_is():
  stopped = Interrupt()
  stopped.grace = NEVER
  for _ in range(3):
    assert not stopped.reached()
  asked, answer = threading.Event(), threading.Event()

  def agree(passed):
    assert passed == 3
    asked.set()
    assert answer.wait(PATIENCE)
    return 5

  stopped.connect(agree)
  stopped.note("SIGTERM")
  assert asked.wait(PATIENCE)
  # No border is passed while the others are asked, and nothing else waits.
  borders = []
  thread = threading.Thread(
    target=lambda: borders.extend(stopped.reached() for _ in range(4))
  )
  thread.start()
  assert not stopped.is_ahead()
  assert borders == []
  answer.set()
  thread.join(PATIENCE)
  assert borders == [False, False, True, True]
  stopped.close()


def test_handlers_return_without_a_signal():
  before = signal.getsignal(signal.SIGTERM)
  with interrupt.noted():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before
  assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_may_train_too():
  seen = []

  def enter():
    with interrupt.noted() as stopped:
      seen.append(stopped.reached())

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert seen == [False]


# Stands for a compilation: the main thread runs no Python for a long time.
DEAF = """
import ctypes
from xlstm_jax.runtime import interrupt

with interrupt.noted() as stopped:
  stopped.grace = {grace}
  stopped.doing = lambda: "compile"
  print("ready", flush=True)
  while True:
    ctypes.CDLL(None).sleep(1000)
"""


def deaf(grace):
  process = subprocess.Popen(
    [sys.executable, "-c", DEAF.format(grace=grace)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  return process


class SlowEvent:
  """Waits a second at least, by the clock that it turns."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: self.now)

  def wait(self, seconds):
    self.now += max(seconds, 1.0)
    return False


@pytest.mark.parametrize(
  ("grace", "early", "expected"), [(30, 0, 30), (30, 4, 26), (4, 4, 2)]
)
def test_the_grace_is_seconds_however_slow_the_machine_is(
  grace, early, expected, monkeypatch, capsys
):
  class EndedError(Exception):
    pass

  def ended(status):
    assert status == Status.PREEMPTED
    raise EndedError

  event = SlowEvent(monkeypatch)
  monkeypatch.setattr(interrupt.os, "_exit", ended)
  stopped = Interrupt()
  stopped.grace, stopped.early = grace, early
  monkeypatch.setattr(stopped, "_over", event)
  with pytest.raises(EndedError):
    stopped._limit(1000.0)
  assert event.now == 1000 + expected
  assert f"{expected} s after the signal" in capsys.readouterr().out


def test_two_threads_note_a_signal_once(capsys):
  stopped = Interrupt()
  stopped.grace = NEVER
  both = threading.Barrier(2)

  def note(cause):
    both.wait(PATIENCE)
    stopped.note(cause)

  threads = [threading.Thread(target=note, args=[c]) for c in ("one", "two")]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(PATIENCE)
  stopped.note("three")
  stopped.close()
  assert capsys.readouterr().err.count("stopping after this step") == 1


def test_the_grace_ends_what_does_not_end_itself():
  process = deaf(grace=0.2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=PATIENCE)
  assert process.returncode == Status.PREEMPTED
  assert "at the latest in 0.2 s" in err
  assert "while compile; run again to continue from the last comm" in out


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_second_signal_ends_at_once(number):
  process = deaf(grace=10 * PATIENCE)
  process.send_signal(number)
  assert process.stderr is not None
  process.stderr.readline()
  process.send_signal(number)
  _, err = process.communicate(timeout=PATIENCE)
  assert process.returncode == 128 + number
  assert f"{number.name}: stopped at once" in err
