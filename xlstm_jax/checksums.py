"""Checksums of the files in a folder, which detect damage.

TensorStore checks the structure of what it wrote, but not the values: it reads
a flipped byte in an array's data as if nothing had happened.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent import futures

from etils import epath

FILE = "checksums.json"
# Files below this size are read even if only sizes are checked.
_SMALL_BYTES = 2**16
_PIECE_BYTES = 2**22
_THREADS = 8


def write(folder: epath.Path, names: Iterable[str]) -> None:
  """Records size and CRC32 of all files in the named folders of `folder`."""
  paths = [path for name in names for path in _files(folder / name)]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    entries = dict(
      zip(
        [str(path.relative_to(folder)) for path in paths],
        pool.map(_size_and_crc, paths),
        strict=True,
      )
    )
  (folder / FILE).write_text(json.dumps(entries, indent=1) + "\n")


def problem(
  folder: epath.Path,
  names: Iterable[str] | None = None,
  *,
  contents: bool = True,
) -> str | None:
  """What is wrong with the recorded files of a folder; None if nothing is.

  Args:
    folder: the folder. One without a record has no problem.
    names: names of the folders in it that are checked; None for all.
    contents: whether all files are read. Otherwise only small files are, and
      the sizes of the others are checked.
  """
  path = folder / FILE
  if not path.exists():
    return None
  try:
    entries = _parse(path.read_bytes())
  except (OSError, ValueError, RecursionError):
    return f"{FILE} cannot be read"
  chosen = {
    name: size_and_crc
    for name, size_and_crc in entries.items()
    if names is None or name.split("/")[0] in set(names)
  }
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    found = pool.map(
      lambda entry: _file_problem(folder, *entry, contents=contents),
      chosen.items(),
    )
    return next(filter(None, found), None)


def _parse(data: bytes) -> dict[str, list[int]]:
  entries = json.loads(data)
  if not isinstance(entries, dict):
    raise ValueError("no table")
  for name, numbers in entries.items():
    if ".." in name.split("/") or name.startswith("/"):
      raise ValueError("a file outside of the folder")
    if not name.isprintable():
      raise ValueError("a name that no terminal can show")
    match numbers:
      case [int(), int()]:
        continue
    raise ValueError("no size and checksum")
  return entries


def _file_problem(
  folder: epath.Path, name: str, expected: list[int], *, contents: bool
) -> str | None:
  path = folder / name
  try:
    size = path.stat().length
    if size != expected[0]:
      return f"{name} has {size} bytes, not {expected[0]}"
    if contents or size <= _SMALL_BYTES:
      _, crc = _size_and_crc(path)
      if crc != expected[1]:
        return f"the content of {name} has changed"
  except FileNotFoundError:
    return f"{name} is missing"
  # A name that no file can have is a ValueError.
  except (OSError, ValueError) as error:
    return f"{name} cannot be read ({error})"
  return None


def _size_and_crc(path: epath.Path) -> tuple[int, int]:
  size = crc = 0
  with path.open("rb") as file:
    while piece := file.read(_PIECE_BYTES):
      size += len(piece)
      crc = zlib.crc32(piece, crc)
  return size, crc


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path)
    else:
      yield path
