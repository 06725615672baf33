"""Reads documents from files and folders, packed or not.

A file's content decides how it is read (`contents`). A reader of that format
(`readers`) yields units of bounded size, each with the place where it ends, so
reading can stop after any unit and continue there. `parse` cuts units into
documents; other processes may run it.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from xlstm_jax import paths
from xlstm_jax.data import contents, json_lines, packings
from xlstm_jax.data.readers.reader import (
  Input,
  OpenFile,
  Parsed,
  Place,
  Problem,
  Reader,
  Unit,
)
from xlstm_jax.data.readers.table import JSON_LINES, TEXT
from xlstm_jax.errors import UserError

DEFAULT_SOURCE = "default"
# Version of the rules by which inputs are read. In version 1 names decided.
RULES = 2

_CRC_BYTES = 2**22
_MAGIC_BYTES = 16
# What version 1 of the rules read as JSON lines; all else was one text.
_LINES_BEFORE = tuple(
  f"{suffix}{packed}"
  for suffix in (".jsonl", ".ndjson")
  for packed in ("", ".gz", ".zst")
)


class Inputs(NamedTuple):
  """The files to read, in order, and how many others were skipped."""

  files: list[Input]
  hidden: int
  links: int


def find(arguments: Sequence[str]) -> Inputs:
  """The files that `PATH` or `SOURCE=PATH` arguments name, folders sorted.

  Hidden entries and symbolic links inside folders are skipped and counted.

  Raises:
    UserError: a path does not exist, is neither a file nor a folder, or is
      given twice; or no file is found.
  """
  found = Inputs([], 0, 0)
  for number, argument in enumerate(arguments):
    source, path = split_argument(argument)
    if os.path.isdir(path):
      found = _find_in_folder(found, number, source, path)
    else:
      name = os.path.basename(path)
      found.files.append(_input(number, source, path, name))
  if not found.files:
    raise UserError(
      f"There is no file to read in {', '.join(arguments)} (skipped: "
      f"{found.hidden} hidden, {found.links} symbolic links)."
    )
  _refuse_duplicates(found.files)
  return found


def listing_hash(inputs: Iterable[Input], *, times: bool) -> str:
  """Identifies a list of inputs by names, sources, sizes and maybe times."""
  digest = hashlib.sha256()
  for one in inputs:
    entry = [one.name, one.source, one.size, one.mtime_ns if times else 0]
    digest.update(json.dumps(entry).encode())
  return digest.hexdigest()


def read(
  inputs: Sequence[Input],
  start: Place,
  *,
  unit_bytes: int,
  max_document_bytes: int,
) -> Iterator[Unit]:
  """The units of the inputs from a place on.

  A unit has about `unit_bytes`, more only for a longer document. Documents over
  `max_document_bytes` are not kept: their unit states the problem, as does that
  of a file that holds something else.

  Raises:
    UserError: a file cannot be read, or JSON lines cannot be unpacked.
  """
  place = start
  for number in range(start.file, len(inputs)):
    one = inputs[number]
    if number != place.file:
      place = Place(number, 0, 0, place.crc)
    with _opened(one) as (file, content):
      reader = _reader(content)
      if not content.problem:
        units = reader.units(
          file,
          place,
          unit_bytes=unit_bytes,
          max_document_bytes=max_document_bytes,
        )
      else:
        units = _refused(one, place, reader, content.problem)
      for unit in units:
        place = unit.end
        yield unit


def _refused(
  one: Input, start: Place, reader: Reader, problem: str
) -> Iterator[Unit]:
  """What stands for a file that is not read."""
  if not start.line:
    end = start._replace(line=1)
    yield Unit(b"", start.file, 0, one.source, end, one.size, reader, problem)


def _reader(content: contents.Content) -> Reader:
  assert content.format.reader, "a format that nothing reads is a problem"
  return content.format.reader


def content_crc(
  inputs: Sequence[Input], place: Place, *, max_document_bytes: int
) -> int:
  """The CRC32 that a reader has at `place`, computed by reading all again."""
  crc = 0
  for number, one in enumerate(inputs[: place.file + 1]):
    stop = place if number == place.file else None
    with _opened(one) as (file, content):
      at_start = stop is not None and not (stop.offset or stop.line)
      if at_start or content.problem:
        continue
      crc = _reader(content).checksum(
        file,
        Place(number, 0, 0, crc),
        stop,
        unit_bytes=_CRC_BYTES,
        max_document_bytes=max_document_bytes,
      )
  return crc


def read_otherwise(inputs: Sequence[Input]) -> Input | None:
  """The first input that version 1 of the rules read in another way."""
  for one in inputs:
    lower = one.path.lower()
    lines = lower.endswith(_LINES_BEFORE)
    named = packings.of_name(lower) if lines else None
    before = JSON_LINES if lines else TEXT
    with _opened(one) as (file, content):
      same = (before, named) == (content.format, file.packing)
      if one.size and (content.problem or not same):
        return one
  return None


def parse(unit: Unit, *, max_document_bytes: int) -> Parsed:
  """Cuts a unit into its documents and what cannot be one."""
  if unit.problem:
    return Parsed([], [Problem(unit.file, unit.line, unit.problem)])
  return unit.reader.documents(unit, max_document_bytes=max_document_bytes)


def split_argument(argument: str) -> tuple[str, str]:
  """The source and the path of `PATH` or `SOURCE=PATH`.

  Raises:
    UserError: the path is invalid or nothing is there, or the source's name
      cannot be printed.
  """
  name, separator, path = argument.partition("=")
  whole = paths.reachable(argument)
  if not separator or os.path.exists(whole):
    name, path = DEFAULT_SOURCE, whole
  else:
    path = paths.reachable(path)
  if not os.path.exists(path):
    raise UserError(f"There is no file or folder {path}.")
  try:
    return json_lines.source_name(name), path
  except ValueError as error:
    raise UserError(f"--input={argument}: {error}.") from error


def _find_in_folder(
  found: Inputs, number: int, source: str, folder: str
) -> Inputs:
  hidden, links = found.hidden, found.links

  def fail(error: OSError) -> None:
    raise UserError(
      f"Cannot list {error.filename}: {error.strerror}."
    ) from error

  for parent, folders, names in os.walk(folder, onerror=fail):
    hidden += sum(name.startswith(".") for name in folders + names)
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    links += sum(os.path.islink(os.path.join(parent, f)) for f in folders)
    for name in sorted(n for n in names if not n.startswith(".")):
      path = os.path.join(parent, name)
      if os.path.islink(path):
        links += 1
      else:
        relative = os.path.relpath(path, folder)
        found.files.append(_input(number, source, path, relative))
  return Inputs(found.files, hidden, links)


def _input(number: int, source: str, path: str, name: str) -> Input:
  try:
    status = os.stat(path)
  except OSError as error:
    raise UserError(f"Cannot read {path}: {error.strerror}.") from error
  if not stat.S_ISREG(status.st_mode):
    raise UserError(
      f"{path} is neither a regular file nor a folder; write what it gives to "
      "a file, which can be read again to continue."
    )
  return Input(number, path, name, source, status.st_size, status.st_mtime_ns)


def _refuse_duplicates(inputs: Iterable[Input]) -> None:
  seen: set[str] = set()
  for one in inputs:
    path = os.path.realpath(one.path)
    if path in seen:
      raise UserError(f"{one.path} is among the inputs twice.")
    seen.add(path)


@contextlib.contextmanager
def _opened(one: Input) -> Iterator[tuple[OpenFile, contents.Content]]:
  """Opens a file and looks what it holds; within, failures name the file."""
  try:
    with open(one.path, "rb") as file:
      packing = packings.of(file.read(_MAGIC_BYTES))
      file.seek(0)
      unpacked = (
        packings.unpacked(file, packing)
        if packing
        else iter(lambda: file.read(contents.HEAD_BYTES), b"")
      )
      head, rest = _head(unpacked)
      whole = len(head) < contents.HEAD_BYTES
      content = contents.recognize(
        one.name, packing, head[: contents.HEAD_BYTES], whole=whole
      )
      yield OpenFile(one, file, packing, head, whole, rest), content
  except packings.UnreadableError as error:
    raise UserError(f"{one.path} {error}.") from error
  except OSError as error:
    raise UserError(
      f"Cannot read {one.path}: {error.strerror or error}."
    ) from error


def _head(parts: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
  """At least `HEAD_BYTES` of a stream, if it has that many, and the rest."""
  held, size = [], 0
  try:
    while (
      size < contents.HEAD_BYTES and (part := next(parts, None)) is not None
    ):
      held.append(part)
      size += len(part)
  except packings.UnreadableError as error:
    parts = _raising(error)
  return b"".join(held), parts


def _raising(error: packings.UnreadableError) -> Iterator[bytes]:
  raise error
  yield b""
