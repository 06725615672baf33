"""Files are written whole, locked by one process, and read with their types."""

import dataclasses
import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from damage import same_folder, values
from hypothesis import given
from msgspec import Meta

from xlstm_jax import files
from xlstm_jax.errors import UserError

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclasses.dataclass(frozen=True)
class File:
  name: Annotated[str, Meta(min_length=1, max_length=9)]
  bytes: Count
  parts: tuple[Count, Count] = (0, 0)

  def __post_init__(self):
    if self.parts[0] > self.bytes:
      raise ValueError(f"the parts {self.parts} exceed {self.bytes} bytes")


@dataclasses.dataclass(frozen=True)
class Listing:
  files: tuple[File, ...]
  tables: dict[str, dict[str, File]] = dataclasses.field(default_factory=dict)


def full(descriptor: int) -> None:
  raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
  "content", [b"new", "new", lambda file: (file.write(b"n"), file.write(b"ew"))]
)
def test_a_file_is_replaced(tmp_path: Path, content):
  path = tmp_path / "x"
  files.write(path, b"old")
  files.write(path, content)
  assert path.read_bytes() == b"new"
  assert list(tmp_path.iterdir()) == [path]


def fail(file):
  file.write(b"half")
  raise ValueError("no more")


@pytest.mark.parametrize(
  ("content", "error"), [(b"new", OSError), (fail, ValueError)]
)
def test_a_write_that_fails_leaves_the_old_file(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content, error
):
  path = tmp_path / "x"
  files.write(path, b"old")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(error):
    files.write(path, content)
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_content_and_name_are_durable_in_this_order(tmp_path, monkeypatch):
  events = []
  fsync, replace = os.fsync, Path.replace

  def synced(descriptor):
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    events.append("folder" if is_folder else "file")
    fsync(descriptor)

  def replaced(self, target):
    events.append("rename")
    return replace(self, target)

  monkeypatch.setattr(os, "fsync", synced)
  monkeypatch.setattr(Path, "replace", replaced)
  files.write(tmp_path / "x", b"content")
  assert events == ["file", "rename", "folder"]


def test_a_file_system_that_cannot_sync_folders_is_written_to(
  tmp_path, monkeypatch
):
  fsync = os.fsync

  def refused(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
      raise OSError(errno.EINVAL, "Invalid argument")
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", refused)
  files.write(tmp_path / "x", b"content")
  assert (tmp_path / "x").read_bytes() == b"content"


def test_a_link_stays_one(tmp_path):
  target, link = tmp_path / "target", tmp_path / "link"
  target.touch()
  link.symlink_to(target)
  files.write(link, b"content")
  assert link.is_symlink()
  assert target.read_bytes() == b"content"


def test_a_device_stays_one(tmp_path):
  """Otherwise /dev/null would become a file when root writes a report there."""
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  try:
    files.write(pipe, "content")
    assert os.read(reader, 100) == b"content"
  finally:
    os.close(reader)
  assert pipe.is_fifo()


def test_a_pipe_without_a_name_is_written_to():
  reading, writing = os.pipe()
  files.write(f"/dev/fd/{writing}", "content")
  os.close(writing)
  with open(reading) as file:
    assert file.read() == "content"


def test_a_replaced_file_keeps_its_permissions(tmp_path):
  path = tmp_path / "report.json"
  path.touch(mode=0o600)
  files.write(path, "content")
  assert path.stat().st_mode & 0o777 == 0o600


def test_the_longest_name_can_be_written(tmp_path):
  path = tmp_path / ("\u00e9" * 127)
  files.write(path, b"content")
  assert path.read_bytes() == b"content"


HOLDER = """
import sys
from xlstm_jax import files
with files.locked(sys.argv[1], busy=str):
  print("held", flush=True)
  sys.stdin.read()
"""


def busy(holder: str) -> str:
  return f"in use by {holder}"


def test_a_second_lock_is_refused_and_told_who_is_there(tmp_path):
  who = f"process {os.getpid()} on {socket.gethostname()}"
  path = tmp_path / "lock"
  with files.locked(path, busy=busy) as held:
    assert held
    with pytest.raises(UserError, match=who), files.locked(path, busy=busy):
      pass
  with files.locked(path, busy=busy):
    pass


def test_a_folder_is_locked_without_a_trace(tmp_path):
  with (
    files.locked(tmp_path, busy=busy),
    pytest.raises(UserError, match="in use"),
    files.locked(tmp_path, busy=busy),
  ):
    pass
  assert not list(tmp_path.iterdir())


def test_a_killed_process_holds_no_lock(tmp_path):
  path = tmp_path / "lock"
  with subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with (
      pytest.raises(UserError, match=f"process {process.pid} on"),
      files.locked(path, busy=busy),
    ):
      pass
    process.kill()
  with files.locked(path, busy=busy):
    pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, number):
  def flock(*_):
    raise OSError(number, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  for path in (tmp_path, tmp_path / "lock"):
    with files.locked(path, busy=busy) as held:
      assert not held


def test_another_failure_to_lock_is_raised(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(fcntl, "flock", flock)
  with (
    pytest.raises(OSError, match="Input/output"),
    files.locked(tmp_path, busy=busy),
  ):
    pass


GOOD: dict[str, Any] = {"name": "a", "bytes": 4}


@pytest.mark.parametrize(
  ("content", "sentence"),
  [
    ([], "$ is []; it must be an object"),
    ({}, "$ is {}; it lacks files"),
    ({"files": {}}, "$.files is {}; it must be a list"),
    (
      {"files": [GOOD, GOOD | {"bytes": -1}]},
      "$.files[1].bytes is -1; it must be an integer, at least 0",
    ),
    (
      {"files": [GOOD | {"bytes": True}]},
      "$.files[0].bytes is True; it must be an integer",
    ),
    (
      {"files": [GOOD | {"name": "a" * 10**6}]},
      f"$.files[0].name is '{'a' * 47}...{'a' * 48}'; it must be a string of "
      "length <= 9",
    ),
    (
      {"files": [GOOD | {"parts": [1, 2, 3]}]},
      "$.files[0].parts is [1, 2, 3]; it must be a list of length 2",
    ),
    (
      {"files": [GOOD | {"parts": [5, 0]}]},
      "$.files[0] is {'bytes': 4, 'name': 'a', 'parts': [5, 0]}; the parts "
      "(5, 0) exceed 4 bytes",
    ),
    # The second table fails in the same way as what stands before.
    (
      {
        "files": [],
        "tables": {
          "x": {"f": GOOD},
          "y.z": {"f": GOOD, "[0]": {"name": "b"}},
          "w": {"f": {"name": "c"}},
        },
      },
      "$.tables['y.z']['[0]'] is {'name': 'b'}; it lacks bytes",
    ),
  ],
)
def test_a_fault_is_named_with_its_place(content, sentence):
  with pytest.raises(UserError) as error:
    files.convert(content, Listing, "x.json", advice="Restore it.")
  assert str(error.value) == f"x.json: {sentence}. Restore it."


def test_what_is_nested_deeply_is_a_sentence():
  deep: Any = []
  for _ in range(5000):
    deep = [deep]
  for content in (deep, {"files": deep}, {"files": [], "tables": {"a": deep}}):
    with pytest.raises(UserError, match=r"^x\.json: \$"):
      files.convert(content, Listing, "x.json")


@pytest.mark.parametrize(
  "data", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000]
)
def test_what_is_no_json_is_a_sentence(data):
  with pytest.raises(UserError, match=r"^x\.json is not valid JSON: .*Restore"):
    files.parse_json(data, Any, "x.json", advice="Restore it.")


def test_what_was_written_is_read(tmp_path):
  # Names of files may hold halves of surrogate pairs.
  content = {"b": ["caf\udce9", 0.1, 2**70, None], "a": {}}
  files.write_json(tmp_path / "x", content)
  read = files.read_json(tmp_path / "x", dict[str, Any], limit=1000)
  assert read == content


def test_a_value_has_its_type(tmp_path):
  files.write_json(tmp_path / "x", {"files": [GOOD]})
  read = files.read_json(tmp_path / "x", Listing, limit=1000)
  assert read == Listing((File("a", 4),))


@same_folder
@given(values)
def test_any_value_is_one_of_the_type_or_refused(value):
  for content in (value, {"files": value}, {"files": [], "tables": value}):
    try:
      read = files.convert(content, Listing, "x.json")
    except UserError as error:
      read = str(error)
    assert isinstance(read, Listing) or read.startswith("x.json")


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="not a regular file"):
    files.read(tmp_path / "pipe", limit=1)
  with pytest.raises(UserError, match="No such file"):
    files.read(tmp_path / "none", limit=1)
  (tmp_path / "x").write_bytes(b"12")
  with pytest.raises(UserError, match="at most 1 are expected"):
    files.read(tmp_path / "x", limit=1)
