"""The n-gram baselines against counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from xlstm_jax import ngrams
from xlstm_jax.errors import UserError

E = 4


def test_probabilities_are_those_of_counting_by_hand():
  tokens = np.array([E, 0, 1, 1, E, 2, 1, E], np.uint16)
  model = ngrams.fit([tokens], 5)
  followers = Counter(
    zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
  )
  targets = Counter(tokens[1:].tolist())
  for b in range(5):
    unigram = (targets[b] + 1) / (7 + 5)
    assert model.unigram_Z[b] == pytest.approx(math.log(unigram), rel=1e-12)
    for a in range(5):
      total = sum(followers[a, c] for c in range(5))
      bigram = (followers[a, b] + ngrams.PRIOR * unigram) / (
        total + ngrams.PRIOR
      )
      assert model.bigram_ZZ[a, b] == pytest.approx(math.log(bigram), rel=1e-12)


def test_distributions_sum_to_one_even_after_tokens_never_seen():
  model = ngrams.fit([np.array([E, 0, E])], 5)
  assert np.exp(model.unigram_Z).sum() == pytest.approx(1)
  np.testing.assert_allclose(np.exp(model.bigram_ZZ).sum(1), 1)


def test_cutting_a_stream_into_chunks_changes_nothing():
  stream = np.random.default_rng(0).integers(0, 5, 1000)
  whole = ngrams.fit([stream], 5)
  cut = ngrams.fit([stream[:301], stream[300:702], stream[701:]], 5)
  np.testing.assert_array_equal(whole.bigram_ZZ, cut.bigram_ZZ)
  sources = np.arange(999) % 3
  chunks = [(stream[:301], sources[:300]), (stream[300:], sources[300:])]
  np.testing.assert_allclose(
    ngrams.nats(whole, chunks, 3),
    ngrams.nats(whole, [(stream, sources)], 3),
    rtol=1e-12,
  )


def test_every_target_counts_for_its_own_source():
  stream = np.array([E, 0, 1, E, 2, E])
  model = ngrams.fit([np.array([E, 0, 1, 2, E, 1, E])], 5)
  unigram_S, bigram_S = ngrams.nats(
    model, [(stream, np.array([1, 1, 1, 0, 0]))], 3
  )
  by_hand = [
    [-(model.unigram_Z[2] + model.unigram_Z[E])],
    [-(model.unigram_Z[0] + model.unigram_Z[1] + model.unigram_Z[E])],
    [0.0],
  ]
  np.testing.assert_allclose(unigram_S, np.ravel(by_hand))
  assert bigram_S[0] == pytest.approx(
    -(model.bigram_ZZ[E, 2] + model.bigram_ZZ[2, E])
  )


def test_a_table_that_would_not_fit_is_refused():
  with pytest.raises(UserError, match="50304"):
    ngrams.fit([], 50304)
