"""Encodes units of the inputs as documents of tokens, in other processes."""

import dataclasses
import hashlib
import itertools
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np

from xlstm_jax.data import documents, layout, tokenizer
from xlstm_jax.data.readers.reader import Document, Place, Problem, Unit

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
  """The encoded documents of some units; the last unit ends at `end`.

  `sources` are in the order in which the documents first name them. `empty`
  counts the lines without text.
  """

  end: Place
  raw: int
  splits: dict[str, EncodedSplit]
  sources: list[str]
  problems: list[Problem]
  empty: int


class Encoder:
  """Parses units, splits the documents by their hash and encodes them."""

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

  def __call__(self, units: Sequence[Unit]) -> Encoded:
    """Encodes the documents of consecutive units."""
    found, problems, empty = [], [], 0
    for unit in units:
      parsed = documents.parse(
        unit, max_document_bytes=self._max_document_bytes
      )
      for document in parsed.documents:
        if document.tokens is not None:
          document, problem = self._with_text(document, document.tokens)
          if problem is not None:
            problems.append(problem)
            continue
        found.append(document)
      problems += parsed.problems
      empty += parsed.empty
    names = dict.fromkeys(document.source for document in found)
    sources = {name: i for i, name in enumerate(names)}
    chosen = {name: [] for name in layout.SPLITS}
    for document in found:
      chosen[split_of(document.text, self._heldout_fraction)].append(document)
    splits = {}
    for name, part in chosen.items():
      splits[name], wrong = self._encode(part, sources)
      problems += wrong
    return Encoded(
      end=units[-1].end,
      raw=units[-1].raw,
      splits=splits,
      sources=list(sources),
      problems=sorted(problems),
      empty=empty,
    )

  def _with_text(
    self, document: Document, tokens: np.ndarray
  ) -> tuple[Document, Problem | None]:
    """A document of token ids and their text, or what is wrong with them."""
    ids, end = self._tokenizer.vocab_size, self._tokenizer.end_of_text
    reason = None
    if not len(tokens):
      reason = "no tokens"
    elif tokens.min() < 0 or tokens.max() >= ids:
      wrong = tokens[(tokens < 0) | (tokens >= ids)][0]
      reason = f"token id {wrong}, but the tokenizer has ids below {ids}"
    elif (tokens == end).any():
      reason = f"the id {end} of the end of a text inside"
    if reason is not None:
      return document, Problem(document.file, document.line, reason)
    text = self._tokenizer.decode(tokens.tolist()).encode()
    return document._replace(text=text), None

  def _encode(
    self, part: list[Document], sources: dict[str, int]
  ) -> tuple[EncodedSplit, list[Problem]]:
    tokens, lengths = self._tokens(part)
    keep = lengths >= 0
    problems = [
      Problem(part[i].file, part[i].line, _ENDS_INSIDE)
      for i in np.flatnonzero(~keep).tolist()
    ]
    encoded = EncodedSplit(
      tokens=tokens,
      lengths=lengths[keep],
      sources=np.array([sources[d.source] for d in part], np.int64)[keep],
      sizes=np.array([len(d.text) for d in part], np.int64)[keep],
    )
    return encoded, problems

  def _tokens(self, part: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """As `Tokenizer.encode_documents`; ids that are given stay as they are."""
    made = []
    for given, group in itertools.groupby(part, lambda d: d.tokens is not None):
      if given:
        made += [self._ended(d.tokens) for d in group if d.tokens is not None]
      else:
        made.append(self._tokenizer.encode_documents([d.text for d in group]))
    if not made:
      return self._tokenizer.encode_documents([])
    tokens, lengths = zip(*made, strict=True)
    return np.concatenate(tokens), np.concatenate(lengths)

  def _ended(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.append(ids, self._tokenizer.end_of_text)
    return tokens.astype(self._tokenizer.dtype), np.array([len(ids)])


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


def encode(units: Sequence[Unit]) -> Encoded:
  """Encodes in a process that `start_worker` prepared."""
  assert _encoder
  return _encoder(units)


_encoder: Encoder | None = None


def _end_with_parent() -> None:
  # A killed parent closes no queue, so its workers would wait for ever.
  parent = parent_process()
  if parent:
    connection.wait([parent.sentinel])
    os._exit(1)
