"""Unigram and bigram baselines: what counting reaches on the same targets.

A token stream is E d1 E d2 E ... dn E. So the pairs of neighbours are exactly
the targets, each with the token before it. E comes before a document's first
token and is its last target, and no pair crosses a border.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from xlstm_jax.errors import UserError

# A bigram table of 4096 x 4096 counts takes 128 MiB.
MAX_VOCAB_SIZE = 4096
# Mass of the prior in tokens. Values from 1 to 1000 differ by less than 1e-3
# bits per byte on the standard library's source files.
PRIOR = 64.0


@dataclasses.dataclass(frozen=True)
class NGrams:
  """Log probabilities, in nats, of a unigram and a bigram model.

  Attributes:
    unigram_Z: Log probability of every token.
    bigram_ZZ: Log probability of every token (second axis) after another
      (first axis).
  """

  unigram_Z: np.ndarray
  bigram_ZZ: np.ndarray


def fit(streams: Iterable[np.ndarray], vocab_size: int) -> NGrams:
  """Counts the neighbours in every stream of tokens.

  The unigram adds one to every count. The bigram adds `PRIOR` tokens with the
  distribution of the unigram (a Dirichlet prior; MacKay and Peto 1995).

  Raises:
    UserError: the vocabulary is too large for a table of pairs.
  """
  if vocab_size > MAX_VOCAB_SIZE:
    raise UserError(
      f"N-gram baselines need a vocabulary of at most {MAX_VOCAB_SIZE} tokens; "
      f"this tokenizer has {vocab_size}."
    )
  counts_ZZ = np.zeros((vocab_size, vocab_size), np.int64)
  for tokens in streams:
    pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    counts_ZZ += np.bincount(pairs, minlength=counts_ZZ.size).reshape(
      counts_ZZ.shape
    )
  unigram_Z = counts_ZZ.sum(0) + 1.0
  unigram_Z /= unigram_Z.sum()
  bigram_ZZ = counts_ZZ + PRIOR * unigram_Z
  bigram_ZZ /= bigram_ZZ.sum(1, keepdims=True)
  return NGrams(np.log(unigram_Z), np.log(bigram_ZZ))


def nats(
  model: NGrams,
  chunks: Iterable[tuple[np.ndarray, np.ndarray]],
  num_sources: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The summed losses of the unigram and of the bigram model per source.

  Args:
    model: the result of `fit`.
    chunks: tokens, and the source of each of them but the first.
    num_sources: number of sources.
  """
  unigram_S, bigram_S = np.zeros(num_sources), np.zeros(num_sources)
  for tokens, sources in chunks:
    losses = -model.unigram_Z[tokens[1:]]
    unigram_S += np.bincount(sources, losses, minlength=num_sources)
    losses = -model.bigram_ZZ[tokens[:-1], tokens[1:]]
    bigram_S += np.bincount(sources, losses, minlength=num_sources)
  return unigram_S, bigram_S
