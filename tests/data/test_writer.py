"""Shards depend on the documents alone, however they are appended."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_datasets import Documents

from xlstm_jax.data.tokenizer import ByteTokenizer
from xlstm_jax.data.writer import SplitState, SplitWriter
from xlstm_jax.errors import UserError

TOKENIZER = ByteTokenizer()


def open_writer(
  directory: Path, state: SplitState, *, shard_entries: int = 50
) -> SplitWriter:
  directory.mkdir(exist_ok=True)
  return SplitWriter(
    directory,
    "train",
    TOKENIZER.spec,
    shard_entries=shard_entries,
    state=state,
  )


def append(writer: SplitWriter, documents: Documents) -> None:
  texts = [text for text, _ in documents]
  tokens, lengths = TOKENIZER.encode_documents(texts)
  sources = np.array([source for _, source in documents])
  writer.append(tokens, lengths, sources, lengths)


def content(directory: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(
  max_examples=40,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  documents=st.lists(
    st.tuples(st.binary(max_size=60), st.integers(0, 2)),
    min_size=2,
    max_size=10,
  ),
  data=st.data(),
)
def test_a_crash_anywhere_changes_nothing(
  tmp_path_factory: pytest.TempPathFactory,
  documents: Documents,
  data: st.DataObject,
):
  cut = data.draw(st.integers(1, len(documents) - 1))
  lost = data.draw(st.integers(0, len(documents) - cut))
  reached = data.draw(st.booleans())
  directory = tmp_path_factory.mktemp("d")
  whole = open_writer(directory / "whole", SplitState.empty())
  append(whole, documents)
  expected = whole.finish()

  first = open_writer(directory / "parts", SplitState.empty())
  for one in documents[:cut]:
    append(first, [one])
  state = first.flush()
  if lost:
    append(first, documents[cut : cut + lost])
  # As after a crash, part of what followed may have reached the disk.
  first.finish() if reached else first.close()
  second = open_writer(directory / "parts", state)
  append(second, documents[cut:])
  assert second.finish() == expected
  assert content(directory / "parts") == content(directory / "whole")


def test_a_shard_ends_behind_the_document_that_fills_it(tmp_path: Path):
  writer = open_writer(tmp_path, SplitState.empty(), shard_entries=10)
  append(writer, [(b"a" * 8, 0), (b"b" * 30, 0), (b"", 0), (b"c", 0)])
  state = writer.finish()
  # E + 8 + E is 10: full.
  assert [(s.documents, s.tokens) for s in state.shards] == [
    (1, 9),
    (1, 31),
    (2, 3),
  ]


def test_a_shard_shorter_than_recorded_is_refused(tmp_path: Path):
  writer = open_writer(tmp_path, SplitState.empty())
  append(writer, [(b"abc", 0)])
  state = writer.flush()
  writer.close()
  os.truncate(tmp_path / "train-00000.tokens", 4)
  with pytest.raises(UserError, match=r"train-00000\.tokens is missing or"):
    open_writer(tmp_path, state)


def test_only_shards_begun_later_are_deleted(tmp_path: Path):
  writer = open_writer(tmp_path, SplitState.empty(), shard_entries=5)
  for text in (b"abc", b"def", b"g"):
    append(writer, [(text, 0)])
  state = writer.flush()
  writer.close()
  assert len(state.shards) == 2
  for name in ("train-notes.txt", "heldout-00000.tokens", "train-x.tokens"):
    (tmp_path / name).write_text("kept")
  earlier = dataclasses.replace(
    state, shards=state.shards[:1], open_entries=0, open_documents=0
  )
  open_writer(tmp_path, earlier, shard_entries=5)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "heldout-00000.tokens",
    "train-00000.index",
    "train-00000.tokens",
    "train-notes.txt",
    "train-x.tokens",
  ]


def test_a_shard_may_not_outgrow_its_index(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr("xlstm_jax.data.layout.MAX_SHARD_TOKENS", 20)
  writer = open_writer(tmp_path, SplitState.empty())
  append(writer, [(b"a" * 15, 0)])
  with pytest.raises(UserError, match="would exceed 20 tokens"):
    append(writer, [(b"a" * 15, 0)])
  writer.close()
