"""Small datasets, written without prepare."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xlstm_jax.data import layout, writer
from xlstm_jax.data.tokenizer import ByteTokenizer, Tokenizer

# One (text, source id) per document.
Documents = Sequence[tuple[bytes, int]]
MakeDataset = Callable[..., Path]


def write_split(
  directory: Path,
  name: str,
  documents: Documents,
  tokenizer: Tokenizer,
  shard_entries: int,
) -> writer.SplitState:
  split = writer.SplitWriter(
    directory,
    name,
    tokenizer.spec,
    shard_entries=shard_entries,
    state=writer.SplitState.empty(),
  )
  texts = [text for text, _ in documents]
  if texts:
    tokens, lengths = tokenizer.encode_documents(texts)
    split.append(
      tokens,
      lengths,
      np.array([source for _, source in documents]),
      np.array([len(text) for text in texts]),
    )
  return split.finish()


def write_dataset(
  directory: Path,
  documents: Documents,
  *,
  heldout: Documents = (),
  sources: tuple[str, ...] = ("a", "b"),
  shard_entries: int = 64,
  tokenizer: Tokenizer | None = None,
) -> Path:
  tokenizer = tokenizer or ByteTokenizer()
  directory.mkdir(parents=True, exist_ok=True)
  states = {
    name: write_split(directory, name, part, tokenizer, shard_entries)
    for name, part in (("train", documents), ("heldout", heldout))
  }
  tokenizer.save(directory)
  manifest = layout.Manifest(
    tokenizer=tokenizer.spec,
    sources=sources,
    splits={
      name: layout.SplitManifest(
        sources={
          source: state.counts[i] if i < len(state.counts) else layout.NO_COUNTS
          for i, source in enumerate(sources)
        },
        shards=tuple(state.shards),
      )
      for name, state in states.items()
    },
    origin={},
  )
  layout.write_manifest(directory, manifest)
  return directory
