"""Two processes: one behind, one that stops both, one that is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from train.small_run import PATIENCE, free_port

from xlstm_jax.runtime import peers
from xlstm_jax.runtime.status import Status

PEER = Path(__file__).with_name("peer.py")


def test_processes_agree_and_name_who_is_missing():
  port = str(free_port())
  processes = [
    subprocess.Popen(
      [sys.executable, PEER, str(index), port],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"XLA_FLAGS": ""},
    )
    for index in range(2)
  ]
  ends = [process.communicate(timeout=PATIENCE) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], ends
  (first, first_err), (second, second_err) = ends
  # Both stop at 4 borders, of which process 0 had passed 3.
  assert first.splitlines() == [
    "passes 1",
    "Not all processes came to 'rollback 1' within 0.5 s; missing: 1.",
  ]
  assert second.splitlines() == ["passes 0"]
  assert "SIGTERM: stopping" in first_err
  assert "process 0 was told to stop: stopping" in second_err


def test_where_the_grace_decides_no_process_ends_another():
  port = str(free_port())
  hosts = [
    subprocess.Popen(
      [sys.executable, PEER.with_name("ending.py"), str(index), port, early],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {"XLA_FLAGS": ""},
    )
    # Far enough apart for a machine that is busy with others.
    for index, early in enumerate(("0", "10"))
  ]
  outputs = [host.communicate(timeout=PATIENCE)[0] for host in hosts]
  assert [host.returncode for host in hosts] == 2 * [Status.PREEMPTED], outputs
  assert "stopped   20 s after the signal, while starting" in outputs[0]
  assert "stopped   10 s after the signal, while starting" in outputs[1]


def test_one_process_meets_nobody():
  peers.meet("anything", seconds=0.0)


@pytest.mark.parametrize("error", [OSError("refused"), ValueError("odd")])
def test_other_errors_stay_what_they_are(monkeypatch, error):
  class Client:
    def key_value_set(self, *_):
      pass

    def wait_at_barrier(self, *_):
      raise error

  monkeypatch.setattr(peers, "_client", Client)
  with pytest.raises(type(error)):
    peers.meet("anything", seconds=0.0)
