"""Two runs cannot write one workdir."""

import errno
import fcntl
import os
import socket

import pytest
from etils import epath

from xlstm_jax.errors import UserError
from xlstm_jax.runtime import lock


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
  workdir = epath.Path(tmp_path)
  with lock.held(workdir):
    who = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(UserError, match=who), lock.held(workdir):
      pass
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
