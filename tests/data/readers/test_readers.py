"""A reader is one row: a toy that lives here lists, prepares and trains.

`Toy` is what a file in `data/readers/` holds, and `toys` adds its row: files of
little-endian 16-bit token ids, of which 256 ends a document.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools.trajectory import trajectory

from xlstm_jax.config import RunConfig
from xlstm_jax.data import documents, encoding, shards
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.data.readers import table
from xlstm_jax.data.readers.reader import (
  Document,
  OpenFile,
  Parsed,
  Place,
  Reader,
  Unit,
  crc_of_bytes,
)
from xlstm_jax.data.readers.table import Format
from xlstm_jax.data.tokenizer import ByteTokenizer
from xlstm_jax.errors import UserError
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.train import loop

END = 256


class Toy(Reader):
  """Units of a fixed number of bytes, each cut after its last document."""

  def units(
    self,
    file: OpenFile,
    start: Place,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ):
    del max_document_bytes
    at, tail = start, b""
    for data in file.parts(start.offset, unit_bytes // 2 * 2):
      ids = np.frombuffer(tail + data, "<u2")
      stop = 2 * max(np.flatnonzero(ids == END) + 1, default=0)
      whole, tail = (tail + data)[:stop], (tail + data)[stop:]
      if whole:
        crc = zlib.crc32(whole, at.crc)
        at = Place(at.file, at.offset + len(whole), 0, crc)
        raw = file.file.tell()
        yield Unit(whole, at.file, 0, file.one.source, at, raw, self)
    if tail:
      end = at._replace(line=1)
      yield Unit(
        b"", at.file, 0, file.one.source, end, file.one.size, self, "cut off"
      )

  def documents(self, unit: Unit, *, max_document_bytes: int) -> Parsed:
    del max_document_bytes
    ids = np.frombuffer(unit.data, "<u2").astype(np.int64)
    ends = np.flatnonzero(ids == END)
    parts = np.split(ids, ends + 1)[:-1]
    return Parsed(
      [Document(b"", unit.source, unit.file, 0, one[:-1]) for one in parts],
      [],
    )

  def checksum(
    self,
    file: OpenFile,
    start: Place,
    stop: Place | None,
    *,
    unit_bytes: int,
    max_document_bytes: int,
  ) -> int:
    del max_document_bytes
    return crc_of_bytes(file, start, stop, part_bytes=unit_bytes)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  row = Format("a toy of token ids", suffixes=(".toy",), reader=Toy())
  monkeypatch.setattr(table, "FORMATS", [*table.FORMATS, row])


TEXTS = [f"document {n} of {n * n} " * (1 + n % 3) for n in range(40)]


def toy_file(path: Path, texts=TEXTS, tail: bytes = b"") -> Path:
  ids = [[*text.encode(), END] for text in texts]
  path.write_bytes(np.concatenate(ids).astype("<u2").tobytes() + tail)
  return path


def prepared(folder: Path, output: str, *more: str) -> Path:
  arguments = [f"--input={folder}", f"--output={folder.parent / output}"]
  code = prepare.main(
    [*arguments, "--tokenizer=byte", "--heldout-fraction=0.2", *more]
  )
  assert code == 0
  return folder.parent / output


def test_it_makes_the_shards_that_the_text_makes(tmp_path):
  for kind in ("ids", "text"):
    (tmp_path / kind).mkdir()
  toy_file(tmp_path / "ids" / "a.toy")
  lines = [json.dumps({"text": text}) for text in TEXTS]
  (tmp_path / "text" / "a.jsonl").write_text("\n".join(lines))
  ids, text = (
    prepared(tmp_path / kind, f"{kind}.out") for kind in ("ids", "text")
  )
  for name in ("train", "heldout"):
    for suffix in ("tokens", "index"):
      file = f"{name}-00000.{suffix}"
      assert (ids / file).read_bytes() == (text / file).read_bytes()
  assert shards.open_split(ids, "heldout").documents > 0


@pytest.mark.slow
def test_what_is_prepared_trains(tmp_path):
  (tmp_path / "in").mkdir()
  toy_file(tmp_path / "in" / "a.toy")
  data = prepared(tmp_path / "in", "out")
  mlstm = MLSTMConfig(num_heads=2, round_to=8)
  model: Any = {"width": 16, "num_blocks": 1, "mlstm": mlstm}
  cfg = RunConfig(
    model=ModelConfig(vocab_size=257, **model),
    data=DataConfig(paths=(str(data),), context=16),
    steps=2,
    log_every=1,
    compilation_cache=None,
  )
  assert loop.train(cfg, tmp_path / "run") == 0
  assert len(trajectory(tmp_path / "run")) == 2


def read(path: Path, start: Place | None = None):
  inputs = documents.find([str(path)]).files
  return list(
    documents.read(
      inputs, start or Place(), unit_bytes=100, max_document_bytes=999
    )
  )


def test_reading_goes_on_from_the_end_of_every_unit(tmp_path):
  path = toy_file(tmp_path / "a.toy")
  whole = read(path)
  assert len(whole) > 5
  found = [documents.parse(u, max_document_bytes=999).documents for u in whole]
  ids = [np.asarray(d.tokens) for part in found for d in part]
  texts = [bytes(one.tolist()).decode() for one in ids]
  assert texts == TEXTS
  inputs = documents.find([str(path)]).files
  for number, unit in enumerate(whole):
    rest = read(path, unit.end)
    assert b"".join(u.data for u in rest) == b"".join(
      u.data for u in whole[number + 1 :]
    )
    crc = documents.content_crc(inputs, unit.end, max_document_bytes=999)
    assert crc == unit.end.crc


def test_it_says_what_it_cannot_read(tmp_path):
  end = toy_file(tmp_path / "a.toy", tail=b"\1\0")
  problems = [unit.problem for unit in read(end)]
  assert problems[-1] == "cut off"
  assert not any(problems[:-1])


@pytest.mark.parametrize(
  ("ids", "reason"),
  [
    ([], "no tokens"),
    ([1, 300], "token id 300, but the tokenizer has ids below 257"),
    ([1, -2], "token id -2, but the tokenizer has ids below 257"),
    ([7, END], "the id 256 of the end of a text inside"),
  ],
)
def test_ids_of_no_text_are_problems(ids, reason):
  class One(Toy):
    def documents(self, unit: Unit, *, max_document_bytes: int) -> Parsed:
      del max_document_bytes
      tokens = np.array(ids, np.int64)
      return Parsed(
        [Document(b"", "a", 0, 3, tokens), Document(b"text", "a", 0, 4)], []
      )

  encoder = encoding.Encoder(
    ByteTokenizer(), heldout_fraction=0, max_document_bytes=999
  )
  unit = Unit(b"", 0, 1, "a", Place(), 0, One())
  got = encoder([unit])
  assert got.problems == [(0, 3, reason)]
  assert got.splits["train"].tokens.tolist() == [*b"text", END]


def test_ids_and_texts_of_one_task_keep_their_order():
  class Mixed(Toy):
    def documents(self, unit: Unit, *, max_document_bytes: int) -> Parsed:
      del max_document_bytes
      ids = np.array([*b"two"], np.int64)
      return Parsed(
        [
          Document(b"one", "a", 0, 1),
          Document(b"", "b", 0, 2, ids),
          Document(b"three", "a", 0, 3),
        ],
        [],
      )

  encoder = encoding.Encoder(
    ByteTokenizer(), heldout_fraction=0, max_document_bytes=999
  )
  part = encoder([Unit(b"", 0, 1, "a", Place(), 0, Mixed())]).splits["train"]
  expected = [*b"one", END, *b"two", END, *b"three", END]
  assert part.tokens.tolist() == expected
  assert part.lengths.tolist() == part.sizes.tolist() == [3, 3, 5]
  assert part.sources.tolist() == [0, 1, 0]


def test_a_format_that_only_its_suffix_tells_may_have_no_reader(
  tmp_path, monkeypatch
):
  row = Format("a toy", suffixes=(".toy",), advice="throw it away")
  monkeypatch.setattr(table, "FORMATS", [row])
  (unit,) = read(toy_file(tmp_path / "a.toy"))
  assert unit.problem == "a toy: throw it away"


def test_ids_train_no_tokenizer(tmp_path):
  path = toy_file(tmp_path / "a.toy")
  with pytest.raises(UserError, match=r"a\.toy holds token ids, which train"):
    prepare.main(
      [
        *(f"--input={path}", f"--output={tmp_path / 'out'}"),
        *("--train-tokenizer=300", "--workers=1"),
      ]
    )
