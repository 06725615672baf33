"""Encodes pieces of the inputs as documents of tokens, in other processes."""

import dataclasses
import hashlib
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np

from xlstm_jax.data import documents, tokenizer
from xlstm_jax.data import format as files

_ENDS_INSIDE = "its text cannot be told from the end of a text"


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
  """Whole documents of one split: tokens d1 E d2 E ... dn E, and their entries.

  `lengths` do not count the end, `sources` are indices of `Encoded.sources`,
  and `sizes` are UTF-8 bytes.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  sources: np.ndarray
  sizes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The encoded documents of some pieces; the last piece ends at `end`.

  `sources` are in the order in which the documents first name them. `empty`
  counts the lines without text.
  """

  end: documents.Place
  raw: int
  splits: dict[str, EncodedSplit]
  sources: list[str]
  problems: list[documents.Problem]
  empty: int


class Encoder:
  """Parses pieces, splits the documents by their hash and encodes them."""

  def __init__(
    self,
    tokens: tokenizer.Tokenizer,
    *,
    heldout_fraction: float,
    max_document_bytes: int,
  ):
    self._tokenizer = tokens
    self._heldout_fraction = heldout_fraction
    self._max_document_bytes = max_document_bytes

  def __call__(self, pieces: Sequence[documents.Piece]) -> Encoded:
    """Encodes the documents of consecutive pieces."""
    found, problems, empty = [], [], 0
    for piece in pieces:
      parsed = documents.parse(
        piece, max_document_bytes=self._max_document_bytes
      )
      found += parsed.documents
      problems += parsed.problems
      empty += parsed.empty
    names = dict.fromkeys(document.source for document in found)
    sources = {name: i for i, name in enumerate(names)}
    chosen = {name: [] for name in files.SPLITS}
    for document in found:
      chosen[split_of(document.text, self._heldout_fraction)].append(document)
    splits = {}
    for name, part in chosen.items():
      splits[name], wrong = self._encode(part, sources)
      problems += wrong
    return Encoded(
      end=pieces[-1].end,
      raw=pieces[-1].raw,
      splits=splits,
      sources=list(sources),
      problems=sorted(problems),
      empty=empty,
    )

  def _encode(
    self, part: list[documents.Document], sources: dict[str, int]
  ) -> tuple[EncodedSplit, list[documents.Problem]]:
    tokens, lengths = self._tokenizer.encode_documents([d.text for d in part])
    keep = lengths >= 0
    problems = [
      documents.Problem(part[i].file, part[i].line, _ENDS_INSIDE)
      for i in np.flatnonzero(~keep).tolist()
    ]
    encoded = EncodedSplit(
      tokens=tokens,
      lengths=lengths[keep],
      sources=np.array([sources[d.source] for d in part], np.int64)[keep],
      sizes=np.array([len(d.text) for d in part], np.int64)[keep],
    )
    return encoded, problems


def split_of(text: bytes, heldout_fraction: float) -> str:
  """The split of a document, which depends on its UTF-8 text alone.

  Equal texts share a split, and neither order nor file layout matters.
  """
  digest = hashlib.blake2b(text, digest_size=8).digest()
  drawn = int.from_bytes(digest, "big") / 2**64
  return "heldout" if drawn < heldout_fraction else "train"


def start_worker(
  directory: Path, heldout_fraction: float, max_document_bytes: int
) -> None:
  """Prepares a process of the pool to `encode`.

  `directory` holds the tokenizer for `tokenizer.load`.
  """
  global _encoder
  # The terminal interrupts all processes; the parent decides what happens.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  # The processes already share the cores.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  _encoder = Encoder(
    tokenizer.load(directory),
    heldout_fraction=heldout_fraction,
    max_document_bytes=max_document_bytes,
  )


def encode(pieces: Sequence[documents.Piece]) -> Encoded:
  """Encodes in a process that `start_worker` prepared."""
  assert _encoder
  return _encoder(pieces)


_encoder: Encoder | None = None


def _end_with_parent() -> None:
  # A killed parent closes no queue, so its workers would wait for ever.
  parent = parent_process()
  if parent:
    connection.wait([parent.sentinel])
    os._exit(1)
