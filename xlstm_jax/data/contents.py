"""What a file holds, by its first bytes: JSON lines, a text, or another format.

The table of formats says what first bytes and names mean. Between JSON lines
and a text a name decides only where it is plain: .jsonl and the like are JSON
lines, .json is never a text.
"""

import codecs
from typing import NamedTuple

from xlstm_jax.data import json_lines, packings
from xlstm_jax.data.readers import table
from xlstm_jax.data.readers.table import JSON_LINES, TEXT, Format

# Number of bytes that decide, after unpacking.
HEAD_BYTES = 2**20


class Content(NamedTuple):
  """As what a file is read, or why it cannot be."""

  format: Format
  problem: str | None = None


def recognize(
  name: str, packing: packings.Packing | None, head: bytes, *, whole: bool
) -> Content:
  """What a file holds.

  Args:
    name: the file's name.
    packing: the file's packing, by its first bytes.
    head: the first `HEAD_BYTES` after unpacking.
    whole: whether `head` is the whole file.
  """
  lower = name.lower()
  named = packings.of_name(lower)
  stem = lower
  if named:
    suffix = next(s for s in named.suffixes if lower.endswith(s))
    stem = lower.removesuffix(suffix)
  lines = stem.endswith(JSON_LINES.suffixes)
  json = stem.endswith(".json")
  named_format = JSON_LINES if lines else TEXT
  found = table.by_name(stem)
  if found is None and (again := packings.of(head)):
    problem = f"packed twice: unpack it once, with {again.command}"
    return Content(named_format, problem)
  if found := found or table.by_content(head):
    if found.reader is None:
      return Content(named_format, f"{found.name}: {found.advice}")
    return Content(found)
  if not head:
    return Content(JSON_LINES if lines or json else TEXT)
  text = head.decode(errors="surrogateescape")
  if json_lines.are_in(text, cut=not whole, expected=lines or json):
    return Content(JSON_LINES)
  if named and packing is None and not _is_text(head):
    return Content(
      named_format,
      f"no {named.name} file, as its name says, and no text: damaged",
    )
  return _of_json(text, packing) if json else Content(named_format)


def _is_text(head: bytes) -> bool:
  # An incremental decoder, because the head may end inside a character.
  try:
    text = codecs.getincrementaldecoder("utf-8")().decode(head)
  except UnicodeDecodeError:
    return False
  return "\0" not in text


def _of_json(text: str, packing: packings.Packing | None) -> Content:
  """What a .json file holds that does not begin like JSON lines."""
  first = text.lstrip("\ufeff \t\r\n")[:1]
  if not first:
    return Content(JSON_LINES)
  read = f"{packing.command} FILE | jq -c" if packing else "jq -c"
  file = "" if packing else " FILE"
  if first == "[":
    problem = (
      "one JSON array, not a document a line: turn it into lines, as with "
      f"{read} '.[]'{file}"
    )
  elif first == "{":
    problem = (
      "one JSON object over several lines, not a document a line: make it one "
      f"line, as with {read} .{file}, or rename it to .txt if it is a text"
    )
  else:
    problem = "named .json, but not JSON lines: rename it if it is a text"
  return Content(TEXT, problem)
