"""How far a preparation got, so that an interrupted one can continue.

`prepare.json` is replaced atomically, after everything that it counts was made
durable. It stays beside the manifest, to recognise the command when it is run
again.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from xlstm_jax import files
from xlstm_jax.data import documents, layout, writer
from xlstm_jax.data.layout import Count
from xlstm_jax.data.readers.reader import Place
from xlstm_jax.errors import UserError

_VERSION = 1
_MAX_BYTES = 256 * 2**20


@dataclasses.dataclass
class Journal:
  """The command, and how much of its work is done.

  Attributes:
    settings: Everything that shapes the output, by the names of the options.
    listing: Hash of the inputs' names, sizes and times.
    sizes: The same without the times.
    tokenizer: Hash of the tokenizer; empty before it is trained.
    place: How far the inputs were read.
    sources: Names of the sources, in the order of their ids.
    splits: How much of each split is durable.
    skipped: Number of documents that could not be read, which `skipped.jsonl`
      lists.
    empty_files: Number of files without text.
    empty_lines: Number of JSON lines without text.
    rules: Version of the rules by which inputs are read (`documents.RULES`).
  """

  settings: dict[str, Any]
  listing: str
  sizes: str
  tokenizer: str = ""
  place: Place = Place()
  sources: list[str] = dataclasses.field(default_factory=list)
  splits: dict[str, writer.SplitState] = dataclasses.field(
    default_factory=lambda: {
      name: writer.SplitState.empty() for name in layout.SPLITS
    }
  )
  skipped: Count = 0
  empty_files: Count = 0
  empty_lines: Count = 0
  rules: Annotated[int, Meta(ge=1, le=documents.RULES)] = documents.RULES

  def __post_init__(self):
    if {*self.splits} != {*layout.SPLITS}:
      raise ValueError(f"the splits must be {' and '.join(layout.SPLITS)}")
    for name, split in self.splits.items():
      if len(split.counts) > len(self.sources):
        raise ValueError(f"{name} has more counts than there are sources")
      if not all(shard.name.startswith(f"{name}-") for shard in split.shards):
        raise ValueError(f"{name} has a shard of another name")

  @property
  def totals(self) -> dict[str, layout.Counts]:
    """The counts of each split over all sources."""
    return {
      name: sum(state.counts, layout.NO_COUNTS)
      for name, state in self.splits.items()
    }

  def save(self, directory: Path) -> None:
    """Replaces the journal of `directory` atomically."""
    content = dataclasses.asdict(self)
    data = {"version": _VERSION, **content, "hash": _digest(content)}
    files.write_json(directory / layout.PROGRESS, data)


def load(directory: Path) -> Journal | None:
  """The journal of a folder; None if there is none.

  Raises:
    UserError: it was altered, or another version of this program wrote it.
  """
  path = directory / layout.PROGRESS
  if not path.exists():
    return None
  data = files.read_json(path, dict[str, Any], limit=_MAX_BYTES)
  if data.pop("version", None) != _VERSION:
    raise UserError(
      f"{path} is of another version of this program; use another --output."
    )
  stored = data.pop("hash", None)
  if stored != _digest(data):
    raise UserError(
      f"{path} was altered: it does not have the hash it states; delete "
      f"{directory} and prepare again."
    )
  # The first rules had no number and took empty lines for bad ones.
  data.setdefault("rules", 1)
  advice = f"Delete {directory} and prepare again."
  return files.convert(data, Journal, path, advice=advice)


def _digest(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
