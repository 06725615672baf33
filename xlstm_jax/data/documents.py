"""Reading documents: JSON lines, plain or compressed, and plain-text files.

Reading is a stream of pieces of bounded size, each with the place behind it, so
that it can stop anywhere and go on from there. Pieces are cut into documents by
`parse`, which other processes may run.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import zstandard

from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError

DEFAULT_SOURCE = "default"
SOURCE_KEY = "redpajama_set_name"
LINE_SUFFIXES = tuple(
  f"{suffix}{packed}"
  for suffix in (".jsonl", ".ndjson")
  for packed in ("", ".gz", ".zst")
)

# One zstd block of 4 bytes can hold 128 KiB: what is fed at once bounds what
# comes out at once, here 128 MiB from a file made to do harm.
_ZSTD_READ_BYTES = 4096
_CRC_BYTES = 2**22
_EMPTY_FILE = "empty file"
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Input:
  """One file to read, found through the `argument`-th input of the user."""

  argument: int
  path: str
  name: str
  source: str
  size: int
  mtime_ns: int

  @property
  def lines(self) -> bool:
    """Whether it holds a JSON document a line, or is one text."""
    return self.path.lower().endswith(LINE_SUFFIXES)

  @property
  def json(self) -> bool:
    """Whether its name says that it is one JSON value, not one a line."""
    return self.path.lower().endswith((".json", ".json.gz", ".json.zst"))


class Inputs(NamedTuple):
  """The files to read, in order, and how many others were passed over."""

  files: list[Input]
  hidden: int
  links: int


class Place(NamedTuple):
  """How far the inputs were read: `line` lines and `offset` bytes of a file.

  Offsets count decompressed bytes; `crc` is the CRC32 of all content so far.
  """

  file: int = 0
  offset: int = 0
  line: int = 0
  crc: int = 0


class Piece(NamedTuple):
  """Whole lines of one file, or one text; `problem` replaces unread data.

  `line` numbers the first line from 1 and is 0 for a text. `end` is the place
  behind the piece, `raw` the bytes of the file read for it so far.
  """

  data: bytes
  file: int
  line: int
  source: str
  end: Place
  raw: int
  problem: str | None = None


class Document(NamedTuple):
  """The UTF-8 text of one document, and where it came from."""

  text: bytes
  source: str
  file: int
  line: int


class Problem(NamedTuple):
  """Why a document was skipped; `line` is 0 for a text file."""

  file: int
  line: int
  reason: str

  @property
  def harmless(self) -> bool:
    """Whether nothing was lost: an empty file has no text to lose."""
    return self.reason == _EMPTY_FILE


def find(arguments: Sequence[str]) -> Inputs:
  """The files that `PATH` or `SOURCE=PATH` arguments name, folders sorted.

  Hidden entries and symbolic links inside folders are passed over and counted.

  Raises:
    UserError: a path does not exist, is neither a file nor a folder, is given
      twice, names a JSON file, or no file is found.
  """
  found = Inputs([], 0, 0)
  for number, argument in enumerate(arguments):
    source, path = split_argument(argument)
    if os.path.isdir(path):
      found = _find_in_folder(found, number, source, path)
    else:
      one = _input(number, source, path, os.path.basename(path))
      _refuse_json(one)
      found.files.append(one)
  if not found.files:
    raise UserError(
      f"There is no file to read in {', '.join(arguments)} (passed over: "
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

  A piece has about `piece_bytes`, more only for a longer document. Lines and
  texts over `max_document_bytes` are not kept: their piece states the problem.

  Raises:
    UserError: a file cannot be read, or its compression is damaged.
  """
  place = start
  for number in range(start.file, len(inputs)):
    one = inputs[number]
    if number != place.file:
      place = Place(number, 0, 0, place.crc)
    reader = _read_lines if one.lines else _read_text
    for piece in reader(one, place, piece_bytes, max_document_bytes):
      place = piece.end
      yield piece


def content_crc(
  inputs: Sequence[Input], place: Place, *, max_document_bytes: int
) -> int:
  """The CRC32 that a reader has at `place`, from reading all again."""
  crc = 0
  for number, one in enumerate(inputs[: place.file + 1]):
    if not one.lines and one.size > max_document_bytes:
      continue
    left = place.offset if number == place.file else None
    for data, _ in _content(one, 0, _CRC_BYTES):
      part = data[:left]
      crc = zlib.crc32(part, crc)
      left = None if left is None else left - len(part)
  return crc


def parse(
  piece: Piece, *, max_document_bytes: int
) -> tuple[list[Document], list[Problem]]:
  """Cuts a piece into its documents and what cannot be one."""
  if piece.problem:
    return [], [Problem(piece.file, piece.line, piece.problem)]
  data = piece.data
  if piece.line <= 1:
    data = data.removeprefix(_BOM)
  if piece.line == 0:
    try:
      data.decode()
    except UnicodeDecodeError as error:
      return [], [Problem(piece.file, 0, f"not UTF-8: {error.reason}")]
    if not data:
      return [], [Problem(piece.file, 0, _EMPTY_FILE)]
    return [Document(data, piece.source, piece.file, 0)], []
  documents, problems = [], []
  for number, line in enumerate(
    _decoded_lines(data, max_document_bytes), piece.line
  ):
    try:
      text, source = _document(line, piece.source)
      documents.append(Document(text, source, piece.file, number))
    except (ValueError, RecursionError) as error:
      problems.append(Problem(piece.file, number, _reason(error)))
  return documents, problems


def source_name(name: object) -> str:
  """Checks the name of a source; raises ValueError saying what is wrong."""
  if not isinstance(name, str) or not name or not name.isprintable():
    raise ValueError(f"the source {str(name)[:40]!r} is not a printable name")
  if len(name) > files.MAX_SOURCE_NAME:
    raise ValueError(
      f"the source name is longer than {files.MAX_SOURCE_NAME} characters"
    )
  return name


def split_argument(argument: str) -> tuple[str, str]:
  """The source and the path of `PATH` or `SOURCE=PATH`."""
  if os.path.exists(argument):
    return DEFAULT_SOURCE, argument
  name, separator, path = argument.partition("=")
  if not separator or not os.path.exists(path):
    raise UserError(f"There is no file or folder {path or argument}.")
  try:
    return source_name(name), path
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
    raise UserError(f"{path} is neither a regular file nor a folder.")
  return Input(number, path, name, source, status.st_size, status.st_mtime_ns)


def _refuse_json(one: Input) -> None:
  if one.json:
    raise UserError(
      f"{one.path} ends in .json and would be read as one text, JSON and all: "
      "rename it to .jsonl if it holds a document a line, else turn it into "
      "that, for example with jq -c '.[]'."
    )


def _refuse_duplicates(inputs: Iterable[Input]) -> None:
  seen: set[str] = set()
  for one in inputs:
    path = os.path.realpath(one.path)
    if path in seen:
      raise UserError(f"{one.path} is among the inputs twice.")
    seen.add(path)


def _read_text(
  one: Input, start: Place, piece_bytes: int, max_document_bytes: int
) -> Iterator[Piece]:
  del piece_bytes
  if start.line:
    return
  if one.size > max_document_bytes:
    end = start._replace(line=1)
    problem = _too_long(max_document_bytes)
    yield Piece(b"", start.file, 0, one.source, end, one.size, problem)
    return
  try:
    data = Path(one.path).read_bytes()
  except OSError as error:
    raise UserError(f"Cannot read {one.path}: {error.strerror}.") from error
  if len(data) != one.size:
    raise _changed(one)
  end = Place(start.file, len(data), 1, zlib.crc32(data, start.crc))
  yield Piece(data, start.file, 0, one.source, end, len(data))


def _read_lines(
  one: Input, start: Place, piece_bytes: int, max_document_bytes: int
) -> Iterator[Piece]:
  seen = start
  tail: list[bytes] = []
  dropping = False
  for data, raw in _content(one, start.offset, piece_bytes):
    if dropping:
      first = data.find(b"\n") + 1
      seen = _behind(seen, data[:first] if first else data)
      if not first:
        continue
      problem = _too_long(max_document_bytes)
      yield Piece(b"", seen.file, seen.line, one.source, seen, raw, problem)
      data, dropping = data[first:], False
    cut = data.rfind(b"\n") + 1
    if cut:
      whole, line = b"".join((*tail, data[:cut])), seen.line + 1
      seen = _behind(seen, data[:cut])
      yield Piece(whole, seen.file, line, one.source, seen, raw)
      tail = []
    tail.append(data[cut:])
    seen = _behind(seen, data[cut:])
    if sum(map(len, tail)) > max_document_bytes:
      tail, dropping = [], True
  whole, line = b"".join(tail), seen.line + 1
  if whole or dropping:
    problem = _too_long(max_document_bytes) if dropping else None
    end = seen._replace(line=line)
    yield Piece(whole, end.file, line, one.source, end, one.size, problem)


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


def _content(
  one: Input, offset: int, piece_bytes: int
) -> Iterator[tuple[bytes, int]]:
  """Decompressed content from `offset` on, and the bytes of the file read."""
  try:
    with open(one.path, "rb") as file:
      parts: list[bytes] = []
      held = 0
      for part in _decompressed(one, file, offset, piece_bytes):
        parts.append(part)
        held += len(part)
        if held >= piece_bytes:
          yield b"".join(parts), file.tell()
          parts, held = [], 0
      yield b"".join(parts), file.tell()
      if file.tell() != one.size:
        raise _changed(one)
  except (EOFError, zlib.error, zstandard.ZstdError) as error:
    raise UserError(f"{one.path} is truncated or damaged: {error}.") from error
  except OSError as error:
    raise UserError(
      f"Cannot read {one.path}: {error.strerror or error}."
    ) from error


def _decompressed(
  one: Input, file: BinaryIO, offset: int, piece_bytes: int
) -> Iterator[bytes]:
  path = one.path.lower()
  if one.lines and path.endswith(".gz"):
    with gzip.open(file) as stream:
      yield from _skip(_reads(stream, piece_bytes), offset)
  elif one.lines and path.endswith(".zst"):
    yield from _skip(_zstd(file), offset)
  else:
    file.seek(offset)
    yield from _reads(file, piece_bytes)


def _reads(file: IO[bytes] | gzip.GzipFile, size: int) -> Iterator[bytes]:
  return iter(lambda: file.read(size), b"")


def _zstd(file: BinaryIO) -> Iterator[bytes]:
  # Not `stream_reader`: it takes the end of a truncated file for the end.
  decompressor = zstandard.ZstdDecompressor()
  frame = None
  for data in _reads(file, _ZSTD_READ_BYTES):
    while data:
      frame = frame or decompressor.decompressobj()
      yield frame.decompress(data)
      data = frame.unused_data if frame.eof else b""
      frame = None if frame.eof else frame
  if frame:
    raise EOFError("the file ends inside a zstd frame")


def _skip(parts: Iterable[bytes], count: int) -> Iterator[bytes]:
  for part in parts:
    yield part[count:]
    count = max(0, count - len(part))


def _decoded_lines(
  data: bytes, max_document_bytes: int
) -> Iterator[str | ValueError]:
  """The lines as text; one that is too long or not UTF-8 as an error."""
  data = data.removesuffix(b"\n")
  if len(data) <= max_document_bytes:
    with contextlib.suppress(UnicodeDecodeError):
      # Not splitlines: JSON strings may hold the other line separators.
      return iter(data.decode().split("\n"))
  return (_decoded(line, max_document_bytes) for line in data.split(b"\n"))


def _decoded(line: bytes, max_document_bytes: int) -> str | ValueError:
  if len(line) > max_document_bytes:
    return ValueError(_too_long(max_document_bytes))
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    return error


def _document(line: str | ValueError, source: str) -> tuple[bytes, str]:
  if isinstance(line, ValueError):
    raise line
  if not line or line.isspace():
    raise ValueError("empty line")
  value = json.loads(line)
  if not isinstance(value, dict):
    raise ValueError("not a JSON object")
  text = value.get("text")
  if not isinstance(text, str):
    raise ValueError('no "text" that is a string')
  if not text:
    raise ValueError("empty text")
  meta = value.get("meta")
  if meta is not None and not isinstance(meta, dict):
    raise ValueError('"meta" is not an object')
  if meta and SOURCE_KEY in meta:
    source = source_name(meta[SOURCE_KEY])
  return text.encode(), source


def _reason(error: ValueError | RecursionError) -> str:
  match error:
    case json.JSONDecodeError():
      return f"not JSON: {error.msg} at column {error.colno}"
    case UnicodeDecodeError():
      return f"not UTF-8: {error.reason}"
    case UnicodeEncodeError():
      return "a lone surrogate, which no UTF-8 text can hold"
    case RecursionError():
      return "nested too deeply"
  return str(error)
