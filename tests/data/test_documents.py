"""Documents out of files: every form, any cut, and whatever is malformed."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from xlstm_jax.data import documents, packings
from xlstm_jax.data.readers import table
from xlstm_jax.data.readers.lines import Lines
from xlstm_jax.data.readers.reader import (
  Document,
  Parsed,
  Place,
  Problem,
  Unit,
)
from xlstm_jax.errors import UserError

LIMIT = 20_000
EMPTY = [Problem(0, 0, "empty file")]


def compress_frames(data: bytes) -> bytes:
  """Two zstd frames, as tools that work in parallel write."""
  compressor = zstandard.ZstdCompressor(write_checksum=True)
  half = len(data) // 2
  return compressor.compress(data[:half]) + compressor.compress(data[half:])


def compress_twice(
  compress: Callable[[bytes], bytes], between: bytes = b""
) -> Callable[[bytes], bytes]:
  """Two members, as `cat` makes them of two files."""

  def packed(data: bytes) -> bytes:
    half = len(data) // 2
    return compress(data[:half]) + between + compress(data[half:])

  return packed


WRITERS: dict[str, Callable[[bytes], bytes]] = {
  "a.jsonl": bytes,
  "a.jsonl.gz": gzip.compress,
  "a.jsonl.zst": compress_frames,
  "a.jsonl.xz": compress_twice(lzma.compress, bytes(8)),
  "a.jsonl.bz2": compress_twice(bz2.compress),
}
PACKED = [name for name in WRITERS if name != "a.jsonl"]


def line(text: Any, source: Any = None, **more: Any) -> bytes:
  value = {"text": text, **more}
  if source is not None:
    value["meta"] = {"redpajama_set_name": source}
  return json.dumps(value).encode() + b"\n"


def units_of(
  path: Path,
  *,
  start: Place | None = None,
  unit_bytes: int = 100,
  limit: int = LIMIT,
) -> list[Unit]:
  inputs = documents.find([str(path)]).files
  return list(
    documents.read(
      inputs,
      start or Place(),
      unit_bytes=unit_bytes,
      max_document_bytes=limit,
    )
  )


def parse_all(
  units: list[Unit], *, limit: int = LIMIT
) -> tuple[list[Document], list[Problem]]:
  found, problems = [], []
  for unit in units:
    parsed = documents.parse(unit, max_document_bytes=limit)
    found += parsed.documents
    problems += parsed.problems
  return found, problems


def parse_lines(data: bytes) -> Parsed:
  unit = Unit(data, 0, 1, "default", Place(), 0, Lines())
  return documents.parse(unit, max_document_bytes=LIMIT)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit_bytes", [1, 50, 10**6])
def test_lines_come_back_from_every_form(
  tmp_path: Path, name: str, unit_bytes: int
):
  texts = ["one", "zwei\nlines", "三 🙂", "four\u2028separators\x85"]
  data = b"".join(line(text, f"s{i % 2}") for i, text in enumerate(texts))
  (tmp_path / name).write_bytes(WRITERS[name](data))
  found, problems = parse_all(units_of(tmp_path / name, unit_bytes=unit_bytes))
  assert not problems
  assert [d.text.decode() for d in found] == texts
  assert [d.source for d in found] == ["s0", "s1", "s0", "s1"]
  assert [d.line for d in found] == [1, 2, 3, 4]


@settings(
  max_examples=100,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  lines=st.lists(
    st.one_of(
      st.text(max_size=30).map(lambda t: line(t).removesuffix(b"\n")),
      st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")),
    ),
    max_size=12,
  ),
  last=st.booleans(),
  unit_bytes=st.integers(1, 120),
  name=st.sampled_from(sorted(WRITERS)),
  data=st.data(),
)
def test_units_do_not_depend_on_their_size_or_where_reading_went_on(
  tmp_path: Path,
  lines: list[bytes],
  last: bool,
  unit_bytes: int,
  name: str,
  data: st.DataObject,
):
  content = b"\n".join(lines) + (b"\n" if last else b"")
  # What begins like another format is not read as lines.
  assume(packings.of(content) is None)
  assume(not any(form.begins(content) for form in table.FORMATS))
  path = tmp_path / name
  path.write_bytes(WRITERS[name](content))
  expected = parse_lines(content)[:2] if content else ([], EMPTY)
  limit = 40
  units = units_of(path, unit_bytes=unit_bytes)
  assert parse_all(units) == expected
  limited = parse_all(units_of(path, limit=limit), limit=limit)
  small = units_of(path, unit_bytes=unit_bytes, limit=limit)
  assert parse_all(small, limit=limit) == limited
  if small:
    cut = data.draw(st.integers(1, len(small)))
    place = small[cut - 1].end
    rest = units_of(path, start=place, unit_bytes=33, limit=limit)
    first = parse_all(small[:cut], limit=limit)
    second = parse_all(rest, limit=limit)
    assert (first[0] + second[0], first[1] + second[1]) == limited
    end = rest[-1].end if rest else place
    assert (end.crc, end.offset) == (zlib.crc32(content), len(content))
    inputs = documents.find([str(path)]).files
    crc = documents.content_crc(inputs, place, max_document_bytes=limit)
    assert crc == place.crc == zlib.crc32(content[: place.offset])


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"{", "not JSON: Expecting property name"),
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
    (b'{"text": "a"} x', "not JSON: Extra data"),
    (b"[1]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"{}", 'no "text"'),
    (b'{"text": 3}', 'no "text"'),
    (b'{"text": null}', 'no "text"'),
    (b'{"text": "\xff"}', "not UTF-8: invalid start byte"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    (b'\xff{"text": "a"}', "not UTF-8"),
    (b"[" * 9_000, "not JSON"),
    (b"[" * 9_000 + b"]" * 9_000, "not a JSON object"),
    (b'{"text": ' + b"[" * 4_000 + b"]" * 4_000 + b"}", 'no "text"'),
    (b'{"a": ' + b"[" * 4_000 + b', "text": "a"}', "not JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", 'no "text"'),
    (b'{"text": "a", "text": null}', 'no "text"'),
  ],
)
def test_what_is_no_document_is_a_problem_with_its_line(
  data: bytes, reason: str
):
  found, problems, empty = parse_lines(
    line("before") + data + b"\n" + line("after")
  )
  assert empty == 0
  assert [(d.text, d.line) for d in found] == [(b"before", 1), (b"after", 3)]
  assert [(p.file, p.line) for p in problems] == [(0, 2)]
  assert reason in problems[0].reason
  assert not problems[0].harmless


@pytest.mark.parametrize(
  "value",
  [
    {"text": "a"},
    {"text": "a", "meta": None},
    {"text": "a", "meta": {}},
    {"text": "a", "meta": {"other": 1}, "redpajama_set_name": "x"},
  ],
)
def test_a_document_that_names_no_source_gets_the_inputs(value: dict[str, Any]):
  found = parse_lines(json.dumps(value).encode()).documents
  assert found[0].source == "default"


DEEP = b'{"a":[' * 2_000 + b"]}" * 2_000


@pytest.mark.parametrize(
  "more",
  [
    b'"meta": 3',
    b'"meta": "{}"',
    b'"meta": [{"redpajama_set_name": "x"}]',
    b'"meta": {"redpajama_set_name": 3}',
    b'"meta": {"redpajama_set_name": ""}',
    b'"meta": {"redpajama_set_name": null}',
    b'"meta": {"redpajama_set_name": "x\\u001b[2J"}',
    b'"meta": {"redpajama_set_name": "x\\ud800"}',
    b'"meta": {"redpajama_set_name": "' + b"x" * 201 + b'"}',
    b'"meta": ' + DEEP,
    b'"meta": {"redpajama_set_name": ' + DEEP + b"}",
    b'"meta": ' + b"[" * 4_000 + b'"]}{["' + b"]" * 4_000,
    b'"meta": NaN, "a": [Infinity, -Infinity, 1e999, -0]',
    b'"a": '
    + b"1" * 5000
    + b', "b": -'
    + b"9" * 5000
    + b', "c": 1.'
    + b"0" * 5000,
    b'"a": 1, "a": 2, "": 3, "": 4',
    b'"text": "ok"',
    b'"url": "caf\xe9"',
    b'"url": "a\tb\x01\x00"',
    b'"url": "\\udce9\\ud800"',
    b'"caf\xe9": 1, "meta": {"redpajama_set_name": "caf\xe9"}',
  ],
)
def test_no_metadata_costs_a_document(more: bytes):
  for data in (b'{"text": "ok", %b}', b'{%b, "text": "ok"}'):
    found, problems, empty = parse_lines(data % more + b"\n" + line("after"))
    assert [(d.text, d.source) for d in found] == [
      (b"ok", "default"),
      (b"after", "default"),
    ]
    assert (problems, empty) == ([], 0)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (b"a\\ud83d", "a\ufffd"),
    (b"\\udce9b", "\ufffdb"),
    (b"\\ude00\\ud83d", "\ufffd\ufffd"),
    (b"\\ud83d\\ude00", "😀"),
    (b"a\tb\r\x00\x7f", "a\tb\r\0\x7f"),
    (b"\\u0000\\n", "\0\n"),
    ("\ufeffa\u2028".encode(), "\ufeffa\u2028"),
  ],
)
def test_unusual_characters_of_a_text_are_kept_or_replaced(
  text: bytes, expected: str
):
  found, problems, _ = parse_lines(b'{"text": "%b"}\n' % text)
  assert [d.text.decode() for d in found] == [expected]
  assert not problems


def test_lines_without_text_cost_nothing():
  lines = [
    b"", b" \t", b"\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf \r", b'{"text": ""}',
    b'{"text": "", "meta": 3}\r',
  ]  # fmt: skip
  data = b"\n".join([*lines, b'\xef\xbb\xbf{"text": "a"}\r', *lines])
  found, problems, empty = parse_lines(data)
  assert [(d.text, d.line) for d in found] == [(b"a", len(lines) + 1)]
  assert (problems, empty) == ([], 2 * len(lines))


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_documents_or_problems(data: bytes):
  found, problems, empty = parse_lines(data)
  lines = max(1, data.removesuffix(b"\n").count(b"\n") + 1)
  numbers = [d.line for d in found] + [p.line for p in problems]
  assert len(numbers) + empty == lines
  assert sorted({*numbers}) == sorted(numbers)


def test_a_byte_order_mark_is_dropped(tmp_path: Path):
  bom = b"\xef\xbb\xbf"
  found, problems, _ = parse_lines(bom + line("a") + bom + line("b"))
  assert [d.text for d in found] == [b"a", b"b"]
  assert not problems
  (tmp_path / "a.txt").write_bytes(bom + b"text")
  found, _ = parse_all(units_of(tmp_path / "a.txt"))
  assert found[0].text == b"text"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit_bytes", [1, 64, 10**6])
def test_a_line_that_is_too_long_is_not_kept(
  tmp_path: Path, name: str, unit_bytes: int
):
  data = line("a") + line("b" * 5000) + line("c") + line("d" * 5000)[:-1]
  (tmp_path / name).write_bytes(WRITERS[name](data))
  units = units_of(tmp_path / name, unit_bytes=unit_bytes, limit=1000)
  found, problems = parse_all(units, limit=1000)
  assert [(d.text, d.line) for d in found] == [(b"a", 1), (b"c", 3)]
  assert [(p.line, p.reason) for p in problems] == [
    (2, "longer than 1000 bytes"),
    (4, "longer than 1000 bytes"),
  ]


@pytest.mark.parametrize("cut", [1, 10, 60])
@pytest.mark.parametrize("name", PACKED)
def test_a_truncated_archive_is_named(tmp_path: Path, name: str, cut: int):
  path = tmp_path / name
  data = WRITERS[name](b"".join(line(f"text {i}") for i in range(1000)))
  path.write_bytes(data[:-cut])
  with pytest.raises(UserError, match=f"{name} is truncated or damaged"):
    units_of(path)


@pytest.mark.parametrize("name", PACKED)
def test_a_damaged_archive_is_named(tmp_path: Path, name: str):
  path = tmp_path / name
  data = bytearray(WRITERS[name](line("a") * 2))
  data[-1] ^= 0xFF
  path.write_bytes(data)
  with pytest.raises(UserError, match=f"{name} is truncated or damaged"):
    units_of(path)


@settings(
  max_examples=150,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  name=st.sampled_from(sorted(WRITERS)),
  place=st.floats(0, 1, exclude_max=True),
  value=st.binary(min_size=1, max_size=4),
)
def test_any_damage_is_documents_problems_or_an_error_of_ours(
  tmp_path: Path, name: str, place: float, value: bytes
):
  path = tmp_path / name
  data = bytearray(WRITERS[name](b"".join(line(f"{i}") for i in range(40))))
  at = int(place * len(data))
  data[at : at + len(value)] = value
  path.write_bytes(data)
  try:
    found, problems = parse_all(units_of(path))
  except UserError as error:
    refusal = str(error)
  else:
    refusal = None
  if refusal is not None:
    assert name in refusal
  else:
    assert len(found) + len(problems) >= 1


@pytest.mark.parametrize("name", [*WRITERS, "a.txt"])
@pytest.mark.parametrize("after", [0, 10**6])
def test_a_file_that_changes_meanwhile_is_refused(
  tmp_path: Path, name: str, after: int
):
  path = tmp_path / name
  data = WRITERS.get(name, bytes)(line("a") * 3)
  path.write_bytes(data)
  inputs = documents.find([str(path)]).files
  path.write_bytes(data + WRITERS.get(name, bytes)(line("b")))
  with pytest.raises(UserError, match=f"{name} changed while it was read"):
    list(
      documents.read(
        inputs, Place(), unit_bytes=after + 1, max_document_bytes=LIMIT
      )
    )


def test_an_archive_that_expands_without_end_stays_bounded(tmp_path: Path):
  """1 GiB of zeros in 32 KiB: one line that is too long, never held."""
  path = tmp_path / "a.jsonl.zst"
  frame = zstandard.ZstdCompressor(level=1).compress(bytes(2**28))
  path.write_bytes(frame * 4)
  script = f"""
import resource
from xlstm_jax.data import documents
from xlstm_jax.data.readers.reader import Place
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**28, 3 * 2**28))
inputs = documents.find([{str(path)!r}]).files
units = documents.read(
  inputs, Place(), unit_bytes=2**20, max_document_bytes=2**20
)
print([(p.line, p.data, p.problem, p.end.offset) for p in units])
"""
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  expected = [(1, b"", "longer than 1048576 bytes", 2**30)]
  assert result.stdout == f"{expected}\n"


def test_text_files_are_one_document_each(tmp_path: Path):
  (tmp_path / "b.txt").write_text("line 1\nline 2\n")
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x.py").write_text("pass")
  (tmp_path / "c.jsonl").write_bytes(line("json"))
  inputs = documents.find([str(tmp_path)])
  names = [one.name for one in inputs.files]
  assert names == ["b.txt", "c.jsonl", "a/x.py"]
  found, problems = parse_all(units_of(tmp_path))
  assert [(d.text, d.file) for d in found] == [
    (b"line 1\nline 2\n", 0),
    (b"json", 1),
    (b"pass", 2),
  ]
  assert not problems


def test_text_files_that_are_none_are_problems(tmp_path: Path):
  (tmp_path / "a.txt").write_bytes(b"\xff")
  (tmp_path / "b.txt").write_bytes(b"")
  (tmp_path / "c.txt").write_bytes(b"x" * 200)
  (tmp_path / "d.txt").write_bytes(b"good")
  found, problems = parse_all(units_of(tmp_path, limit=100))
  assert [d.text for d in found] == [b"good"]
  assert [(p.file, p.line, p.reason, p.harmless) for p in problems] == [
    (0, 0, "not UTF-8: invalid start byte", False),
    (1, 0, "empty file", True),
    (2, 0, "longer than 100 bytes", False),
  ]


def test_reading_text_files_goes_on_behind_a_place(tmp_path: Path):
  for name in "abc":
    (tmp_path / name).write_text(name)
  units = units_of(tmp_path)
  for cut, unit in enumerate(units, 1):
    assert units_of(tmp_path, start=unit.end) == units[cut:]
    inputs = documents.find([str(tmp_path)]).files
    crc = documents.content_crc(inputs, unit.end, max_document_bytes=LIMIT)
    assert crc == unit.end.crc == zlib.crc32(b"abc"[:cut])


def test_folders_pass_over_hidden_entries_and_links(tmp_path: Path):
  folder = tmp_path / "in"
  (folder / ".git").mkdir(parents=True)
  (folder / ".git" / "x").write_text("hidden")
  (folder / ".hidden").write_text("hidden")
  (folder / "a").write_text("seen")
  (tmp_path / "secret").write_text("outside")
  (folder / "link").symlink_to(tmp_path / "secret")
  (folder / "loop").symlink_to(folder)
  inputs = documents.find([str(folder)])
  assert [one.name for one in inputs.files] == ["a"]
  assert (inputs.hidden, inputs.links) == (2, 2)


def test_an_input_may_name_its_source(tmp_path: Path):
  (tmp_path / "a=b").write_text("x")
  (tmp_path / "c").write_text("x")
  (tmp_path / "d").write_text("x")
  arguments = [f"code={tmp_path}/c", f"{tmp_path}/a=b", f"s={tmp_path}/d"]
  found = documents.find(arguments).files
  assert [(one.source, one.name) for one in found] == [
    ("code", "c"),
    ("default", "a=b"),
    ("s", "d"),
  ]
  with pytest.raises(UserError, match="not a printable name"):
    documents.find([f"a\tb={tmp_path}/c"])


@pytest.mark.parametrize("argument", ["nowhere", "code=nowhere"])
def test_a_missing_input_is_named(argument: str):
  with pytest.raises(UserError, match="no file or folder nowhere"):
    documents.find([argument])


def test_an_empty_folder_is_refused(tmp_path: Path):
  with pytest.raises(UserError, match="no file to read"):
    documents.find([str(tmp_path)])


def test_an_input_given_twice_is_refused(tmp_path: Path):
  (tmp_path / "a").write_text("x")
  with pytest.raises(UserError, match="twice"):
    documents.find([str(tmp_path), str(tmp_path / "a")])


def test_what_is_neither_file_nor_folder_does_not_hang(tmp_path: Path):
  os.mkfifo(tmp_path / "pipe.jsonl")
  for argument in (tmp_path, tmp_path / "pipe.jsonl"):
    with pytest.raises(UserError, match="neither a regular file"):
      documents.find([str(argument)])


def test_a_listing_knows_names_sizes_and_times(tmp_path: Path):
  (tmp_path / "a").write_text("x")
  first = documents.find([str(tmp_path)]).files
  os.utime(tmp_path / "a", (1, 1))
  touched = documents.find([str(tmp_path)]).files
  (tmp_path / "a").write_text("xy")
  grown = documents.find([str(tmp_path)]).files
  untimed = [
    documents.listing_hash(i, times=False) for i in (first, touched, grown)
  ]
  assert untimed[0] == untimed[1] != untimed[2]
  timed = [documents.listing_hash(i, times=True) for i in (first, touched)]
  assert timed[0] != timed[1]
