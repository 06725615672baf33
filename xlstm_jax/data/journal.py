"""How far a preparation got, so that an interrupted one can continue.

`prepare.json` is replaced atomically, after everything that it counts was made
durable. It stays beside the manifest, to recognise the command when it is run
again.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from xlstm_jax.data import documents, writer
from xlstm_jax.data import format as files
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
  place: documents.Place = documents.Place()
  sources: list[str] = dataclasses.field(default_factory=list)
  splits: dict[str, writer.SplitState] = dataclasses.field(
    default_factory=lambda: {
      name: writer.SplitState.empty() for name in files.SPLITS
    }
  )
  skipped: int = 0
  empty_files: int = 0
  empty_lines: int = 0
  rules: int = documents.RULES

  @property
  def totals(self) -> dict[str, files.Counts]:
    """The counts of each split over all sources."""
    return {
      name: sum(state.counts, files.Counts())
      for name, state in self.splits.items()
    }

  def save(self, directory: Path) -> None:
    """Replaces the journal of `directory` atomically."""
    content = dataclasses.asdict(self)
    data = {"version": _VERSION, **content, "hash": _digest(content)}
    text = json.dumps(data, indent=1)
    files.write_atomically(directory / files.PROGRESS, f"{text}\n".encode())


def load(directory: Path) -> Journal | None:
  """The journal of a folder; None if there is none.

  Raises:
    UserError: it was altered, or another version of this program wrote it.
  """
  path = directory / files.PROGRESS
  if not path.exists():
    return None
  data = files.parse_json(files.read_regular_file(path, limit=_MAX_BYTES), path)
  if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
    raise UserError(
      f"{path} is of another version of this program; use another --output."
    )
  stored = data.pop("hash", None)
  if stored != _digest(data):
    raise UserError(
      f"{path} was altered: it does not have the hash it states; delete "
      f"{directory} and prepare again."
    )
  return _from_fields(files.Fields(data, path))


def _from_fields(fields: files.Fields) -> Journal:
  place = fields.get("place", list, "a list")
  if [type(number) for number in place] != [int] * 4 or min(place) < 0:
    raise fields.error("place", "four numbers", place)
  sources = fields.get("sources", list, "a list")
  if not all(type(name) is str for name in sources):
    raise fields.error("sources", "a list of names", sources)
  splits = fields.fields("splits")
  # Version 1 of the rules had no number and counted empty lines as bad.
  numbered = "rules" in fields.names()
  return Journal(
    settings=fields.get("settings", dict, "an object"),
    listing=fields.get("listing", str, "a string"),
    sizes=fields.get("sizes", str, "a string"),
    tokenizer=fields.get("tokenizer", str, "a string"),
    place=documents.Place(*place),
    sources=sources,
    splits={
      name: _split_state(splits.fields(name), name, sources)
      for name in files.SPLITS
    },
    skipped=fields.integer("skipped", 0, 2**63),
    empty_files=fields.integer("empty_files", 0, 2**63),
    empty_lines=fields.integer("empty_lines", 0, 2**63) if numbered else 0,
    rules=fields.integer("rules", 2, documents.RULES) if numbered else 1,
  )


def _split_state(
  fields: files.Fields, name: str, sources: list[str]
) -> writer.SplitState:
  counts = [files.counts_of(item) for item in fields.items("counts")]
  if len(counts) > len(sources):
    raise fields.error("counts", "at most one a source", len(counts))
  return writer.SplitState(
    shards=[files.shard_of(item, name) for item in fields.items("shards")],
    open_entries=fields.integer("open_entries", 0, files.MAX_SHARD_TOKENS),
    open_documents=fields.integer("open_documents", 0, files.MAX_SHARD_TOKENS),
    counts=counts,
  )


def _digest(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
