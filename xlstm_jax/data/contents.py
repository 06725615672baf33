"""What a file holds, by its first bytes: JSON lines, a text, or neither.

A file's name decides only between the two that are read, and only if it is
clear: .jsonl and the like are JSON lines, and .json is never a text.
"""

import codecs
import re
from typing import NamedTuple

from xlstm_jax.data import json_lines, packings

# Number of bytes that decide, after unpacking.
HEAD_BYTES = 2**20

_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".jl")
# Formats that are neither JSON lines nor text: the first bytes, the name, and
# advice.
_OTHERS = tuple(
  (re.compile(magic, re.DOTALL), f"{name}: {advice}")
  for magic, name, advice in (
    (
      rb"PAR[1E][\x00-\x08\x0e-\x1f]",
      "a Parquet file",
      "turn it into JSON lines, as with "
      "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)",
    ),
    (
      rb"ARROW1\0|\xff\xff\xff\xff",
      "an Arrow file",
      "turn it into JSON lines, as with "
      "datasets.Dataset.from_file(FILE).to_json(OUT)",
    ),
    (rb"Obj\x01", "an Avro file", "turn it into JSON lines"),
    (rb"ORC[\x00-\x08\x0e-\x1f]", "an ORC file", "turn it into JSON lines"),
    (rb"\x89HDF\r\n", "an HDF5 file", "turn it into JSON lines"),
    (rb"SQLite format 3\0", "an SQLite database", "turn it into JSON lines"),
    (rb"WARC/\d", "a WARC file", "turn it into JSON lines, a record each"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive", "unpack it first"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (rb".{257}ustar", "a tar archive", "unpack it first, with tar -xf"),
    (rb"\x04\x22\x4d\x18", "an lz4 file", "unpack it first, with lz4 -d"),
    (rb"\xff\x06\0\0sNaPpY", "a snappy file", "unpack it first"),
    (rb"\x1f\x9d", "a .Z file", "unpack it first, with uncompress"),
    (
      rb"\xff\xfe|\xfe\xff",
      "UTF-16",
      "turn it into UTF-8, as with iconv -f UTF-16 -t UTF-8",
    ),
    (
      rb"version https://git-lfs\.github\.com/spec/",
      "a pointer of Git LFS, not the file itself",
      "fetch that, with git lfs pull",
    ),
  )
)


class Content(NamedTuple):
  """Whether a file is read as JSON lines or as one text, or why as neither."""

  lines: bool
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
  lines, json = stem.endswith(_LINES), stem.endswith(".json")
  if head and (problem := _other_format(head)):
    return Content(lines, problem)
  if not head:
    return Content(lines or json)
  text = head.decode(errors="surrogateescape")
  if json_lines.are_in(text, cut=not whole, expected=lines or json):
    return Content(lines=True)
  if named and packing is None and not _is_text(head):
    return Content(
      lines, f"no {named.name} file, as its name says, and no text: damaged"
    )
  if lines:
    return Content(lines)
  return _of_json(text, packing) if json else Content(lines=False)


def _other_format(head: bytes) -> str | None:
  if again := packings.of(head):
    return f"packed twice: unpack it once, with {again.command}"
  return next((what for magic, what in _OTHERS if magic.match(head)), None)


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
    return Content(lines=True)
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
  return Content(lines=False, problem=problem)
