"""Files: written whole and durably, locked, and JSON read with its types."""

import contextlib
import copy
import errno
import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from xlstm_jax.errors import UserError, shown

StrPath = str | os.PathLike[str]
Content = bytes | str | Callable[[BinaryIO], object]

_NOT_SUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
# NFS locks only what is open for writing, which a folder cannot be.
_NO_LOCKS = (*_NOT_SUPPORTED, errno.ENOLCK, errno.EBADF)


def write(path: StrPath, content: Content) -> None:
  """Replaces a file: after a crash it holds the old content or the new.

  When this returns, the new content survives a power failure. The file keeps
  its permissions. A link stays one, and a device or pipe is written to as it
  is.

  Args:
    path: of the file.
    content: its bytes or text, or a function that writes them to an open file.
  """
  # Before links are followed: /dev/stdout may lead to a name that no file has.
  if os.path.exists(path) and not os.path.isfile(path):
    with open(path, "wb") as file:
      _write(file, content)
    return
  path = Path(os.path.realpath(path))
  temporary = temporary_path(path)
  try:
    with temporary.open("wb") as file:
      if path.exists():
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
      _write(file, content)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_folder(path.parent)


def temporary_path(path: Path) -> Path:
  """Where `write` writes first; a killed process may leave it there."""
  # A name has at most 255 bytes.
  return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:240])}.tmp")


def _write(file: BinaryIO, content: Content) -> None:
  if callable(content):
    content(file)
  else:
    file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: StrPath, content: Any, *, sort_keys: bool = False) -> None:
  """`write`, of JSON that people can read."""
  write(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def sync_folder(folder: StrPath) -> None:
  """Makes the names in a folder durable, where the file system can."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in _NOT_SUPPORTED:
      raise
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def writing(what: object) -> Iterator[None]:
  """Within, what the operating system refuses becomes a UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(f"{what} cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def locked(path: StrPath, *, busy: Callable[[str], str]) -> Iterator[bool]:
  """Keeps other processes out while it is held; the kernel releases it.

  Args:
    path: of a folder, which is locked itself, or of a file, which is created
      and says who holds it.
    busy: the sentence for a lock that somebody holds, who is given as "process
      1 on host", or as "" of a folder.

  Yields:
    Whether it is held: False where the file system has no locks.

  Raises:
    UserError: somebody else holds it.
  """
  folder = os.path.isdir(path)
  mode = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT
  descriptor = os.open(path, mode, 0o644)
  try:
    held = True
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      holder = b"" if folder else os.pread(descriptor, 1000, 0)
      raise UserError(busy(holder.decode(errors="replace").strip())) from error
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      held = False
    if held and not folder:
      # Only for the sentence: on a full disk the lock holds without it.
      with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        name = f"process {os.getpid()} on {socket.gethostname()}\n"
        os.pwrite(descriptor, name.encode(), 0)
    yield held
  finally:
    os.close(descriptor)


def read(path: StrPath, *, limit: int) -> bytes:
  """The bytes of a regular file.

  Raises:
    UserError: there is none, it cannot be read, or has more than `limit` bytes.
  """
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise UserError(f"{path} is not a regular file.")
    if status.st_size > limit:
      raise UserError(
        f"{path} has {status.st_size} bytes; at most {limit} are expected."
      )
    return Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def read_json[T](
  path: StrPath, kind: type[T], *, limit: int, advice: str = ""
) -> T:
  """`parse_json`, of a file of at most `limit` bytes."""
  return parse_json(read(path, limit=limit), kind, path, advice=advice)


def parse_json[T](
  data: bytes,
  kind: type[T],
  path: StrPath,
  *,
  advice: str = "",
  object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> T:
  """JSON from outside as a value of a type.

  Args:
    data: what the file holds, in UTF-8.
    kind: what it must be, as msgspec has it: a dataclass, a dict, `Any`.
    path: of the file.
    advice: ends the sentence of an error: what the user can do.
    object_pairs_hook: of `json.loads`.

  Raises:
    UserError: it is no JSON, or of another type; names the place, as in
      `$.files[3].bytes`, and what is there.
  """
  try:
    content = json.loads(data.decode(), object_pairs_hook=object_pairs_hook)
  except UserError:
    raise
  # Beside malformed JSON: nested too deeply, numbers of too many digits.
  except (ValueError, RecursionError) as error:
    raise UserError(
      _sentence(f"{path} is not valid JSON: {error}", advice)
    ) from error
  return convert(content, kind, path, advice=advice)


def convert[T](
  content: Any,
  kind: type[T],
  path: StrPath,
  *,
  place: str = "$",
  advice: str = "",
) -> T:
  """`parse_json`, of what JSON was parsed to, at some place of the file."""
  try:
    return msgspec.convert(content, kind)
  except msgspec.ValidationError as error:
    below, value = _located(content, kind, str(error))
    expected = _expected(str(error).partition(" - at `")[0])
    raise fault(path, place + below, value, expected, advice) from error
  # A key that is no text, such as half of a surrogate pair.
  except (UnicodeError, RecursionError) as error:
    raise UserError(_sentence(f"{path} is damaged: {error}", advice)) from error


def fault(
  path: StrPath, place: str, value: Any, expected: str, advice: str = ""
) -> UserError:
  """The error for a value in a file of JSON that is not what it must be."""
  return UserError(
    _sentence(f"{path}: {place} is {shown(value)}; {expected}", advice)
  )


def _sentence(problem: str, advice: str) -> str:
  return f"{problem}. {advice}".rstrip()


_WORDS = {
  "int": "an integer",
  "float": "a number",
  "str": "a string",
  "bool": "true or false",
  "array": "a list",
  "object": "an object",
  "null": "null",
}
_BOUNDS = {
  " >= ": ", at least ",
  " > ": ", above ",
  " <= ": ", at most ",
  " < ": ", below ",
}


def _expected(message: str) -> str:
  """What msgspec demands, in words."""
  if found := re.fullmatch("Object missing required field `(.*)`", message):
    return f"it lacks {found[1]}"
  if found := re.fullmatch(
    r"Expected `([^`]*)`(.*?)(, got .*)?", message, re.S
  ):
    kinds = " or ".join(_WORDS.get(w, w) for w in found[1].split(" | "))
    for sign, words in _BOUNDS.items():
      if found[2].startswith(sign):
        return f"it must be {kinds}{words}{found[2].removeprefix(sign)}"
    return f"it must be {kinds}{found[2]}"
  return message[:1].lower() + message[1:]


def _located(content: Any, kind: Any, message: str) -> tuple[str, Any]:
  """The steps to a fault with the keys of tables, and the value there.

  msgspec says `$.sources[...].bytes` for any key of a table. The key is the one
  that fails in the same way without the others.
  """
  place = message.partition(" - at `")[2]
  root: Any = {"$": content}
  key: Any = "$"
  name, above = "", root
  for field, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place):
    value = above[key] = copy.copy(above[key])
    key = field or (index if index == "..." else int(index))
    if index == "...":
      table = dict(value)
      for key in table:
        value.clear()
        value[key] = table[key]
        if _message(root["$"], kind) == message:
          break
    above = value
    name += f".{field}" if field else f"[{shown(key)}]"
  return name, above[key]


def _message(content: Any, kind: Any) -> str | None:
  try:
    msgspec.convert(content, kind)
  except msgspec.ValidationError as error:
    return str(error)
  return None
