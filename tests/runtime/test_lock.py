"""Two runs cannot write one workdir."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest
from etils import epath

from xlstm_jax.errors import UserError
from xlstm_jax.runtime import lock

HOLDER = """
import sys, time
from etils import epath
from xlstm_jax.runtime import lock
with lock.held(epath.Path(sys.argv[1])):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
  workdir = epath.Path(tmp_path)
  with lock.held(workdir):
    who = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(UserError, match=who), lock.held(workdir):
      pass
  with lock.held(workdir):
    pass


def test_a_killed_run_holds_no_lock(tmp_path):
  workdir = epath.Path(tmp_path)
  with subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with (
      pytest.raises(UserError, match=f"process {process.pid} on"),
      lock.held(workdir),
    ):
      pass
    process.kill()
  with lock.held(workdir):
    pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  with lock.held(epath.Path(tmp_path)):
    assert "has no locks" in capsys.readouterr().out


def test_a_workdir_that_cannot_be_written_is_a_sentence(tmp_path):
  (tmp_path / "file").touch()
  with (
    pytest.raises(UserError, match="cannot be written"),
    lock.held(epath.Path(tmp_path / "file")),
  ):
    pass
