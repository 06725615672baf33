"""Runs that are killed again and again end where one left alone does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags",
  [
    ["--kills=20"],
    ["--kills=5", "--signal=TERM"],
    ["--kills=5", "--processes=2"],
    ["--kills=5", "--processes=2", "--signal=TERM"],
  ],
  ids=" ".join,
)
def test_a_killed_run_is_the_same_bit_by_bit(flags, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, ROOT / "scripts" / "kill_run.py"),
      *(*flags, f"--workdir={tmp_path / 'run'}"),
    ],
    capture_output=True,
    text=True,
    # One device, as the conftest's eight are this process's alone.
    env=os.environ | {"XLA_FLAGS": ""},
    timeout=3600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "survived" in done.stdout
  for phase in ("start", "compile", "step", "save", "evaluation"):
    assert f"in {phase}" in done.stdout
