"""Lines of JSON with a document each, of which only the text counts.

Everything else in a line is metadata, and none of it costs a document: long
numbers, duplicate keys, NaN, control characters, bytes that are not UTF-8 and
any depth of nesting are ignored.
"""

import contextlib
import json
import re
from typing import Any

from xlstm_jax.data import format as files

SOURCE_KEY = "redpajama_set_name"

# Python refuses integers of 4301 digits, and nobody needs these numbers.
_DECODER = json.JSONDecoder(strict=False, parse_int=float)
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
# The text of a document is at depth 1, the name of its source at depth 2.
_KEPT_DEPTH = 50
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# The characters that "surrogateescape" makes from bytes that are not UTF-8.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_TEXT_KEY = re.compile(r'"text"\s*:\s*"')


def document(line: str, source: str) -> tuple[bytes, str] | None:
  """The UTF-8 text of a line and its source; None if there is no text.

  Args:
    line: the line, decoded with "surrogateescape" for bytes that are not UTF-8.
    source: the source of a document that names none, or no valid one.

  Raises:
    ValueError: the line has no readable text; `reason` says why in words.
  """
  line = line.lstrip("\ufeff")
  if not line or line.isspace():
    return None
  value = _decoded(line)
  if not isinstance(value, dict):
    raise ValueError("not a JSON object")
  text = value.get("text")
  if not isinstance(text, str):
    raise ValueError('no "text" that is a string')
  if not text:
    return None
  meta = value.get("meta")
  if isinstance(meta, dict) and SOURCE_KEY in meta:
    with contextlib.suppress(ValueError):
      source = source_name(meta[SOURCE_KEY])
  return _encoded(text, line), source


def source_name(name: object) -> str:
  """Checks the name of a source; a ValueError says what is wrong."""
  if not isinstance(name, str) or not name or not name.isprintable():
    raise ValueError(f"the source {str(name)[:40]!r} is not a printable name")
  if len(name) > files.MAX_SOURCE_NAME:
    raise ValueError(
      f"the source name is longer than {files.MAX_SOURCE_NAME} characters"
    )
  return name


def reason(error: ValueError) -> str:
  """What is wrong with a line, in a few words."""
  match error:
    case json.JSONDecodeError():
      return f"not JSON: {error.msg} at column {error.colno}"
    case UnicodeDecodeError():
      return f"not UTF-8: {error.reason}"
  return str(error)


def are_in(head: str, *, cut: bool, expected: bool) -> bool:
  """Whether a file is JSON lines, by its beginning.

  It is if one of its first two lines is a JSON object. Two lines are looked at,
  so that a broken one does not decide. If the name does not say JSON, the
  object must have a text, or both lines must be objects, because a single
  object may be a text of its own.

  Args:
    head: the beginning of the file.
    cut: whether the file continues after `head`.
    expected: whether the name says that it is JSON.
  """
  head = head.lstrip("\ufeff \t\r\n")
  if not head.startswith("{"):
    return False
  lines = [line for line in head.split("\n") if line.strip("\ufeff \t\r")][:2]
  texts = []
  for line in lines:
    if cut and head.endswith(line):
      # Such a long object in one line is a JSON line, perhaps the only one.
      texts += [bool(_TEXT_KEY.search(line))] if line.startswith("{") else []
      continue
    with contextlib.suppress(ValueError):
      value = _decoded(line)
      if isinstance(value, dict):
        texts.append(isinstance(value.get("text"), str))
  return bool(texts) and (expected or any(texts) or len(texts) == 2)


def _decoded(line: str) -> Any:
  try:
    return _DECODER.decode(line)
  except json.JSONDecodeError:
    _refuse_other_encodings(line)
    raise
  except RecursionError:
    return _DECODER.decode(_flattened(line))


def _flattened(line: str) -> str:
  """A line of JSON with null for whatever is nested too deeply."""
  parts, depth, kept = [], 0, 0
  for match in _TOKEN.finditer(line):
    if match[0] in "[{":
      depth += 1
      if depth == _KEPT_DEPTH:
        parts += line[kept : match.start()], "null"
    elif match[0] in "]}":
      if depth == _KEPT_DEPTH:
        kept = match.end()
      depth -= 1
  if depth >= _KEPT_DEPTH:
    # The nesting never closes, so this does not parse.
    kept = len(line)
  return "".join((*parts, line[kept:]))


def _encoded(text: str, line: str) -> bytes:
  try:
    return text.encode()
  except UnicodeEncodeError:
    if _NOT_UTF8.search(text):
      _refuse_other_encodings(line)
    # Half an emoji, where somebody cut a text; the rest can be read.
    return _LONE_SURROGATE.sub("\ufffd", text).encode()


def _refuse_other_encodings(line: str) -> None:
  """Raises the UnicodeDecodeError of a line that was not UTF-8."""
  if _NOT_UTF8.search(line):
    line.encode(errors="surrogateescape").decode()
