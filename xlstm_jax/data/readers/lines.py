"""JSON lines: units of whole lines, a document a line."""

import contextlib
import zlib
from collections.abc import Iterator

from xlstm_jax.data import json_lines
from xlstm_jax.data.readers.reader import (
  EMPTY_FILE,
  Document,
  OpenFile,
  Parsed,
  Place,
  Problem,
  Reader,
  Unit,
  crc_of_bytes,
  too_long,
)


class Lines(Reader):
  """Reads JSON lines."""

  def units(
    self,
    file: OpenFile,
    start: Place,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ) -> Iterator[Unit]:
    source, size = file.one.source, file.one.size
    if not file.head:
      if not start.line:
        # Also where nothing can be unpacked, which this raises.
        for _ in file.parts(0, unit_bytes):
          pass
        end = start._replace(line=1)
        yield Unit(b"", start.file, 0, source, end, size, self, EMPTY_FILE)
      return
    seen = start
    tail: list[bytes] = []
    dropping = False
    problem = too_long(max_document_bytes)
    for data in file.parts(start.offset, unit_bytes):
      raw = file.file.tell()
      if dropping:
        first = data.find(b"\n") + 1
        seen = _after(seen, data[:first] if first else data)
        if not first:
          continue
        yield Unit(b"", seen.file, seen.line, source, seen, raw, self, problem)
        data, dropping = data[first:], False
      cut = data.rfind(b"\n") + 1
      if cut:
        whole, line = b"".join((*tail, data[:cut])), seen.line + 1
        seen = _after(seen, data[:cut])
        yield Unit(whole, seen.file, line, source, seen, raw, self)
        tail = []
      tail.append(data[cut:])
      seen = _after(seen, data[cut:])
      if sum(map(len, tail)) > max_document_bytes:
        tail, dropping = [], True
    whole, line = b"".join(tail), seen.line + 1
    if whole or dropping:
      end = seen._replace(line=line)
      left_out = problem if dropping else None
      yield Unit(whole, end.file, line, source, end, size, self, left_out)

  def documents(self, unit: Unit, *, max_document_bytes: int) -> Parsed:
    found = Parsed([], [])
    empty = 0
    for number, line in enumerate(
      _decoded_lines(unit.data, max_document_bytes), unit.line
    ):
      try:
        if isinstance(line, ValueError):
          raise line
        one = json_lines.document(line, unit.source)
      except ValueError as error:
        reason = json_lines.reason(error)
        found.problems.append(Problem(unit.file, number, reason))
        continue
      if one is None:
        empty += 1
      else:
        found.documents.append(Document(*one, unit.file, number))
    return found._replace(empty=empty)

  def checksum(
    self,
    file: OpenFile,
    start: Place,
    stop: Place | None,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ) -> int:
    """By bytes, for a reading that went on cut other units."""
    del max_document_bytes
    return crc_of_bytes(file, start, stop, part_bytes=unit_bytes)


def _after(place: Place, data: bytes) -> Place:
  return Place(
    place.file,
    place.offset + len(data),
    place.line + data.count(b"\n"),
    zlib.crc32(data, place.crc),
  )


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
    return ValueError(too_long(max_document_bytes))
  return line.decode(errors="surrogateescape")
