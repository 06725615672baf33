"""Runs that are killed again and again end where one left alone does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHASES = ("compile", "step", "save", "evaluation", "start", "imports")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kills", "flags"),
  [
    (20, []),
    (20, ["--signal=TERM"]),
    (8, ["--processes=2"]),
    (8, ["--processes=2", "--signal=TERM"]),
  ],
  ids=str,
)
def test_a_killed_run_is_the_same_bit_by_bit(kills, flags, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, ROOT / "tests" / "tools" / "kill_run.py"),
      *(f"--kills={kills}", *flags, f"--workdir={tmp_path / 'run'}"),
    ],
    capture_output=True,
    text=True,
    # One device, as the conftest's eight are this process's alone.
    # And no cache but the run's own, for a kill may damage it.
    env=os.environ
    | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
    timeout=3600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"{kills} as meant" in done.stdout
  for phase in PHASES:
    hit = re.search(rf"(\d+) in {phase}\b", done.stdout)
    assert hit, done.stdout
    assert int(hit[1]) >= kills // len(PHASES)
  (listed,) = re.findall(r"a checkpoint: steps ([\d, ]+)", done.stdout)
  steps = [int(step) for step in listed.split(", ")]
  # Nothing that was committed is lost, and the run gets on.
  assert steps == sorted(steps)
  assert len(set(steps)) > kills // 8
