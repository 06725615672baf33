"""A reader lists a file as units, and cuts a unit into documents."""

import abc
import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from xlstm_jax.data import packings
from xlstm_jax.data.layout import Count
from xlstm_jax.errors import UserError

EMPTY_FILE = "empty file"


@dataclasses.dataclass(frozen=True)
class Input:
  """One file to read, found through the `argument`-th input of the user."""

  argument: int
  path: str
  name: str
  source: str
  size: int
  mtime_ns: int


class Place(NamedTuple):
  """How far the inputs were read.

  Within a file, `offset` and `line` are the reader's own: of JSON lines,
  unpacked bytes and lines. Both are 0 at its beginning and never both 0
  after a unit. `crc` is the CRC32 of all content so far.
  """

  file: Count = 0
  offset: Count = 0
  line: Count = 0
  crc: Count = 0


class Unit(NamedTuple):
  """A part of one file, of bounded size, whose documents are cut elsewhere.

  Attributes:
    data: What `Reader.documents` needs, in any process: the content, or a note
      of where it lies.
    file: Number of the file among the inputs.
    line: The first line, counted from 1; 0 where there are no lines.
    source: Of documents that name none.
    end: The place after the unit, from which reading can go on.
    raw: Number of bytes of the file that were read up to there.
    reader: Cuts it into documents.
    problem: Why the content is left out, if it is.
  """

  data: bytes
  file: int
  line: int
  source: str
  end: Place
  raw: int
  reader: "Reader"
  problem: str | None = None


class Document(NamedTuple):
  """One document, and where it comes from.

  Attributes:
    text: UTF-8; empty where there are tokens.
    source: Its name.
    file: Number of the file among the inputs.
    line: In the file; 0 where there are no lines.
    tokens: Ids in the vocabulary of the tokenizer, without an end of text,
      where the file holds these and no text.
  """

  text: bytes
  source: str
  file: int
  line: int
  tokens: np.ndarray | None = None


class Problem(NamedTuple):
  """Why a document was skipped; `line` is 0 for a whole file."""

  file: int
  line: int
  reason: str

  @property
  def harmless(self) -> bool:
    """Whether nothing was lost, as an empty file has no text to lose."""
    return self.reason == EMPTY_FILE


class Parsed(NamedTuple):
  """The content of a unit; `empty` counts the lines that have no text."""

  documents: list[Document]
  problems: list[Problem]
  empty: int = 0


@dataclasses.dataclass(frozen=True)
class OpenFile:
  """A file being read.

  Attributes:
    one: Which.
    file: Its bytes, as they are packed.
    packing: How they are.
    head: The first bytes after unpacking.
    whole: Whether the head is all there is.
    rest: What follows, once.
  """

  one: Input
  file: BinaryIO
  packing: packings.Packing | None
  head: bytes
  whole: bool
  rest: Iterator[bytes]

  def parts(self, offset: int, size: int) -> Iterator[bytes]:
    """The unpacked content from `offset` on, in parts of `size`.

    It can be read only once.

    Raises:
      packings.UnreadableError: the file cannot be unpacked.
      UserError: the file has changed.
    """
    if self.packing is None and not self.whole:
      self.file.seek(offset)
      yield from iter(lambda: self.file.read(size), b"")
    else:
      parts = itertools.chain((self.head,), self.rest)
      yield from _regrouped(_skip(parts, offset), size)
    if self.file.tell() != self.one.size:
      raise UserError(
        f"{self.one.path} changed while it was read: it had {self.one.size} "
        "bytes before; prepare it once it is complete."
      )


class Reader(abc.ABC):
  """Reads one format; instances travel to other processes."""

  @abc.abstractmethod
  def units(
    self,
    file: OpenFile,
    start: Place,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ) -> Iterator[Unit]:
    """The units from a place on, none where that is the end of the file.

    Args:
      file: what to read.
      start: the beginning of the file, or the end of a unit.
      unit_bytes: about the size of a unit; more only for a longer document.
      max_document_bytes: longer ones are not kept; their unit says so.

    Raises:
      packings.UnreadableError: the file cannot be unpacked.
      UserError: the file has changed.
    """

  @abc.abstractmethod
  def documents(self, unit: Unit, *, max_document_bytes: int) -> Parsed:
    """The documents of a unit without problem, in any process."""

  def checksum(
    self,
    file: OpenFile,
    start: Place,
    stop: Place | None,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ) -> int:
    """The CRC32 that a reading from `start` has at `stop`, or at the end.

    This one is of readers whose units have the same ends from wherever and with
    whatever `unit_bytes` they are listed, such as row groups; `crc_of_bytes` is
    of those that count bytes.
    """
    crc = start.crc
    for unit in self.units(
      file,
      start,
      unit_bytes=unit_bytes,
      max_document_bytes=max_document_bytes,
    ):
      crc = unit.end.crc
      if stop is not None and unit.end[:3] == stop[:3]:
        break
    return crc


def crc_of_bytes(
  file: OpenFile, start: Place, stop: Place | None, *, part_bytes: int
) -> int:
  """The CRC32 at `stop` where offsets count unpacked bytes, and units all."""
  crc, left = start.crc, None if stop is None else stop.offset
  for data in file.parts(0, part_bytes):
    part = data[:left]
    crc = zlib.crc32(part, crc)
    left = None if left is None else left - len(part)
  return crc


def too_long(max_document_bytes: int) -> str:
  """The problem of a document over the limit."""
  return f"longer than {max_document_bytes} bytes"


def _regrouped(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
  """The same bytes in parts of `size`, with a last part that may be empty."""
  held: list[bytes] = []
  count = 0
  for part in parts:
    held.append(part)
    count += len(part)
    if count >= size:
      data = b"".join(held)
      end = count - count % size
      yield from (data[at : at + size] for at in range(0, end, size))
      held, count = [data[end:]], count - end
  yield b"".join(held)


def _skip(parts: Iterable[bytes], count: int) -> Iterator[bytes]:
  for part in parts:
    yield part[count:]
    count = max(0, count - len(part))
