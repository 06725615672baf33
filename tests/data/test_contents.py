"""What files are read as: by what they hold, and what is said of the others."""

import io
import json
import re
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest

from xlstm_jax.data import contents, packings
from xlstm_jax.data.readers.table import JSON_LINES, TEXT

LINES = b'{"text": "a", "meta": {}}\n{"text": "b"}\n'
PRETTY = json.dumps({"data": [{"text": "a"}], "n": 1}, indent=2).encode()
HEAD = contents.HEAD_BYTES


def recognize(name: str, data: bytes, packed: str = "") -> contents.Content:
  packing = packings.of_name(packed)
  return contents.recognize(name, packing, data[:HEAD], whole=len(data) < HEAD)


@pytest.mark.parametrize(
  "name",
  [
    "a.jsonl", "a.NDJSON", "a.jsonlines", "a.jsonl.xz", "a.json", "a.json.gz",
    "a.txt", "a.txt.bz2", "part-00000", "part-00000.gz", "stdin", "caf\udce9",
  ],
)  # fmt: skip
@pytest.mark.parametrize(
  "data",
  [
    LINES,
    b'{"text": "a"}',
    b"\xef\xbb\xbf\r\n \n" + LINES.replace(b"\n", b"\r\n"),
    b'{"text": "broken\n' + LINES,
    b'{"id": "\xe9", "text": "a"}\n',
    b'{"a": ' + b"[" * 3_000 + b"]" * 3_000 + b', "text": "a"}\n',
    b'{"text": "' + b"a" * HEAD,
    b'{"content": 1}\n{"content": 2}\n',
  ],
)
def test_json_lines_are_never_one_text(name: str, data: bytes):
  assert recognize(name, data) == (JSON_LINES, None)


@pytest.mark.parametrize(
  ("name", "data"),
  [
    ("a.txt", b"text\n" + LINES),
    ("a.py", b"{1: 2}\n"),
    ("a.c", b"{\n}\n"),
    ("a.geojson", b'{"features": [{"text": 3}]}'),
    ("a.geojson", b'{"features": ["' + b"a" * HEAD),
    ("a.ipynb", PRETTY),
    ("a.txt", b"PARTS of a text, ORCs, PK and Obj; Rar! BZh9"),
    ("a.txt", b"BZh9"),
    ("a.txt", b"caf\xe9"),
    ("a.txt.gz", b"unpacked on its way"),
    ("a.txt.gz", "half a character at the end of the head ü".encode()[:-1]),
    ("a.txt", b""),
    ("a.txt", b" \n"),
  ],
)
def test_what_is_not_json_lines_is_one_text(name: str, data: bytes):
  assert recognize(name, data) == (TEXT, None)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("data", [b"", b" \r\n\n", b"\xef\xbb\xbf"])
def test_json_without_a_character_is_lines_and_no_text(name: str, data: bytes):
  assert recognize(name, data) == (JSON_LINES, None)


@pytest.mark.parametrize(
  ("data", "advice"),
  [
    (b'[{"text": "a"}]', r"one JSON array, .* jq -c '\.\[\]' FILE$"),
    (b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "one JSON array"),
    (b'\xef\xbb\xbf[{"text": "' + b"a" * HEAD, "one JSON array"),
    (PRETTY, r"one JSON object over several lines, .* jq -c \. FILE"),
    (b'{"text":\n"a"}', "one JSON object over several lines"),
    (b'"text"', r"named \.json, but not JSON lines"),
    (b"// comment\n{}", r"named \.json, but not JSON lines"),
  ],
)
def test_a_json_file_that_is_one_value_is_no_text(data: bytes, advice: str):
  found, problem = recognize("a.json", data)
  assert found is TEXT
  assert re.search(advice, str(problem))


@pytest.mark.parametrize(
  ("name", "command"),
  [
    ("a.json.gz", "gzip -dc FILE | jq -c '.[]'"),
    ("a.json.zst", "zstd -dc --long=31 FILE | jq -c '.[]'"),
    ("a.json.xz", "xz -dc FILE | jq -c '.[]'"),
    ("a.json.bz2", "bzip2 -dc FILE | jq -c '.[]'"),
  ],
)
def test_the_advice_unpacks_what_is_packed(name: str, command: str):
  problem = recognize(name, b'[{"text": "a"}]', packed=name).problem
  assert str(problem).endswith(f"as with {command}")


def zipped() -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("a.jsonl", LINES)
  return file.getvalue()


def tarred() -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    entry = tarfile.TarInfo("a.jsonl")
    entry.size = len(LINES)
    archive.addfile(entry, io.BytesIO(LINES))
  return file.getvalue()


def database(folder: Path) -> bytes:
  connection = sqlite3.connect(folder / "a.db")
  connection.execute("create table texts (text)")
  connection.close()
  return (folder / "a.db").read_bytes()


@pytest.mark.parametrize("name", ["a", "a.jsonl", "a.json.gz", "a.txt"])
def test_other_formats_are_named_with_what_to_do(name: str, tmp_path: Path):
  for data, advice in {
    b"PAR1\x15\x80PAR1": "a Parquet file: .* pandas.read_parquet",
    b"ARROW1\0\0": "an Arrow file: ",
    b"\xff\xff\xff\xff\x10\0\0\0": "an Arrow file: .*Dataset.from_file",
    b"Obj\x01\x04": "an Avro file",
    b"ORC\x08": "an ORC file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    database(tmp_path): "an SQLite database",
    b"WARC/1.0\r\nWARC-Type: conversion": "a WARC file",
    zipped(): "a zip archive: unpack it first",
    tarred(): "a tar archive: .* tar -xf",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07\x01": "a RAR archive",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"\xff\x06\0\0sNaPpY": "a snappy file",
    b"\x1f\x9d\x90": r"a \.Z file",
    "text".encode("utf-16"): "UTF-16: .* iconv",
    b"version https://git-lfs.github.com/spec/v1\noid": ".* git lfs pull",
    b"\x1f\x8b\x08\0": "packed twice: .* gzip -dc",
  }.items():
    assert re.match(advice, str(recognize(name, data).problem)), advice


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.zst", "a.txt.xz", "a.bz2"])
def test_what_is_not_packed_as_its_name_says_and_no_text_is_damaged(name: str):
  for data in (b"\xff" + LINES, b"\0" * 100):
    assert "damaged" in str(recognize(name, data).problem)
