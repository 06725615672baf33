"""What hangs is ended, with its stacks; what goes on is left alone."""

import subprocess
import sys
import time

from xlstm_jax import metrics
from xlstm_jax.runtime import watchdog
from xlstm_jax.runtime.status import Status

HANGING = """
import pathlib, sys, threading, time
from xlstm_jax import metrics
from xlstm_jax.runtime.watchdog import Watchdog

def some_other_thread():
  time.sleep(1000)

def the_step_that_hangs():
  time.sleep(1000)

threading.Thread(target=some_other_thread, daemon=True).start()
clock = metrics.Clock("start")
seconds = {"start": 1000.0, "step": 0.3}
Watchdog(clock, seconds, pathlib.Path(sys.argv[1]), behind=str)
with clock.spent_on("step"):
  the_step_that_hangs()
"""


def test_a_hang_ends_with_all_stacks_and_its_own_status(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", HANGING, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == Status.HUNG, done.stderr
  file = (tmp_path / "hang-0.txt").read_text()
  for text in (done.stderr, file):
    assert "'step' did not end within 0.3 s in process 0" in text
    assert "the_step_that_hangs" in text
    assert "some_other_thread" in text


def test_a_workdir_that_does_not_answer_is_no_hindrance(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", HANGING, str(tmp_path / "none")],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == Status.HUNG
  assert "the_step_that_hangs" in done.stderr


class Racing:
  """A clock that begins a step while the watchdog looks at it.

  Only the first activity has lasted; every reading of `changes` counts.
  """

  LOOKS = 30

  def __init__(self):
    self.activity = "start"
    self.looks = 0
    self._changes = 0

  @property
  def changes(self):
    before = self._changes
    self.looks += 1
    if self.looks == self.LOOKS:
      self._changes, self.activity = 1, "step"
    elif self.looks == self.LOOKS + 1:
      self._changes, self.activity = 2, "start"
    return before


def test_a_change_between_two_looks_is_no_hang(tmp_path, monkeypatch):
  barks = []
  monkeypatch.setattr(watchdog.Watchdog, "_bark", lambda _, a: barks.append(a))
  clock = Racing()
  # The first 30 ticks last three times as long as a step may.
  seconds = {"start": 1e6, "step": 0.01}
  dog = watchdog.Watchdog(clock, seconds, tmp_path, behind=str)
  deadline = time.monotonic() + 300
  while clock.looks < 2 * Racing.LOOKS and time.monotonic() < deadline:
    time.sleep(0.01)
  dog.close()
  assert clock.looks >= 2 * Racing.LOOKS
  assert barks == []


def test_every_activity_has_its_own_time(tmp_path, monkeypatch):
  barks = []
  monkeypatch.setattr(watchdog.Watchdog, "_bark", lambda _, a: barks.append(a))
  clock = metrics.Clock("start")
  # The ticks of a tenth of the shortest limit; a loaded machine makes them
  # later, never shorter.
  seconds = {"start": 1e6, "step": 0.05, "save": 1e6}
  dog = watchdog.Watchdog(clock, seconds, tmp_path, behind=str)
  with clock.spent_on("save"):
    time.sleep(0.2)
  assert barks == []
  clock.now("step")
  deadline = time.monotonic() + 300
  while not barks and time.monotonic() < deadline:
    time.sleep(0.01)
  clock.now("start")
  dog.close()
  assert set(barks) == {"step"}
