"""Writes shards: append, make durable, cut at a size, continue after a crash.

Files have their final names from the start, but they count only once the
manifest is written, at the very end. Until then a `SplitState` says how much of
them is durable, and continuing truncates them to that.
"""

import contextlib
import dataclasses
import os
import re
import zlib
from pathlib import Path

import numpy as np

from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError

_SHARD_FILE = re.compile(r"(train|heldout)-\d+\.(tokens|index)")


@dataclasses.dataclass
class SplitState:
  """How much of a split is written: the finished shards and the open one.

  `open_entries` and `open_documents` are 0 if no shard is open. `counts` has an
  entry for each source id.
  """

  shards: list[files.Shard]
  open_entries: int
  open_documents: int
  counts: list[files.Counts]

  @classmethod
  def empty(cls) -> "SplitState":
    return cls([], 0, 0, [])


class SplitWriter:
  """Appends documents to the shards of a split, from where `state` ends.

  A shard is closed after the first document that takes it to `shard_entries`
  entries, so the files depend only on the documents and their order.
  """

  def __init__(
    self,
    directory: Path,
    name: str,
    tokenizer: files.TokenizerSpec,
    *,
    shard_entries: int,
    state: SplitState,
  ):
    self._directory = directory
    self._name = name
    self._tokenizer = tokenizer
    self._dtype = files.token_dtype(tokenizer.vocab_size)
    self._shard_entries = shard_entries
    self._shards = list(state.shards)
    self._counts = list(state.counts)
    self._open: _OpenShard | None = None
    self._drop_unknown(state)
    if state.open_entries:
      self._open = self._shard_file()
      self._open.restore(state.open_entries, state.open_documents)

  def append(
    self,
    tokens: np.ndarray,
    lengths: np.ndarray,
    sources: np.ndarray,
    sizes: np.ndarray,
  ) -> None:
    """Appends whole documents.

    `tokens` is d1 E d2 E ... dn E. `lengths` (without the end), `sources` (ids)
    and `sizes` (UTF-8 bytes) have an entry for each document.
    """
    ends = np.cumsum(lengths.astype(np.int64) + 1)
    self._count(lengths, sources, sizes)
    first, base = 0, 0
    while first < len(lengths):
      shard = self._open or self._start()
      room = max(self._shard_entries - shard.entries, 1)
      # Up to and including the document that fills the shard.
      last = int(np.searchsorted(ends, base + room)) + 1
      last = min(last, len(lengths))
      end = int(ends[last - 1])
      shard.append(
        tokens[base:end], lengths[first:last], sources[first:last],
        sizes[first:last],
      )  # fmt: skip
      first, base = last, end
      if shard.entries >= self._shard_entries:
        self._finish()

  def flush(self) -> SplitState:
    """Makes everything that was appended durable; returns the state of it."""
    if self._open:
      self._open.flush()
    return SplitState(
      shards=list(self._shards),
      open_entries=self._open.entries if self._open else 0,
      open_documents=self._open.documents if self._open else 0,
      counts=list(self._counts),
    )

  def finish(self) -> SplitState:
    """Closes the open shard; the split is complete."""
    if self._open:
      self._finish()
    return self.flush()

  def close(self) -> None:
    """Closes the files without making anything durable."""
    if self._open:
      self._open.close()
      self._open = None

  def _count(
    self, lengths: np.ndarray, sources: np.ndarray, sizes: np.ndarray
  ) -> None:
    for source in np.unique(sources).tolist():
      while len(self._counts) <= source:
        self._counts.append(files.Counts())
      chosen = sources == source
      documents = int(np.count_nonzero(chosen))
      self._counts[source] += files.Counts(
        documents=documents,
        tokens=int(lengths[chosen].sum(dtype=np.int64)) + documents,
        bytes=int(sizes[chosen].sum(dtype=np.int64)),
      )

  def _shard_file(self) -> "_OpenShard":
    name = f"{self._name}-{len(self._shards):05d}"
    return _OpenShard(self._directory, name, self._dtype)

  def _start(self) -> "_OpenShard":
    self._open = self._shard_file()
    self._open.create(self._tokenizer.end_of_text)
    return self._open

  def _finish(self) -> None:
    assert self._open
    self._shards.append(self._open.finish(self._tokenizer))
    self._open = None

  def _drop_unknown(self, state: SplitState) -> None:
    """Deletes the shards begun after `state` was recorded."""
    known = {shard.name for shard in state.shards}
    if state.open_entries:
      known.add(f"{self._name}-{len(state.shards):05d}")
    for path in self._directory.glob(f"{self._name}-*"):
      if _SHARD_FILE.fullmatch(path.name) and path.stem not in known:
        path.unlink()


class _OpenShard:
  """The shard that is being written."""

  def __init__(self, directory: Path, name: str, dtype: np.dtype):
    self.entries = 0
    self.documents = 0
    self._name = name
    self._dtype = dtype
    self._tokens_path = directory / f"{name}.tokens"
    self._index_path = directory / f"{name}.index"
    self._checksums = _BlockChecksums()
    self._files = contextlib.ExitStack()

  def create(self, end_of_text: int) -> None:
    self._open("wb")
    self._index.write(bytes(files.HEADER_BYTES))
    self._write_tokens(np.array([end_of_text], self._dtype))

  def restore(self, entries: int, documents: int) -> None:
    """Continues a shard whose first `entries` and `documents` are durable."""
    tokens_bytes = entries * self._dtype.itemsize
    index_bytes = files.HEADER_BYTES + documents * files.DOCUMENT.itemsize
    for path, size in (
      (self._tokens_path, tokens_bytes),
      (self._index_path, index_bytes),
    ):
      if not path.is_file() or path.stat().st_size < size:
        raise UserError(
          f"{path} is missing or shorter than the interrupted preparation "
          "left it; delete the output folder and prepare again."
        )
      os.truncate(path, size)
    self._open("ab")
    with open(self._tokens_path, "rb") as file:
      while part := file.read(2**24):
        self._checksums.add(part)
    self.entries, self.documents = entries, documents

  def append(
    self,
    tokens: np.ndarray,
    lengths: np.ndarray,
    sources: np.ndarray,
    sizes: np.ndarray,
  ) -> None:
    if self.entries + len(tokens) > files.MAX_SHARD_TOKENS:
      raise UserError(
        f"Shard {self._name} would exceed {files.MAX_SHARD_TOKENS} tokens; "
        "lower --shard-size or --max-document-size."
      )
    rows = np.empty(len(lengths), files.DOCUMENT)
    ends = self.entries + np.cumsum(lengths.astype(np.int64) + 1)
    rows["start"] = ends - lengths - 1
    rows["length"] = lengths
    rows["source"] = sources
    rows["bytes"] = sizes
    self._write_tokens(tokens.astype(self._dtype, copy=False))
    self._index.write(rows.data)
    self.documents += len(rows)

  def flush(self) -> None:
    for file in (self._tokens, self._index):
      file.flush()
      os.fsync(file.fileno())

  def finish(self, tokenizer: files.TokenizerSpec) -> files.Shard:
    """Completes the index, makes both files durable and closes them."""
    self._index.write(self._checksums.result().data)
    self._index.flush()
    shard = files.Shard(self._name, self.documents, self.entries - 1, 0)
    header = files.index_header(shard, tokenizer)
    crc = zlib.crc32(header)
    with open(self._index_path, "r+b") as file:
      file.write(header)
      while part := file.read(2**24):
        crc = zlib.crc32(part, crc)
    self.flush()
    self.close()
    return dataclasses.replace(shard, index_crc32=crc)

  def close(self) -> None:
    # Closing flushes, which fails again on a full disk. By then the error was
    # reported, and the bytes do not count.
    with contextlib.suppress(OSError):
      self._files.close()

  def _open(self, mode: str) -> None:
    self._tokens = self._files.enter_context(self._tokens_path.open(mode))
    self._index = self._files.enter_context(self._index_path.open(mode))

  def _write_tokens(self, tokens: np.ndarray) -> None:
    data = tokens.data.cast("B")
    self._tokens.write(data)
    self._checksums.add(data)
    self.entries += len(tokens)


class _BlockChecksums:
  """CRC32 of every block of a file that grows by pieces of any size."""

  def __init__(self):
    self._done: list[int] = []
    self._crc = 0
    self._filled = 0

  def add(self, data: bytes | memoryview) -> None:
    view = memoryview(data)
    start = 0
    while start < len(view):
      stop = min(start + files.BLOCK_BYTES - self._filled, len(view))
      self._crc = zlib.crc32(view[start:stop], self._crc)
      self._filled += stop - start
      start = stop
      if self._filled == files.BLOCK_BYTES:
        self._done.append(self._crc)
        self._crc, self._filled = 0, 0

  def result(self) -> np.ndarray:
    partial = [self._crc] if self._filled else []
    return np.array(self._done + partial, "<u4")
