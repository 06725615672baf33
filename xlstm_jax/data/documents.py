"""Reads documents from JSON lines and plain-text files, packed or not.

A file's content decides how it is read (`contents`). Reading yields pieces of
bounded size, each with the place where it ends, so it can stop after any piece
and continue there. `parse` cuts pieces into documents; other processes may run
it.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from xlstm_jax import paths
from xlstm_jax.data import contents, json_lines, packings
from xlstm_jax.errors import UserError

DEFAULT_SOURCE = "default"
# Version of the rules by which inputs are read. In version 1 names decided.
RULES = 2

_CRC_BYTES = 2**22
_MAGIC_BYTES = 16
_EMPTY_FILE = "empty file"
_BOM = b"\xef\xbb\xbf"
# What version 1 of the rules read as JSON lines; all else was one text.
_LINES_BEFORE = tuple(
  f"{suffix}{packed}"
  for suffix in (".jsonl", ".ndjson")
  for packed in ("", ".gz", ".zst")
)


@dataclasses.dataclass(frozen=True)
class Input:
  """One file to read, found through the `argument`-th input of the user."""

  argument: int
  path: str
  name: str
  source: str
  size: int
  mtime_ns: int


class Inputs(NamedTuple):
  """The files to read, in order, and how many others were skipped."""

  files: list[Input]
  hidden: int
  links: int


class Place(NamedTuple):
  """How far the inputs were read: `line` lines and `offset` bytes of a file.

  Offsets count unpacked bytes; `crc` is the CRC32 of all content so far.
  """

  file: int = 0
  offset: int = 0
  line: int = 0
  crc: int = 0


class Piece(NamedTuple):
  """Whole lines of one file, or one text; `problem` replaces unread data.

  `line` is the number of the first line, from 1; it is 0 for a text or a whole
  file. `end` is the place where the piece ends, `raw` the number of bytes of
  the file that were read up to there.
  """

  data: bytes
  file: int
  line: int
  source: str
  end: Place
  raw: int
  problem: str | None = None


class Document(NamedTuple):
  """The UTF-8 text of one document, and where it comes from."""

  text: bytes
  source: str
  file: int
  line: int


class Problem(NamedTuple):
  """Why a document was skipped; `line` is 0 for a whole file."""

  file: int
  line: int
  reason: str

  @property
  def harmless(self) -> bool:
    """Whether nothing was lost, as an empty file has no text to lose."""
    return self.reason == _EMPTY_FILE


class Parsed(NamedTuple):
  """The content of a piece; `empty` counts the lines that have no text."""

  documents: list[Document]
  problems: list[Problem]
  empty: int = 0


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
  piece_bytes: int,
  max_document_bytes: int,
) -> Iterator[Piece]:
  """The pieces of the inputs from a place on.

  A piece has about `piece_bytes`, and more only for a longer document. Lines
  and texts over `max_document_bytes` are not kept; their piece states the
  problem. So does the piece of a file that holds something else.

  Raises:
    UserError: a file cannot be read, or JSON lines cannot be unpacked.
  """
  place = start
  for number in range(start.file, len(inputs)):
    one = inputs[number]
    if number != place.file:
      place = Place(number, 0, 0, place.crc)
    with _opened(one) as file:
      if file.content.lines and file.head and not file.content.problem:
        pieces = _read_lines(file, place, piece_bytes, max_document_bytes)
      else:
        pieces = _read_whole(file, place, max_document_bytes)
      for piece in pieces:
        place = piece.end
        yield piece


def content_crc(
  inputs: Sequence[Input], place: Place, *, max_document_bytes: int
) -> int:
  """The CRC32 that a reader has at `place`, computed by reading all again."""
  crc = 0
  for number, one in enumerate(inputs[: place.file + 1]):
    left = place.offset if number == place.file else None
    with _opened(one) as file:
      if left == 0 or file.content.problem:
        continue
      if not file.content.lines:
        text = _text(file, max_document_bytes)
        crc = crc if isinstance(text, str) else zlib.crc32(text, crc)
        continue
      for data in file.parts(0, _CRC_BYTES):
        part = data[:left]
        crc = zlib.crc32(part, crc)
        left = None if left is None else left - len(part)
  return crc


def read_otherwise(inputs: Sequence[Input]) -> Input | None:
  """The first input that version 1 of the rules read in another way."""
  for one in inputs:
    lower = one.path.lower()
    lines = lower.endswith(_LINES_BEFORE)
    named = packings.of_name(lower) if lines else None
    with _opened(one) as file:
      same = (lines, named) == (file.content.lines, file.packing)
      if one.size and (file.content.problem or not same):
        return one
  return None


def parse(piece: Piece, *, max_document_bytes: int) -> Parsed:
  """Cuts a piece into documents, and problems where there can be none."""
  if piece.problem:
    return Parsed([], [Problem(piece.file, piece.line, piece.problem)])
  if piece.line == 0:
    return _parse_text(piece)
  found = Parsed([], [])
  empty = 0
  for number, line in enumerate(
    _decoded_lines(piece.data, max_document_bytes), piece.line
  ):
    try:
      if isinstance(line, ValueError):
        raise line
      one = json_lines.document(line, piece.source)
    except ValueError as error:
      reason = json_lines.reason(error)
      found.problems.append(Problem(piece.file, number, reason))
      continue
    if one is None:
      empty += 1
    else:
      found.documents.append(Document(*one, piece.file, number))
  return found._replace(empty=empty)


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


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A file that is being read, and what it holds."""

  one: Input
  file: BinaryIO
  packing: packings.Packing | None
  content: contents.Content
  head: bytes
  rest: Iterator[bytes]

  @property
  def whole(self) -> bool:
    """Whether the head is the whole content."""
    return len(self.head) < contents.HEAD_BYTES

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
      raise _changed(self.one)


@contextlib.contextmanager
def _opened(one: Input) -> Iterator[_Opened]:
  """Opens a file and finds out what it holds; failures inside name the file."""
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
      content = contents.recognize(
        one.name,
        packing,
        head[: contents.HEAD_BYTES],
        whole=len(head) < contents.HEAD_BYTES,
      )
      yield _Opened(one, file, packing, content, head, rest)
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


def _read_whole(
  file: _Opened, start: Place, max_document_bytes: int
) -> Iterator[Piece]:
  """The piece of one text, or of a file that holds something else."""
  if start.line:
    return
  one, end = file.one, start._replace(line=1)
  text: bytes | str = file.content.problem or _text(file, max_document_bytes)
  if isinstance(text, str):
    yield Piece(b"", start.file, 0, one.source, end, one.size, text)
    return
  crc = zlib.crc32(text, start.crc)
  end = Place(start.file, len(text), 1, crc)
  yield Piece(text, start.file, 0, one.source, end, one.size)


def _text(file: _Opened, max_document_bytes: int) -> bytes | str:
  """The content of a file, or the reason why it cannot be read."""
  too_long = _too_long(max_document_bytes)
  if file.packing is None and file.one.size > max_document_bytes:
    return too_long
  most = file.one.size if file.packing is None else max_document_bytes
  parts, size = [], 0
  try:
    # In one part, or until there is more than allowed.
    for part in file.parts(0, most + 1):
      parts.append(part)
      size += len(part)
      if size > max_document_bytes:
        return too_long
  except packings.UnreadableError as error:
    if file.content.lines:
      raise
    return str(error)
  return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_lines(
  file: _Opened, start: Place, piece_bytes: int, max_document_bytes: int
) -> Iterator[Piece]:
  seen = start
  source = file.one.source
  tail: list[bytes] = []
  dropping = False
  for data in file.parts(start.offset, piece_bytes):
    raw = file.file.tell()
    if dropping:
      first = data.find(b"\n") + 1
      seen = _behind(seen, data[:first] if first else data)
      if not first:
        continue
      problem = _too_long(max_document_bytes)
      yield Piece(b"", seen.file, seen.line, source, seen, raw, problem)
      data, dropping = data[first:], False
    cut = data.rfind(b"\n") + 1
    if cut:
      whole, line = b"".join((*tail, data[:cut])), seen.line + 1
      seen = _behind(seen, data[:cut])
      yield Piece(whole, seen.file, line, source, seen, raw)
      tail = []
    tail.append(data[cut:])
    seen = _behind(seen, data[cut:])
    if sum(map(len, tail)) > max_document_bytes:
      tail, dropping = [], True
  whole, line = b"".join(tail), seen.line + 1
  if whole or dropping:
    problem = _too_long(max_document_bytes) if dropping else None
    end = seen._replace(line=line)
    yield Piece(whole, end.file, line, source, end, file.one.size, problem)


def _behind(place: Place, data: bytes) -> Place:
  return Place(
    place.file,
    place.offset + len(data),
    place.line + data.count(b"\n"),
    zlib.crc32(data, place.crc),
  )


def _changed(one: Input) -> UserError:
  return UserError(
    f"{one.path} changed while it was read: it had {one.size} bytes before; "
    "prepare it once it is complete."
  )


def _too_long(max_document_bytes: int) -> str:
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


def _parse_text(piece: Piece) -> Parsed:
  data = piece.data.removeprefix(_BOM)
  if not data:
    return Parsed([], [Problem(piece.file, 0, _EMPTY_FILE)])
  try:
    data.decode()
  except UnicodeDecodeError as error:
    reason = json_lines.reason(error)
    return Parsed([], [Problem(piece.file, 0, reason)])
  return Parsed([Document(data, piece.source, piece.file, 0)], [])


def _decoded_lines(
  data: bytes, max_document_bytes: int
) -> Iterator[str | ValueError]:
  """The lines, decoded for `json_lines`; one that is too long is an error."""
  data = data.removesuffix(b"\n")
  if len(data) <= max_document_bytes:
    with contextlib.suppress(UnicodeDecodeError):
      # splitlines would also cut at other separators, which JSON strings hold.
      return iter(data.decode().split("\n"))
  return (_decoded(line, max_document_bytes) for line in data.split(b"\n"))


def _decoded(line: bytes, max_document_bytes: int) -> str | ValueError:
  if len(line) > max_document_bytes:
    return ValueError(_too_long(max_document_bytes))
  return line.decode(errors="surrogateescape")
