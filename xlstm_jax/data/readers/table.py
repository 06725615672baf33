"""The formats of files: how each is known, and its reader or what to do.

A format with `magic` is known by its first bytes alone, after unpacking; one
with neither magic nor a place in `contents` by the suffix of its name.
"""

import re
from typing import NamedTuple

from xlstm_jax.data.readers.lines import Lines
from xlstm_jax.data.readers.reader import Reader
from xlstm_jax.data.readers.text import Text


class Format(NamedTuple):
  """A row.

  Attributes:
    name: As a sentence calls it, "a Parquet file".
    suffixes: Of its names, in lower case, before that of a packing.
    magic: A pattern of the first bytes.
    reader: Reads it; None where nothing here does.
    advice: What to do with it then.
  """

  name: str
  suffixes: tuple[str, ...] = ()
  magic: bytes | None = None
  reader: Reader | None = None
  advice: str = ""

  def begins(self, head: bytes) -> bool:
    """Whether these are its first bytes."""
    if self.magic is None:
      return False
    return re.match(self.magic, head, re.DOTALL) is not None


# `contents` tells these two apart, by what a file holds more than by its name.
JSON_LINES = Format(
  "JSON lines",
  suffixes=(".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".jl"),
  reader=Lines(),
)
TEXT = Format("a text", reader=Text())

FORMATS: list[Format] = [
  Format(
    "a Parquet file",
    magic=rb"PAR[1E][\x00-\x08\x0e-\x1f]",
    advice="turn it into JSON lines, as with "
    "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)",
  ),
  Format(
    "an Arrow file",
    magic=rb"ARROW1\0|\xff\xff\xff\xff",
    advice="turn it into JSON lines, as with "
    "datasets.Dataset.from_file(FILE).to_json(OUT)",
  ),
  Format("an Avro file", magic=rb"Obj\x01", advice="turn it into JSON lines"),
  Format(
    "an ORC file",
    magic=rb"ORC[\x00-\x08\x0e-\x1f]",
    advice="turn it into JSON lines",
  ),
  Format(
    "an HDF5 file", magic=rb"\x89HDF\r\n", advice="turn it into JSON lines"
  ),
  Format(
    "an SQLite database",
    magic=rb"SQLite format 3\0",
    advice="turn it into JSON lines",
  ),
  Format(
    "a WARC file",
    magic=rb"WARC/\d",
    advice="turn it into JSON lines, a record each",
  ),
  Format(
    "a zip archive",
    magic=rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    advice="unpack it first",
  ),
  Format(
    "a 7-Zip archive", magic=rb"7z\xbc\xaf\x27\x1c", advice="unpack it first"
  ),
  Format("a RAR archive", magic=rb"Rar!\x1a\x07", advice="unpack it first"),
  Format(
    "a tar archive",
    magic=rb".{257}ustar",
    advice="unpack it first, with tar -xf",
  ),
  Format(
    "an lz4 file",
    magic=rb"\x04\x22\x4d\x18",
    advice="unpack it first, with lz4 -d",
  ),
  Format(
    "a snappy file", magic=rb"\xff\x06\0\0sNaPpY", advice="unpack it first"
  ),
  Format(
    "a .Z file", magic=rb"\x1f\x9d", advice="unpack it first, with uncompress"
  ),
  Format(
    "UTF-16",
    magic=rb"\xff\xfe|\xfe\xff",
    advice="turn it into UTF-8, as with iconv -f UTF-16 -t UTF-8",
  ),
  Format(
    "a pointer of Git LFS, not the file itself",
    magic=rb"version https://git-lfs\.github\.com/spec/",
    advice="fetch that, with git lfs pull",
  ),
]


def by_content(head: bytes) -> Format | None:
  """The format whose first bytes these are."""
  return next((row for row in FORMATS if row.begins(head)), None)


def by_name(stem: str) -> Format | None:
  """The format that only names tell, by one in lower case without packing."""
  return next(
    (
      row
      for row in FORMATS
      if row.magic is None and stem.endswith(row.suffixes)
    ),
    None,
  )
