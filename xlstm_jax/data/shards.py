"""Reads a prepared split as one logical stream of tokens over all its shards.

The stream is E d1 E d2 E ... dn E, with E the end of text. The target of input
position p is token p + 1, so every token of every document, and every end, is a
target exactly once.
"""

import bisect
import functools
import itertools
import os
import stat
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError

Verify = Literal["auto", "opening", "first_use"]

# Below this many bytes of tokens, "auto" checks every block at opening. This
# takes a few seconds, and saves a surprise in the middle of a run.
VERIFY_AT_OPENING_BYTES = 4 * 2**30
# Number of files kept open; the usual limit is 1024.
_OPEN_FILES = 256
_ROWS_PER_CHECK = 2**20


class Document(NamedTuple):
  """One document: the end-of-text before it, its tokens, and its own.

  `source` is an index of `Split.sources`, `bytes` the UTF-8 size of the text.
  """

  tokens: np.ndarray
  source: int
  bytes: int


class _Column:
  """Consecutive values of one type in a file, read when they are needed.

  This is no memory map. If a file fails or shrinks under a map, SIGBUS ends the
  process, and nobody learns which file it was.
  """

  def __init__(self, path: Path, dtype: np.dtype, offset: int, count: int):
    self.path, self.dtype, self.offset, self.count = path, dtype, offset, count
    try:
      self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
      raise UserError(f"Cannot open {path}: {error}.") from error
    weakref.finalize(self, os.close, self._descriptor)

  def __len__(self) -> int:
    return self.count

  @overload
  def __getitem__(self, place: int) -> Any: ...
  @overload
  def __getitem__(self, place: slice) -> np.ndarray: ...
  def __getitem__(self, place: int | slice):
    if not isinstance(place, slice):
      return self[place : place + 1][0]
    start, stop, _ = place.indices(self.count)
    return np.frombuffer(self._bytes(start, max(stop, start)), self.dtype)

  def _bytes(self, start: int, stop: int) -> bytes:
    size = self.dtype.itemsize
    at, end = self.offset + start * size, self.offset + stop * size
    parts = []
    while at < end:  # a read may return less, at most 2 GiB
      try:
        parts.append(os.pread(self._descriptor, end - at, at))
      except OSError as error:
        raise UserError(f"Cannot read {self.path}: {error}.") from error
      if not parts[-1]:
        raise UserError(
          f"{self.path} ends at byte {at} and was longer when it was opened; "
          "restore the file or prepare the data again."
        )
      at += len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _ShardFiles:
  """The files of one shard, and which of their blocks were checked."""

  def __init__(self, directory: Path, shard: files.Shard, dtype: np.dtype):
    self.shard = shard
    self.tokens_path = directory / f"{shard.name}.tokens"
    self.index_path = directory / f"{shard.name}.index"
    self.dtype = dtype
    self.entries = shard.tokens + 1
    self.per_block = files.BLOCK_BYTES // dtype.itemsize
    self.blocks = files.block_count(self.entries, dtype)
    self.unchecked = self.blocks
    self.checked = np.zeros(self.blocks, np.bool_)

  def check_sizes(self) -> None:
    _check_file(self.tokens_path, self.entries * self.dtype.itemsize)
    _check_file(self.index_path, files.index_bytes(self.shard, self.dtype))

  def open_tokens(self) -> _Column:
    return _Column(self.tokens_path, self.dtype, 0, self.entries)

  def open_documents(self) -> _Column:
    return _Column(
      self.index_path,
      files.DOCUMENT,
      files.HEADER_BYTES,
      self.shard.documents,
    )

  def open_checksums(self) -> _Column:
    start = files.HEADER_BYTES + files.DOCUMENT.itemsize * self.shard.documents
    return _Column(self.index_path, np.dtype("<u4"), start, self.blocks)


class Split:
  """A split of a prepared dataset; made by `open_split`.

  Reading is thread-safe. `tokens` counts targets; the stream has one entry
  more.
  """

  def __init__(self, directory: Path, name: str, manifest: files.Manifest):
    split = manifest.splits[name]
    self.directory = directory
    self.name = name
    self.manifest = manifest
    self.sources = manifest.sources
    self.counts: Mapping[str, files.Counts] = split.sources
    self.dtype = manifest.dtype
    self.end_of_text = manifest.tokenizer.end_of_text
    self.vocab_size = manifest.tokenizer.vocab_size
    self.documents = split.total.documents
    self.tokens = split.total.tokens
    self.bytes = split.total.bytes
    self._shards = [_ShardFiles(directory, s, self.dtype) for s in split.shards]
    # For each shard, the stream offset of its leading E, which is also the last
    # entry of the shard before; and the number of its first document.
    self._starts = _cumulative(s.tokens for s in split.shards)
    self._first_documents = _cumulative(s.documents for s in split.shards)
    cache = functools.lru_cache(maxsize=_OPEN_FILES)
    self._tokens_of = cache(lambda i: self._shards[i].open_tokens())
    self._documents_of = cache(lambda i: self._shards[i].open_documents())

  def read(self, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of the stream, 0 <= start <= stop <= tokens + 1.

    Raises:
      UserError: a file cannot be read, or a block used for the first time was
        altered.
    """
    if not 0 <= start <= stop <= self.tokens + 1:
      raise IndexError(f"[{start}, {stop}) of {self.tokens + 1} entries")
    # The last entry of a shard is the first of the next; either can be read.
    first = min(_find(self._starts, start), len(self._shards) - 1)
    base = self._starts[first]
    if stop <= base + self._shards[first].entries:
      return self._read(first, start - base, stop - base)
    parts = []
    while start < stop:
      base = self._starts[first]
      end = min(stop, base + self._shards[first].entries)
      parts.append(self._read(first, start - base, end - base))
      start, first = end, first + 1
    # Later shards were read from after their leading E, which was already read.
    return np.concatenate(parts)

  def _read(self, index: int, start: int, stop: int) -> np.ndarray:
    shard = self._shards[index]
    tokens = self._tokens_of(index)
    if shard.unchecked:
      self._check_blocks(index, start, stop)
    return tokens[start:stop]

  def window_count(self, context: int) -> int:
    """Number of windows of `context` input positions, the last one padded."""
    return -(-self.tokens // context)

  def windows(self, numbers: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """The windows with these numbers, as a batch of int32 arrays [B, T].

    Returns "inputs", "targets" and "segments". Segments number the documents of
    a window from 1; 0 is padding after the end of the stream.
    """
    return read_windows([self] * len(numbers), numbers, context)

  def window_sources(self, numbers: np.ndarray, context: int) -> np.ndarray:
    """The source of every target of these windows, int32 [B, T]; -1 is padding.

    A document's end belongs to the source of the document it ends.
    """
    sources_BT = np.full((len(numbers), context), -1, np.int32)
    for row, number in enumerate(numbers):
      start = int(number) * context
      found = self.target_sources(start, min(start + context, self.tokens))
      sources_BT[row, : len(found)] = found
    return sources_BT

  def target_sources(self, start: int, stop: int) -> np.ndarray:
    """Sources (int32) of the targets of input positions [start, stop)."""
    parts = [np.empty(0, np.int32)]
    while start < stop:
      index = _find(self._starts, start)
      base, end = self._starts[index], self._starts[index + 1]
      end = min(stop, end)
      parts.append(self._shard_sources(index, start - base, end - base))
      start = end
    return np.concatenate(parts)

  def _shard_sources(self, index: int, start: int, stop: int) -> np.ndarray:
    table = self._documents_of(index)
    # Input position p belongs to the document with start - 1 <= p.
    first = _find(table, start + 1, key=_start)
    last = _find(table, stop, key=_start) + 1
    rows = table[first:last]
    edges = np.append(rows["start"].astype(np.int64) - 1, stop)
    edges[0] = start
    return np.repeat(rows["source"].astype(np.int32), np.diff(edges))

  def document(self, number: int) -> Document:
    """The document with this number, 0 <= number < documents."""
    if not 0 <= number < self.documents:
      raise IndexError(f"document {number} of {self.documents}")
    index = _find(self._first_documents, number)
    row = self._documents_of(index)[number - self._first_documents[index]]
    start = int(row["start"])
    tokens = self._read(index, start - 1, start + int(row["length"]) + 1)
    return Document(tokens, int(row["source"]), int(row["bytes"]))

  def document_lengths(self) -> np.ndarray:
    """Tokens of every document without its end, uint32 in stream order."""
    return self._of_documents("length")

  def document_sources(self) -> np.ndarray:
    """The source of every document, an index of `sources`, in stream order."""
    return self._of_documents("source")

  def _of_documents(self, field: str) -> np.ndarray:
    tables = map(self._documents_of, range(len(self._shards)))
    values = [table[:][field] for table in tables]
    return np.concatenate([np.empty(0, files.DOCUMENT[field]), *values])

  def chunks(self, positions: int = 2**20) -> Iterator[tuple[int, np.ndarray]]:
    """The stream in pieces of at most `positions` inputs, for counting n-grams.

    Yields (start, tokens): inputs are tokens[:-1], targets tokens[1:], and
    start is the stream position of tokens[0].
    """
    for start in range(0, self.tokens, positions):
      yield start, self.read(start, min(start + positions, self.tokens) + 1)

  def check(self) -> None:
    """Checks all blocks not checked yet; a UserError names the bad file."""
    for index, shard in enumerate(self._shards):
      self._check_blocks(index, 0, shard.entries)
      self._check_borders(index)

  def _check_blocks(self, index: int, start: int, stop: int) -> None:
    shard = self._shards[index]
    tokens = self._tokens_of(index)
    low, high = start // shard.per_block, -(-stop // shard.per_block)
    todo = np.flatnonzero(~shard.checked[low:high]) + low
    if not len(todo):
      return
    expected = shard.open_checksums()[:]
    for block in todo.tolist():
      part = tokens[block * shard.per_block : (block + 1) * shard.per_block]
      if zlib.crc32(part) != expected[block]:
        raise UserError(
          f"{shard.tokens_path} was altered: block {block} (bytes "
          f"{block * files.BLOCK_BYTES} to "
          f"{block * files.BLOCK_BYTES + part.nbytes}) does not have its "
          "checksum; restore the file or prepare the data again."
        )
      if int(part.max()) >= self.vocab_size:
        raise UserError(
          f"{shard.tokens_path}: block {block} holds token {part.max()}, but "
          f"the vocabulary has {self.vocab_size} ids."
        )
      shard.checked[block] = True
    # Recounted, not decremented, because two threads may check the same block.
    shard.unchecked = shard.blocks - int(np.count_nonzero(shard.checked))

  def _check_borders(self, index: int) -> None:
    """Checks that end-of-text tokens stand exactly where the table says.

    `segments` finds them in the tokens, so both must agree.
    """
    shard = self._shards[index]
    tokens = self._tokens_of(index)
    table = self._documents_of(index)
    documents = shard.shard.documents
    found, right = 0, True
    for first in range(0, shard.entries, _ROWS_PER_CHECK):
      part = tokens[first : first + _ROWS_PER_CHECK]
      ends = np.flatnonzero(part == self.end_of_text) + first
      # One stands before every document, and one at the end.
      rows = table[found : min(found + len(ends), documents)]
      expected = rows["start"].astype(np.int64) - 1
      right = right and bool((ends[: len(rows)] == expected).all())
      found += len(ends)
    if found != documents + 1 or not right:
      raise UserError(
        f"{shard.tokens_path}: its end-of-text tokens do not stand where its "
        "index says; prepare the data again."
      )


def open_split(
  directory: str | os.PathLike[str], split: str, *, verify: Verify = "auto"
) -> Split:
  """Opens and checks a split of a folder that prepare wrote.

  The manifest, the file sizes and the indices are always checked here. Token
  blocks are checked here too ("opening"), or each at its first use
  ("first_use"); "auto" checks them here if they are smaller than 4 GiB.

  Raises:
    UserError: there is no such split, it is empty, or a file is missing,
      truncated or altered; the message names the file.
  """
  directory = Path(directory)
  manifest = files.read_manifest(directory)
  if split not in manifest.splits:
    raise UserError(
      f"{directory} has the splits {', '.join(manifest.splits)}, not {split}."
    )
  result = Split(directory, split, manifest)
  if not result.documents:
    raise UserError(
      f"The split {split} of {directory} is empty; prepare it with another "
      "--heldout-fraction."
    )
  counts = [files.Counts()] * len(result.sources)
  for shard in result._shards:
    shard.check_sizes()
    _check_index(shard, manifest.tokenizer, counts)
  if dict(zip(result.sources, counts, strict=True)) != dict(result.counts):
    raise UserError(
      f"The indices of {directory} do not add up to the counts of its "
      f"{files.MANIFEST}; prepare the data again."
    )
  small = result.tokens * result.dtype.itemsize < VERIFY_AT_OPENING_BYTES
  if verify == "opening" or (verify == "auto" and small):
    result.check()
  return result


def read_windows(
  splits: Sequence[Split], numbers: np.ndarray, context: int
) -> dict[str, np.ndarray]:
  """Like `Split.windows`, with a split per window; all share a tokenizer."""
  starts_B = numbers * context
  stream_ends_B = np.array([split.tokens for split in splits])
  ends_B = np.minimum(starts_B + context, stream_ends_B)
  # One more than the inputs, for the last target.
  tokens_BT = np.zeros((len(numbers), context + 1), splits[0].dtype)
  for row, (split, start, end) in enumerate(
    zip(splits, starts_B.tolist(), ends_B.tolist(), strict=True)
  ):
    tokens_BT[row, : end - start + 1] = split.read(start, end + 1)
  inputs_BT = tokens_BT[:, :-1].astype(np.int32)
  targets_BT = tokens_BT[:, 1:].astype(np.int32)
  segments_BT = segments(inputs_BT, splits[0].end_of_text)
  lengths_B = ends_B - starts_B
  if (lengths_B < context).any():
    real_BT = np.arange(context) < lengths_B[:, None]
    for array in (inputs_BT, targets_BT, segments_BT):
      array *= real_BT
  return {
    "inputs": inputs_BT,
    "targets": targets_BT,
    "segments": segments_BT,
  }


def segments(inputs_BT: np.ndarray, end_of_text: int) -> np.ndarray:
  """Numbers the documents of each row from 1 (int32 [B, T]).

  An end-of-text token opens the segment of the document after it.
  """
  opens_BT = inputs_BT == end_of_text
  # A row that starts inside a document opens a segment as well.
  opens_BT[:, :1] = True
  return np.cumsum(opens_BT, axis=1, dtype=np.int32)


def _check_file(path: Path, size: int) -> None:
  try:
    status = os.stat(path)
  except OSError as error:
    raise UserError(
      f"Cannot read {path}, which the manifest lists: {error.strerror}."
    ) from error
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f"{path} is not a regular file.")
  if status.st_size != size:
    raise UserError(
      f"{path} was truncated or altered: it has {status.st_size} bytes, the "
      f"manifest says {size}; restore the file or prepare the data again."
    )


def _check_index(
  shard: _ShardFiles,
  tokenizer: files.TokenizerSpec,
  counts: list[files.Counts],
) -> None:
  """Checks a shard's index and adds what it lists to `counts` per source."""
  path = shard.index_path
  size = files.index_bytes(shard.shard, shard.dtype)
  content = _Column(path, np.dtype(np.uint8), 0, size)
  crc32 = 0
  for first in range(0, size, _ROWS_PER_CHECK):
    crc32 = zlib.crc32(content[first : first + _ROWS_PER_CHECK], crc32)
  if crc32 != shard.shard.index_crc32:
    raise UserError(
      f"{path} was altered: it does not have the checksum in the manifest; "
      "restore the file or prepare the data again."
    )
  header = files.index_header(shard.shard, tokenizer)
  if content[: files.HEADER_BYTES].tobytes() != header:
    raise UserError(f"{path} does not belong to its manifest (wrong header).")
  table = shard.open_documents()
  expected_start = 1
  for first in range(0, len(table), _ROWS_PER_CHECK):
    rows = table[first : first + _ROWS_PER_CHECK]
    starts = rows["start"].astype(np.int64)
    nexts = starts + rows["length"] + 1
    chained = np.append(expected_start, nexts[:-1])
    if (starts != chained).any() or rows["source"].max() >= len(counts):
      raise UserError(f"{path} has an inconsistent document table.")
    expected_start = int(nexts[-1])
    _add_counts(rows, counts)
  if expected_start != shard.entries:
    raise UserError(f"{path} has an inconsistent document table.")


def _add_counts(rows: np.ndarray, counts: list[files.Counts]) -> None:
  for source in np.unique(rows["source"]).tolist():
    chosen = rows[rows["source"] == source]
    tokens = int(chosen["length"].sum(dtype=np.int64)) + len(chosen)
    size = int(chosen["bytes"].sum(dtype=np.int64))
    counts[source] += files.Counts(len(chosen), tokens, size)


def _start(row: np.void) -> int:
  return int(row["start"])


def _cumulative(sizes: Iterable[int]) -> list[int]:
  return list(itertools.accumulate(sizes, initial=0))


def _find(starts, position: int, key: Callable | None = None) -> int:
  """Index of the last start <= position; reads only a few of a column."""
  return bisect.bisect_right(starts, position, key=key) - 1
