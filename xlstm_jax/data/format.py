"""The files of a prepared dataset, and strict reading of their headers.

A dataset is a folder with `manifest.json`, the tokenizer, and for each shard a
flat file of tokens and an index. docs/data_format.md describes every byte.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax import paths
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
_SHARD_NAME = re.compile(r"(train|heldout)-\d{5,9}")


@dataclasses.dataclass(frozen=True)
class Counts:
  """Documents, target tokens (ends included), and UTF-8 bytes of text."""

  documents: int = 0
  tokens: int = 0
  bytes: int = 0

  def __add__(self, other: "Counts") -> "Counts":
    return Counts(
      self.documents + other.documents,
      self.tokens + other.tokens,
      self.bytes + other.bytes,
    )


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard: `tokens` targets, so `tokens + 1` entries in its token file."""

  name: str
  documents: int
  tokens: int
  index_crc32: int


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """The identity of a tokenizer: equal hashes mean equal ids for any text."""

  kind: str
  hash: str
  vocab_size: int
  end_of_text: int


@dataclasses.dataclass(frozen=True)
class SplitManifest:
  """The counts of a split, per source in the order of `Manifest.sources`."""

  sources: Mapping[str, Counts]
  shards: tuple[Shard, ...]

  @property
  def total(self) -> Counts:
    return sum(self.sources.values(), Counts())


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a prepared folder holds; it is written last, to commit the rest.

  `origin` has settings, inputs and skipped documents, for people and to
  recognise a rerun.
  """

  tokenizer: TokenizerSpec
  sources: tuple[str, ...]
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


def write_atomically(path: Path, data: bytes) -> None:
  """Replaces the content of `path`; after a crash it is the old or the new."""
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
  """Makes the names in `directory` durable."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def read_regular_file(path: Path, *, limit: int) -> bytes:
  """The bytes of a regular file; a UserError if it has more than `limit`."""
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise UserError(f"{path} is not a regular file.")
    if status.st_size > limit:
      raise UserError(
        f"{path} has {status.st_size} bytes; at most {limit} are expected."
      )
    return path.read_bytes()
  except OSError as error:
    raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def parse_json(data: bytes, path: Path) -> Any:
  """Parses JSON from outside; a UserError names `path` if it is malformed."""
  try:
    return json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not valid JSON: {error}.") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
  """Commits a dataset; from now on readers accept the folder."""
  content = _manifest_to_dict(manifest)
  text = json.dumps({**content, "hash": _digest(content)}, indent=1)
  write_atomically(directory / MANIFEST, f"{text}\n".encode())


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
  value = parse_json(read_regular_file(path, limit=MAX_MANIFEST_BYTES), path)
  return _manifest_from_dict(value, path)


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


class Fields:
  """Typed access to a JSON object from outside; errors name the field."""

  def __init__(self, value: Any, path: Path, place: str = ""):
    self._path = path
    self._place = place
    if not isinstance(value, dict):
      raise self.error("", "an object", value)
    self._value = value

  def error(self, name: str, expected: str, value: Any) -> UserError:
    place = ".".join(part for part in (self._place, name) if part) or "content"
    return UserError(
      f"{self._path}: {place} must be {expected}, got {shown(value)}."
    )

  def get(self, name: str, kind: type, expected: str) -> Any:
    value = self._value.get(name)
    if type(value) is not kind:
      raise self.error(name, expected, value)
    return value

  def integer(self, name: str, low: int, high: int) -> int:
    value = self.get(name, int, "an integer")
    if not low <= value <= high:
      raise self.error(name, f"an integer in [{low}, {high}]", value)
    return value

  def string(self, name: str, limit: int = MAX_SOURCE_NAME) -> str:
    value = self.get(name, str, "a string")
    if not 0 < len(value) <= limit:
      raise self.error(name, f"a string of 1 to {limit} characters", value)
    return value

  def fields(self, name: str) -> "Fields":
    place = f"{self._place}.{name}" if self._place else name
    return Fields(self._value.get(name), self._path, place)

  def items(self, name: str) -> list["Fields"]:
    values = self.get(name, list, "a list")
    place = f"{self._place}.{name}" if self._place else name
    return [
      Fields(value, self._path, f"{place}[{i}]")
      for i, value in enumerate(values)
    ]

  def names(self) -> tuple[str, ...]:
    return tuple(self._value)


def _manifest_from_dict(value: Any, path: Path) -> Manifest:
  fields = Fields(value, path)
  if fields.string("format") != FORMAT:
    raise UserError(f"{path} is not a manifest of {FORMAT}.")
  version = fields.get("version", int, "an integer")
  if version != VERSION:
    raise UserError(
      f"{path} has format version {version}, this program reads {VERSION}: "
      "prepare the data again."
    )
  stored = fields.string("hash")
  content = {name: value[name] for name in value if name != "hash"}
  if _digest(content) != stored:
    raise UserError(
      f"{path} was altered: its content does not have the hash it states; "
      "restore the file or prepare the data again."
    )
  tokenizer = tokenizer_spec(value.get("tokenizer"), path)
  sources = _source_names(fields, path)
  splits = fields.fields("splits")
  if sorted(splits.names()) != sorted(SPLITS):
    raise splits.error("", f"the splits {' and '.join(SPLITS)}", splits.names())
  return Manifest(
    tokenizer=tokenizer,
    sources=sources,
    splits={
      name: _split_manifest(splits.fields(name), name, sources)
      for name in SPLITS
    },
    origin=fields.get("origin", dict, "an object"),
  )


def tokenizer_spec(value: Any, path: Path) -> TokenizerSpec:
  """A tokenizer's identity from JSON; a UserError names `path`."""
  fields = Fields(value, path, "tokenizer")
  vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB_SIZE)
  return TokenizerSpec(
    kind=fields.string("kind"),
    hash=fields.string("hash"),
    vocab_size=vocab_size,
    end_of_text=fields.integer("end_of_text", 0, vocab_size - 1),
  )


def _source_names(fields: Fields, path: Path) -> tuple[str, ...]:
  names = fields.get("sources", list, "a list")
  if len(names) > MAX_SOURCES or len(set(map(str, names))) != len(names):
    raise UserError(
      f"{path}: sources must be at most {MAX_SOURCES} names, once."
    )
  for name in names:
    if type(name) is not str or not 0 < len(name) <= MAX_SOURCE_NAME:
      raise fields.error("sources", "a list of short names", name)
  return tuple(names)


def _split_manifest(
  fields: Fields, split: str, sources: tuple[str, ...]
) -> SplitManifest:
  table = fields.fields("sources")
  if table.names() != sources:
    raise table.error("", "a table of all sources, in order", table.names())
  counts = {source: counts_of(table.fields(source)) for source in sources}
  manifest = SplitManifest(
    sources=counts,
    shards=tuple(shard_of(item, split) for item in fields.items("shards")),
  )
  names = [shard.name for shard in manifest.shards]
  expected = [f"{split}-{i:05d}" for i in range(len(names))]
  if names != expected:
    raise fields.error("shards", "numbered in order from 00000", names)
  total = manifest.total
  if counts_of(fields) != total:
    raise fields.error(
      "", "the sum over its sources", dataclasses.asdict(total)
    )
  for name in ("documents", "tokens"):
    over_shards = sum(getattr(shard, name) for shard in manifest.shards)
    if over_shards != getattr(total, name):
      raise fields.error(name, "the sum over its shards", over_shards)
  return manifest


def counts_of(fields: Fields) -> Counts:
  """Counts from JSON."""
  return Counts(
    documents=fields.integer("documents", 0, 2**63 - 1),
    tokens=fields.integer("tokens", 0, 2**63 - 1),
    bytes=fields.integer("bytes", 0, 2**63 - 1),
  )


def shard_of(fields: Fields, split: str) -> Shard:
  """A shard of a split from JSON."""
  name = fields.string("name")
  if not _SHARD_NAME.fullmatch(name) or not name.startswith(f"{split}-"):
    raise fields.error("name", f"like {split}-00000", name)
  documents = fields.integer("documents", 1, MAX_SHARD_TOKENS)
  return Shard(
    name=name,
    documents=documents,
    # A document has at least its end-of-text token.
    tokens=fields.integer("tokens", documents, MAX_SHARD_TOKENS - 1),
    index_crc32=fields.integer("index_crc32", 0, 2**32 - 1),
  )
