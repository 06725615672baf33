"""A file that is one text: one unit, one document."""

import zlib
from collections.abc import Iterator

from xlstm_jax.data import json_lines, packings
from xlstm_jax.data.readers.reader import (
  EMPTY_FILE,
  Document,
  OpenFile,
  Parsed,
  Place,
  Problem,
  Reader,
  Unit,
  too_long,
)

_BOM = b"\xef\xbb\xbf"


class Text(Reader):
  """Reads one text."""

  def units(
    self,
    file: OpenFile,
    start: Place,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ) -> Iterator[Unit]:
    del unit_bytes
    if start.line:
      return
    one, end = file.one, start._replace(line=1)
    text = _text(file, max_document_bytes)
    if isinstance(text, str):
      yield Unit(b"", start.file, 0, one.source, end, one.size, self, text)
      return
    crc = zlib.crc32(text, start.crc)
    end = Place(start.file, len(text), 1, crc)
    yield Unit(text, start.file, 0, one.source, end, one.size, self)

  def documents(self, unit: Unit, *, max_document_bytes: int) -> Parsed:
    del max_document_bytes
    data = unit.data.removeprefix(_BOM)
    if not data:
      return Parsed([], [Problem(unit.file, 0, EMPTY_FILE)])
    try:
      data.decode()
    except UnicodeDecodeError as error:
      reason = json_lines.reason(error)
      return Parsed([], [Problem(unit.file, 0, reason)])
    return Parsed([Document(data, unit.source, unit.file, 0)], [])


def _text(file: OpenFile, max_document_bytes: int) -> bytes | str:
  """The content of a file, or the reason why it cannot be read."""
  if file.packing is None and file.one.size > max_document_bytes:
    return too_long(max_document_bytes)
  most = file.one.size if file.packing is None else max_document_bytes
  parts, size = [], 0
  try:
    # In one part, or until there is more than allowed.
    for part in file.parts(0, most + 1):
      parts.append(part)
      size += len(part)
      if size > max_document_bytes:
        return too_long(max_document_bytes)
  except packings.UnreadableError as error:
    return str(error)
  return parts[0] if len(parts) == 1 else b"".join(parts)
