"""The files of a prepared dataset, and strict reading of their headers.

A dataset is a folder with `manifest.json`, the tokenizer, and for each shard a
flat file of tokens and an index. docs/data_format.md describes every byte.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from xlstm_jax import files, paths
from xlstm_jax.errors import UserError, shown

FORMAT = "xlstm_jax token shards"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "prepare.json"
SKIPPED = "skipped.jsonl"
SPLITS = ("train", "heldout")

# A cold read of one window checks at most one extra block on either side.
BLOCK_BYTES = 16 * 1024
DOCUMENT = np.dtype(
  [("start", "<u4"), ("length", "<u4"), ("source", "<u4"), ("bytes", "<u4")]
)
MAX_SHARD_TOKENS = 2**32 - 1
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_SOURCES = 4096
MAX_SOURCE_NAME = 200
# Token ids are int32 in the batches.
MAX_VOCAB_SIZE = 2**31 - 1

_MAGIC = b"XLSTMIDX"
_HEADER = struct.Struct("<8sIIQQQII16x")
HEADER_BYTES = _HEADER.size

_ADVICE = "Restore the file or prepare the data again."
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_SOURCE_NAME)]


@dataclasses.dataclass(frozen=True)
class Counts:
  """Documents, target tokens (ends included), and UTF-8 bytes of text."""

  documents: Count
  tokens: Count
  bytes: Count

  def __add__(self, other: "Counts") -> "Counts":
    return Counts(
      self.documents + other.documents,
      self.tokens + other.tokens,
      self.bytes + other.bytes,
    )


NO_COUNTS = Counts(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard: `tokens` targets, so `tokens + 1` entries in its token file."""

  name: Annotated[str, Meta(pattern=r"\A(train|heldout)-[0-9]{5,9}\Z")]
  documents: Annotated[int, Meta(ge=1, le=MAX_SHARD_TOKENS)]
  tokens: Annotated[int, Meta(ge=1, le=MAX_SHARD_TOKENS - 1)]
  index_crc32: Annotated[int, Meta(ge=0, le=2**32 - 1)]

  def __post_init__(self):
    if self.tokens < self.documents:
      raise ValueError(
        f"{self.documents} documents have at least as many tokens, an end each"
      )


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """The identity of a tokenizer: equal hashes mean equal ids for any text."""

  kind: Name
  hash: Name
  vocab_size: Annotated[int, Meta(ge=1, le=MAX_VOCAB_SIZE)]
  end_of_text: Count

  def __post_init__(self):
    if self.end_of_text >= self.vocab_size:
      raise ValueError(f"end_of_text must be below {self.vocab_size}")


@dataclasses.dataclass(frozen=True)
class SplitManifest:
  """The counts of a split, per source in the order of `Manifest.sources`."""

  sources: Mapping[Name, Counts]
  shards: tuple[Shard, ...]

  @property
  def total(self) -> Counts:
    return sum(self.sources.values(), NO_COUNTS)


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a prepared folder holds; it is written last, to commit the rest.

  `origin` has settings, inputs and skipped documents, for people and to
  recognise a rerun.
  """

  tokenizer: TokenizerSpec
  sources: Annotated[tuple[Name, ...], Meta(max_length=MAX_SOURCES)]
  splits: Mapping[str, SplitManifest]
  origin: Mapping[str, Any]

  @property
  def dtype(self) -> np.dtype:
    return token_dtype(self.tokenizer.vocab_size)

  @property
  def hash(self) -> str:
    """SHA-256 of the content, which changes whenever a shard does."""
    return _digest(_manifest_to_dict(self))


def token_dtype(vocab_size: int) -> np.dtype:
  """The narrowest of uint16 and uint32 that holds every id, little-endian."""
  return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def block_count(tokens: int, dtype: np.dtype) -> int:
  """Number of checksummed blocks in a token file of `tokens` entries."""
  return -(-tokens * dtype.itemsize // BLOCK_BYTES)


def index_bytes(shard: Shard, dtype: np.dtype) -> int:
  """Size of a shard's index file: header, document rows, block checksums."""
  blocks = block_count(shard.tokens + 1, dtype)
  return HEADER_BYTES + DOCUMENT.itemsize * shard.documents + 4 * blocks


def index_header(shard: Shard, tokenizer: TokenizerSpec) -> bytes:
  """The first 64 bytes of a shard's index file."""
  dtype = token_dtype(tokenizer.vocab_size)
  entries = shard.tokens + 1
  return _HEADER.pack(
    _MAGIC,
    VERSION,
    dtype.itemsize,
    entries,
    shard.documents,
    block_count(entries, dtype),
    tokenizer.end_of_text,
    BLOCK_BYTES,
  )


def write_manifest(directory: Path, manifest: Manifest) -> None:
  """Commits a dataset; from now on readers accept the folder."""
  content = _manifest_to_dict(manifest)
  content["hash"] = _digest(content)
  files.write_json(directory / MANIFEST, content)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
  """The manifest of a prepared folder.

  Raises:
    UserError: there is none, preparation was interrupted, or it was altered.
  """
  # A path that cannot be reached must not look like an empty one.
  paths.reachable(os.fspath(directory))
  path = Path(directory) / MANIFEST
  if not path.exists():
    if (path.parent / PROGRESS).exists():
      raise UserError(
        f"The preparation of {directory} was interrupted; run the same prepare "
        "command again to finish it."
      )
    raise UserError(
      f"{directory} holds no prepared dataset (no {MANIFEST}); make one with "
      "python -m xlstm_jax.prepare."
    )
  content = files.read_json(path, dict[str, Any], limit=MAX_MANIFEST_BYTES)
  return _manifest_from_dict(content, path)


def _manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
  splits = {
    name: {
      **dataclasses.asdict(split.total),
      "sources": {
        source: dataclasses.asdict(counts)
        for source, counts in split.sources.items()
      },
      "shards": [dataclasses.asdict(shard) for shard in split.shards],
    }
    for name, split in manifest.splits.items()
  }
  return {
    "format": FORMAT,
    "version": VERSION,
    "tokenizer": dataclasses.asdict(manifest.tokenizer),
    "sources": list(manifest.sources),
    "splits": splits,
    "origin": dict(manifest.origin),
  }


def _digest(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def _manifest_from_dict(content: dict[str, Any], path: Path) -> Manifest:
  if content.get("format") != FORMAT:
    raise UserError(f"{path} is not a manifest of {FORMAT}.")
  if (version := content.get("version")) != VERSION:
    raise UserError(
      f"{path} has format version {shown(version)}, this program reads "
      f"{VERSION}: prepare the data again."
    )
  if content.pop("hash", None) != _digest(content):
    raise UserError(
      f"{path} was altered: its content does not have the hash it states; "
      "restore the file or prepare the data again."
    )
  manifest = files.convert(content, Manifest, path, advice=_ADVICE)
  for place, value, expected in _contradictions(manifest, content):
    expected = f"it must be {expected}"
    raise files.fault(path, f"$.{place}", value, expected, _ADVICE)
  return manifest


def _contradictions(
  manifest: Manifest, content: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
  """Places, with the value and what else it must be to agree with the rest."""
  names = manifest.sources
  if len(set(names)) != len(names):
    yield "sources", names, "a list with each name once"
  if sorted(manifest.splits) != sorted(SPLITS):
    yield "splits", [*manifest.splits], " and ".join(SPLITS)
  for name, split in manifest.splits.items():
    at = f"splits.{name}"
    if tuple(split.sources) != names:
      yield f"{at}.sources", [*split.sources], "all sources, in order"
    shards = [shard.name for shard in split.shards]
    if shards != [f"{name}-{i:05d}" for i in range(len(shards))]:
      yield f"{at}.shards", shards, f"{name}-00000 and so on, in order"
    total = dataclasses.asdict(split.total)
    stated = {key: content["splits"][name].get(key) for key in total}
    if stated != total:
      yield at, stated, f"the sum over its sources, {total}"
    for key in ("documents", "tokens"):
      of_shards = sum(getattr(shard, key) for shard in split.shards)
      if of_shards != total[key]:
        yield f"{at}.{key}", total[key], f"the sum over its shards, {of_shards}"
