"""Decoding equals the full pass: every block kind, any prompt, mixed rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit

from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.conv import CausalConv
from xlstm_jax.mixers import memory
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition

T, Z = 16, 11
MODELS = {
  "paper": ModelConfig(
    vocab_size=Z,
    width=16,
    num_blocks=3,
    slstm_at=(1,),
    mlstm=MLSTMConfig(num_heads=2, round_to=8),
    slstm=SLSTMConfig(num_heads=2),
  ),
  "large": ModelConfig(
    vocab_size=Z,
    width=16,
    num_blocks=2,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=2),
  ),
  "sigmoid gate, LSTM, no convolution": ModelConfig(
    vocab_size=Z,
    width=16,
    num_blocks=3,
    slstm_at=(1,),
    mlstm=MLSTMConfig(
      num_heads=2, round_to=8, conv_window=0, input_gate="sigmoid"
    ),
    slstm=SLSTMConfig(
      cell="lstm", num_heads=2, conv_window=0, feedforward=False
    ),
  ),
  "no normaliser, windows of 1": ModelConfig(
    vocab_size=Z,
    width=16,
    num_blocks=3,
    slstm_at=(1,),
    mlstm=MLSTMConfig(num_heads=2, round_to=8, conv_window=1, normalize=False),
    slstm=SLSTMConfig(num_heads=2, conv_window=1),
  ),
}
PUBLISHED = ("paper", "large")
TOKENS_BT = np.random.default_rng(0).integers(0, Z, (2, T), np.int32)
# Documents may begin within the prompt or the continuation.
SEGMENTS_BT = np.array([[1] * 16, [1] * 6 + [2] * 5 + [3] * 5], np.int32)


CUTS = [(5, 10), (1, 2, 3), (6, 11), (4, 8, 12)]


class Model:
  """A model with random parameters, compiled for pieces of T and of 1 token."""

  def __init__(self, cfg: ModelConfig):
    definition = Definition(cfg, Compute("float64", "float64"))
    rng = np.random.default_rng(1)

    def draw(x):
      fan_in = max(4, x.size // x.shape[-1])
      return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5)

    self.params = jax.tree.map(draw, definition.abstract())
    self.empty = definition.bind(self.params).empty_state(2)

    @jit
    def run(params, tokens_BT, segments_BT, state):
      lm = definition.bind(params)
      x_BTD, state = lm(tokens_BT, segments_BT=segments_BT, state=state)
      return lm.logits(x_BTD), state

    self._run = run

  def __call__(self, tokens_BT, segments_BT, state):
    return self._run(self.params, tokens_BT, segments_BT, state)

  def piece(self, tokens_BT, segments_BT, state):
    """A piece of any length, followed by padding up to T."""
    length = tokens_BT.shape[1]
    rest = ((0, 0), (0, T - length))
    logits_BTZ, state = self(
      np.pad(tokens_BT, rest), np.pad(segments_BT, rest), state
    )
    return logits_BTZ[:, :length], state

  def step(self, t: int, state):
    """Token t."""
    return self(TOKENS_BT[:, t : t + 1], SEGMENTS_BT[:, t : t + 1], state)


@functools.cache
def model(name: str) -> Model:
  return Model(MODELS[name])


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def assert_close(ours, theirs):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11),
    ours,
    theirs,
  )


models = pytest.mark.parametrize("name", MODELS)
# Two configurations at every cut, the others at one.
models_and_cuts = pytest.mark.parametrize(
  ("name", "cuts"),
  [
    (name, cuts)
    for name in MODELS
    for cuts in (CUTS if name in PUBLISHED else CUTS[:1])
  ],
)


@models
def test_prompts_of_any_length_and_steps_equal_the_full_pass(name):
  lm = model(name)
  logits_BTZ, last = lm(TOKENS_BT, SEGMENTS_BT, lm.empty)
  for prompt in (0, 1, 2, 3, 7, 15, 16):
    state = lm.empty
    pieces = []
    if prompt:
      piece_BTZ, state = lm.piece(
        TOKENS_BT[:, :prompt], SEGMENTS_BT[:, :prompt], state
      )
      pieces.append(piece_BTZ)
    for t in range(prompt, T):
      step_B1Z, state = lm.step(t, state)
      pieces.append(step_B1Z)
    assert_close(jnp.concatenate(pieces, axis=1), logits_BTZ)
    assert_close(state, last)


def chunked_prefill(name: str, cuts: tuple[int, ...]):
  """Logits and last state piece by piece, and those of the full pass."""
  lm = model(name)
  state, pieces = lm.empty, []
  for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
    at = slice(start, stop)
    piece_BTZ, state = lm.piece(TOKENS_BT[:, at], SEGMENTS_BT[:, at], state)
    pieces.append(piece_BTZ)
  whole = lm(TOKENS_BT, SEGMENTS_BT, lm.empty)
  return (jnp.concatenate(pieces, axis=1), state), whole


@models_and_cuts
def test_chunked_prefill_equals_the_full_pass(name, cuts):
  assert_close(*chunked_prefill(name, cuts))


@models
def test_a_batch_mixes_fresh_and_warm_rows(name):
  lm = model(name)
  ones_BT = np.ones((2, T), np.int32)
  _, warm = lm.piece(TOKENS_BT[:, :9], ones_BT[:, :9], lm.empty)
  # States are [G, B, ...]; row 0 is warm, row 1 fresh.
  mixed = jax.tree.map(lambda x, e: x.at[:, 1].set(e[:, 1]), warm, lm.empty)
  ours, _ = lm.piece(TOKENS_BT[:, 9:], ones_BT[:, 9:], mixed)
  whole_BTZ, _ = lm(TOKENS_BT, ones_BT, lm.empty)
  fresh_BTZ, _ = lm.piece(TOKENS_BT[:, 9:], ones_BT[:, 9:], lm.empty)
  assert_close(ours[0], whole_BTZ[0, 9:])
  assert_close(ours[1], fresh_BTZ[1])
  assert jnp.abs(whole_BTZ[1, 9:] - fresh_BTZ[1]).max() > 1e-3
  step_B1Z, _ = lm(TOKENS_BT[:, :1], None, mixed)
  fresh_B1Z, _ = lm(TOKENS_BT[:, :1], None, lm.empty)
  assert_close(step_B1Z[1], fresh_B1Z[1])
  assert jnp.abs(step_B1Z[0] - fresh_B1Z[0]).max() > 1e-3


@models
def test_no_state_is_the_empty_past_and_no_segments_one_document(name):
  lm = model(name)
  without = lm(TOKENS_BT, None, None)
  with_both = lm(TOKENS_BT, np.ones_like(TOKENS_BT), lm.empty)
  assert_close(without, with_both)


def forgets_the_convolution(monkeypatch):
  """Every call starts with an empty window."""

  def call(self, x_BTU, *, segments_BT, state, call=CausalConv.__call__):
    empty = jax.tree.map(jnp.zeros_like, state)
    return call(self, x_BTU, segments_BT=segments_BT, state=empty)

  monkeypatch.setattr(CausalConv, "__call__", call)


def forgets_m(monkeypatch):
  """The scale of the memory is lost between calls."""

  def call(*args, state, call=memory.mlstm.mlstm, **options):
    state = state._replace(m_BH=jnp.zeros_like(state.m_BH))
    return call(*args, state=state, **options)

  monkeypatch.setattr(memory.mlstm, "mlstm", call)


@pytest.mark.parametrize("mutation", [forgets_the_convolution, forgets_m])
def test_mutations_are_caught(mutation, monkeypatch):
  mutation(monkeypatch)
  mutated = Model(MODELS["paper"])
  monkeypatch.setitem(globals(), "model", lambda name: mutated)
  with pytest.raises(AssertionError):
    test_chunked_prefill_equals_the_full_pass("paper", (5, 10))
