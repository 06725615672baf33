"""One logical stream over shards: arithmetic, round trips and damage."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_datasets import Documents, MakeDataset, write_dataset

from xlstm_jax.data import layout, shards
from xlstm_jax.errors import UserError

E = 256

documents_strategy = st.lists(
  st.tuples(st.binary(max_size=40), st.integers(0, 1)), min_size=1, max_size=12
)
same_directory = settings(
  max_examples=25,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def stream_of(documents: Documents) -> np.ndarray:
  ids = [E]
  for text, _ in documents:
    ids += [*text, E]
  return np.array(ids)


def sources_of(documents: Documents) -> np.ndarray:
  return np.repeat(
    [source for _, source in documents], [len(t) + 1 for t, _ in documents]
  )


def fresh(directory: Path) -> Path:
  shutil.rmtree(directory, ignore_errors=True)
  return directory


@same_directory
@given(documents_strategy, st.integers(1, 90), st.data())
def test_any_range_reads_the_stream(
  tmp_path: Path, documents: Documents, shard_entries: int, data: st.DataObject
):
  directory = write_dataset(
    fresh(tmp_path / "d"), documents, shard_entries=shard_entries
  )
  split = shards.open_split(directory, "train")
  expected = stream_of(documents)
  assert split.tokens == len(expected) - 1
  start = data.draw(st.integers(0, len(expected)))
  stop = data.draw(st.integers(start, len(expected)))
  np.testing.assert_array_equal(split.read(start, stop), expected[start:stop])
  np.testing.assert_array_equal(split.read(0, len(expected)), expected)


@same_directory
@given(documents_strategy, st.integers(1, 90), st.integers(1, 50))
def test_windows_have_every_token_and_end_as_a_target_once(
  tmp_path: Path, documents: Documents, shard_entries: int, context: int
):
  directory = write_dataset(
    fresh(tmp_path / "d"), documents, shard_entries=shard_entries
  )
  split = shards.open_split(directory, "train")
  numbers = np.arange(split.window_count(context))
  batch = split.windows(numbers, context)
  sources_BT = split.window_sources(numbers, context)
  real = batch["segments"] > 0
  stream = stream_of(documents)
  np.testing.assert_array_equal(batch["inputs"][real], stream[:-1])
  np.testing.assert_array_equal(batch["targets"][real], stream[1:])
  np.testing.assert_array_equal(sources_BT[real], sources_of(documents))
  assert (sources_BT[~real] == -1).all()
  # Padding stands only behind the end of the stream.
  assert real.ravel()[: split.tokens].all()


@same_directory
@given(documents_strategy, st.integers(1, 90), st.integers(1, 50))
def test_segments_of_a_window_follow_its_documents(
  tmp_path: Path, documents: Documents, shard_entries: int, context: int
):
  directory = write_dataset(
    fresh(tmp_path / "d"), documents, shard_entries=shard_entries
  )
  split = shards.open_split(directory, "train")
  # The document that the input at each stream position opens or continues.
  owners = np.repeat(
    np.arange(len(documents)), [len(text) + 1 for text, _ in documents]
  )
  batch = split.windows(np.arange(split.window_count(context)), context)
  for number, segments_T in enumerate(batch["segments"]):
    window = owners[number * context : (number + 1) * context]
    np.testing.assert_array_equal(
      segments_T[: len(window)], window - window[0] + 1
    )


@same_directory
@given(documents_strategy, st.integers(1, 90))
def test_documents_come_back(
  tmp_path: Path, documents: Documents, shard_entries: int
):
  directory = write_dataset(
    fresh(tmp_path / "d"), documents, shard_entries=shard_entries
  )
  split = shards.open_split(directory, "train")
  assert split.documents == len(documents)
  assert split.document_lengths().tolist() == [len(t) for t, _ in documents]
  assert split.document_sources().tolist() == [
    source for _, source in documents
  ]
  for number, (text, source) in enumerate(documents):
    document = split.document(number)
    assert document.tokens.tolist() == [E, *text, E]
    assert (document.source, document.bytes) == (source, len(text))


def test_counts_are_per_source(make_dataset: MakeDataset):
  split = shards.open_split(
    make_dataset([(b"abc", 1), (b"", 0), (b"de", 1)]), "train"
  )
  assert split.counts == {
    "a": layout.Counts(documents=1, tokens=1, bytes=0),
    "b": layout.Counts(documents=2, tokens=7, bytes=5),
  }


def test_chunks_cover_the_stream_with_one_entry_of_overlap(
  make_dataset: MakeDataset,
):
  documents = [(bytes(range(i)), 0) for i in range(30)]
  split = shards.open_split(make_dataset(documents), "train")
  chunks = list(split.chunks(positions=17))
  assert [start for start, _ in chunks] == list(range(0, split.tokens, 17))
  targets = np.concatenate([tokens[1:] for _, tokens in chunks])
  np.testing.assert_array_equal(targets, stream_of(documents)[1:])
  inputs = np.concatenate([tokens[:-1] for _, tokens in chunks])
  np.testing.assert_array_equal(inputs, stream_of(documents)[:-1])


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 100)])
def test_ranges_outside_the_stream_are_refused(
  make_dataset: MakeDataset, bounds: tuple[int, int]
):
  split = shards.open_split(make_dataset([(b"abc", 0)]), "train")
  with pytest.raises(IndexError):
    split.read(*bounds)


def test_an_empty_split_is_refused(make_dataset: MakeDataset):
  directory = make_dataset([(b"abc", 0)])
  with pytest.raises(UserError, match=r"heldout.*is empty.*heldout-fraction"):
    shards.open_split(directory, "heldout")


def test_an_unknown_split_is_refused(make_dataset: MakeDataset):
  with pytest.raises(UserError, match="train, heldout, not test"):
    shards.open_split(make_dataset([(b"abc", 0)]), "test")


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path):
  with pytest.raises(UserError, match="holds no prepared dataset"):
    shards.open_split(tmp_path, "train")


def test_an_interrupted_preparation_is_named(tmp_path: Path):
  (tmp_path / layout.PROGRESS).write_text("{}")
  with pytest.raises(UserError, match="interrupted; run the same prepare"):
    shards.open_split(tmp_path, "train")


@pytest.fixture
def large(make_dataset: MakeDataset) -> Path:
  """Two shards, of several blocks each."""
  rng = np.random.default_rng(0)
  documents = [
    (rng.integers(0, 256, 3000, np.uint8).tobytes(), 0) for _ in range(20)
  ]
  return make_dataset(documents, shard_entries=30_000)


def flip(path: Path, offset: int) -> None:
  with path.open("r+b") as file:
    file.seek(offset)
    byte = file.read(1)
    file.seek(offset)
    file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("name", ["train-00000", "train-00001"])
@pytest.mark.parametrize("suffix", [".tokens", ".index"])
@pytest.mark.parametrize("cut", [1, 2, 5000])
def test_a_truncated_file_is_named(
  large: Path, name: str, suffix: str, cut: int
):
  path = large / f"{name}{suffix}"
  os.truncate(path, max(0, path.stat().st_size - cut))
  with pytest.raises(UserError, match=rf"{name}\{suffix} was truncated"):
    shards.open_split(large, "train")


@pytest.mark.parametrize(
  ("suffix", "read"),
  [
    (".tokens", lambda split: split.read(0, split.tokens + 1)),
    (".index", shards.Split.document_lengths),
    (".index", lambda split: split.document(split.documents - 1)),
  ],
)
def test_a_file_that_shrinks_after_opening_is_named(
  large: Path, suffix: str, read: Callable[[shards.Split], object]
):
  split = shards.open_split(large, "train", verify="opening")
  path = large / f"train-00001{suffix}"
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match=rf"train-00001\{suffix} ends at byte"):
    read(split)


@pytest.mark.parametrize("suffix", [".tokens", ".index"])
def test_a_grown_file_is_named(large: Path, suffix: str):
  with (large / f"train-00001{suffix}").open("ab") as file:
    file.write(b"\0")
  with pytest.raises(UserError, match=rf"train-00001\{suffix} was truncated"):
    shards.open_split(large, "train")


@pytest.mark.parametrize("suffix", [".tokens", ".index"])
def test_a_missing_file_is_named(large: Path, suffix: str):
  (large / f"train-00001{suffix}").unlink()
  with pytest.raises(UserError, match=rf"train-00001\{suffix}.*No such file"):
    shards.open_split(large, "train")


@pytest.mark.parametrize("suffix", [".tokens", ".index"])
def test_a_file_that_is_none_does_not_hang(large: Path, suffix: str):
  path = large / f"train-00000{suffix}"
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(UserError, match="is not a regular file"):
    shards.open_split(large, "train")


@pytest.mark.parametrize("block", [0, 1, 3])
def test_an_altered_token_block_is_named_at_opening(large: Path, block: int):
  flip(large / "train-00001.tokens", block * layout.BLOCK_BYTES + 77)
  with pytest.raises(
    UserError, match=rf"train-00001\.tokens was altered: block {block} "
  ):
    shards.open_split(large, "train")


def test_an_altered_block_is_found_at_its_first_use(large: Path):
  flip(large / "train-00000.tokens", layout.BLOCK_BYTES + 77)
  split = shards.open_split(large, "train", verify="first_use")
  per_block = layout.BLOCK_BYTES // 2
  split.read(0, per_block)
  split.read(2 * per_block, split.tokens)
  with pytest.raises(UserError, match="block 1 "):
    split.read(per_block - 1, per_block + 1)
  # It stays unusable.
  with pytest.raises(UserError, match="block 1 "):
    split.read(per_block, per_block + 1)


def test_every_byte_of_an_index_is_checked(make_dataset: MakeDataset):
  directory = make_dataset([(b"abc", 0), (b"de", 1)])
  path = directory / "train-00000.index"
  for offset in range(path.stat().st_size):
    flip(path, offset)
    with pytest.raises(UserError, match=r"train-00000\.index was altered"):
      shards.open_split(directory, "train", verify="first_use")
    flip(path, offset)
  shards.open_split(directory, "train")


def test_every_byte_of_a_token_file_is_checked(make_dataset: MakeDataset):
  directory = make_dataset([(b"abc", 0), (b"de", 1)])
  path = directory / "train-00000.tokens"
  for offset in range(path.stat().st_size):
    flip(path, offset)
    with pytest.raises(UserError, match=r"train-00000\.tokens was altered"):
      shards.open_split(directory, "train")
    flip(path, offset)


def rewrite_index(directory: Path, edit: Callable[[bytearray], None]) -> None:
  """Alters an index, and the manifest so that its checksum is right again."""
  path = directory / "train-00000.index"
  data = bytearray(path.read_bytes())
  edit(data)
  path.write_bytes(data)
  content = json.loads((directory / layout.MANIFEST).read_text())
  del content["hash"]
  content["splits"]["train"]["shards"][0]["index_crc32"] = zlib.crc32(data)
  content["hash"] = layout._digest(content)
  (directory / layout.MANIFEST).write_text(json.dumps(content))


def put(offset: int, value: int) -> Callable[[bytearray], None]:
  def edit(data: bytearray) -> None:
    data[offset : offset + 4] = value.to_bytes(4, "little")

  return edit


ROW = layout.HEADER_BYTES


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (put(0, 1), "wrong header"),
    (put(8, 9), "wrong header"),
    (put(ROW, 2), "inconsistent document table"),
    (put(ROW + 4, 2**32 - 1), "inconsistent document table"),
    (put(ROW + 8, 2), "inconsistent document table"),
    (put(ROW + 12, 2), "do not add up"),
    (put(ROW + 8, 1), "do not add up"),
  ],
)
def test_an_index_with_a_right_checksum_must_be_consistent(
  make_dataset: MakeDataset, edit: Callable[[bytearray], None], message: str
):
  directory = make_dataset([(b"abc", 0), (b"de", 1)])
  rewrite_index(directory, edit)
  with pytest.raises(UserError, match=message):
    shards.open_split(directory, "train")


def rewrite_tokens(directory: Path, position: int, token: int) -> None:
  """Alters a token, and the checksums above it so that they are right."""
  path = directory / "train-00000.tokens"
  tokens = np.fromfile(path, "<u2")
  tokens[position] = token
  tokens.tofile(path)

  def edit(data: bytearray) -> None:
    data[-4:] = zlib.crc32(tokens.tobytes()).to_bytes(4, "little")

  rewrite_index(directory, edit)


def test_tokens_outside_the_vocabulary_are_refused(make_dataset: MakeDataset):
  directory = make_dataset([(b"abc", 0)])
  rewrite_tokens(directory, 2, 257)
  with pytest.raises(UserError, match="holds token 257"):
    shards.open_split(directory, "train")


@pytest.mark.parametrize(("position", "token"), [(2, E), (4, 7)])
def test_ends_of_text_must_stand_where_the_index_says(
  make_dataset: MakeDataset, position: int, token: int
):
  directory = make_dataset([(b"abc", 0), (b"de", 0)])
  rewrite_tokens(directory, position, token)
  with pytest.raises(UserError, match="end-of-text tokens do not stand"):
    shards.open_split(directory, "train")


def test_more_shards_than_may_be_open_at_once(
  make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(shards, "_OPEN_FILES", 2)
  documents = [(bytes([i]) * 9, i % 2) for i in range(40)]
  split = shards.open_split(
    make_dataset(documents, shard_entries=10), "train", verify="first_use"
  )
  np.testing.assert_array_equal(
    split.read(0, split.tokens + 1), stream_of(documents)
  )
  np.testing.assert_array_equal(
    split.target_sources(0, split.tokens), sources_of(documents)
  )
