"""Any journal and any index of a shard is read or refused by an error of ours.

Checksums are made right again in part of the tests, as what stands behind them
is read as well.
"""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from damage import bytes_like, json_like, same_folder, values
from hypothesis import given
from hypothesis import strategies as st
from small_datasets import write_dataset
from test_journal import example

from xlstm_jax.data import journal, layout, shards
from xlstm_jax.errors import UserError


def read_journal(folder: Path, data: bytes) -> None:
  (folder / layout.PROGRESS).write_bytes(data)
  with contextlib.suppress(UserError):
    kept = journal.load(folder)
    assert kept
    # What is read can be gone on with.
    assert all(type(number) is int and number >= 0 for number in kept.place)
    assert all(type(name) is str for name in kept.sources)
    assert kept.totals.keys() == set(layout.SPLITS)
    kept.save(folder)
    assert journal.load(folder) == kept


def hashed(content: Any) -> bytes:
  """A journal of this content, with the hash that it must have."""
  if isinstance(content, dict):
    content.pop("hash", None)
    rest = {k: v for k, v in content.items() if k != "version"}
    content["hash"] = journal._digest(rest)
  return json.dumps(content).encode()


@same_folder
@given(st.binary(max_size=60) | values.map(hashed))
def test_any_bytes_are_a_journal_or_refused(tmp_path: Path, data: bytes):
  read_journal(tmp_path, data)


@same_folder
@given(st.data())
def test_a_damaged_journal_is_read_or_refused(
  tmp_path: Path, data: st.DataObject
):
  example().save(tmp_path)
  whole = (tmp_path / layout.PROGRESS).read_bytes()
  read_journal(tmp_path, data.draw(bytes_like(whole)))


@same_folder
@given(st.data())
def test_any_value_in_a_journal_with_its_hash_is_read_or_refused(
  tmp_path: Path, data: st.DataObject
):
  example().save(tmp_path)
  content = json.loads((tmp_path / layout.PROGRESS).read_bytes())
  read_journal(tmp_path, hashed(data.draw(json_like(content))))


def dataset(folder: Path) -> Path:
  directory = folder / "dataset"
  if not directory.exists():
    write_dataset(directory, [(b"abc", 0), (b"", 1), (b"de" * 20, 1)])
  return directory


def read_split(directory: Path) -> None:
  with contextlib.suppress(UserError):
    split = shards.open_split(directory, "train", verify="opening")
    numbers = np.arange(split.window_count(8))
    split.windows(numbers, 8)
    split.window_sources(numbers, 8)
    split.document_lengths()
    for number in range(split.documents):
      split.document(number)


def with_index(directory: Path, data: bytes, manifest: Any) -> None:
  """Replaces the index of the first shard, and states its new checksum."""
  (directory / "train-00000.index").write_bytes(data)
  manifest["splits"]["train"]["shards"][0]["index_crc32"] = zlib.crc32(data)
  manifest.pop("hash")
  manifest["hash"] = layout._digest(manifest)
  (directory / layout.MANIFEST).write_text(json.dumps(manifest))


@same_folder
@given(st.data())
def test_a_damaged_index_is_read_or_refused(
  tmp_path: Path, data: st.DataObject
):
  directory = dataset(tmp_path)
  index, manifest = directory / "train-00000.index", directory / layout.MANIFEST
  whole, stated = index.read_bytes(), manifest.read_bytes()
  damaged = data.draw(bytes_like(whole) | st.binary(max_size=120))
  try:
    if data.draw(st.booleans(), "with its checksum"):
      with_index(directory, damaged, json.loads(stated))
    else:
      index.write_bytes(damaged)
    read_split(directory)
  finally:
    index.write_bytes(whole)
    manifest.write_bytes(stated)


@same_folder
@given(st.data())
def test_any_numbers_in_an_index_with_its_checksum_are_read_or_refused(
  tmp_path: Path, data: st.DataObject
):
  """The size stays, so that what is read is the table and not its length."""
  directory = dataset(tmp_path)
  index, manifest = directory / "train-00000.index", directory / layout.MANIFEST
  whole, stated = index.read_bytes(), manifest.read_bytes()
  words = np.frombuffer(whole, "<u4").copy()
  behind = layout.HEADER_BYTES // 4
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(behind, len(words) - 1))
    words[at] = data.draw(
      st.integers(0, 60) | st.sampled_from([2**31, 2**32 - 1])
    )
  try:
    with_index(directory, words.tobytes(), json.loads(stated))
    read_split(directory)
  finally:
    index.write_bytes(whole)
    manifest.write_bytes(stated)
