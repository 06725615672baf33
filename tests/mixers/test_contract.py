"""What every mixer promises, over the table of mixers.

A check is a function of a `Subject`, so that the mutations at the end can show
that each of them fails where its promise is broken.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import nnx

from xlstm_jax import sharding
from xlstm_jax.layers import conv
from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.initializers import Depth
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.kinds import KINDS, Mixers

B, T, D = 4, 16, 16
SHARED: dict[str, Any] = {
  "depth": Depth(0, 2),
  "head_norm": NormConfig(),
  "dropout": 0.0,
}


def small(cfg):
  """A mixer's configuration for a width of D."""
  sizes = {"num_heads": 2, "round_to": 8}
  return dataclasses.replace(
    cfg, **{name: n for name, n in sizes.items() if hasattr(cfg, name)}
  )


# Of every kind of block, and variants of a kind's mixer.
CONFIGS = {kind: (kind, small(getattr(Mixers(), kind))) for kind in KINDS}
CONFIGS["lstm"] = ("slstm", SLSTMConfig(cell="lstm", num_heads=2))


def build(name: str, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
  kind, cfg = CONFIGS[name]
  return KINDS[kind].mixer(cfg, D, compute=compute, rngs=rngs, **SHARED)


# Three documents and padding; one document; borders at both ends.
SEGMENTS_BT = np.array(
  [
    [1] * 5 + [2] * 4 + [3] * 4 + [0] * 3,
    [1] * 16,
    [1] * 1 + [2] * 14 + [3] * 1,
    [4] * 8 + [6] * 8,
  ],
  np.int32,
)


@dataclasses.dataclass
class Subject:
  """A mixer with random parameters.

  Attributes:
    run: (params, x_BTD, segments_BT, state) -> (y_BTD, state).
    params: its parameters.
    empty: the state of the empty past.
    kind: its name in the table.
    dtype: in which it computes.
  """

  run: Callable
  params: dict
  empty: Any
  kind: str
  dtype: str
  compiled: Callable = dataclasses.field(init=False)

  def __post_init__(self):
    self.compiled = jit(self.run)

  def __call__(self, x_BTD, segments_BT, state=None):
    """The compiled mixer."""
    state = self.empty if state is None else state
    return self.compiled(self.params, x_BTD, segments_BT, state)

  def with_params(self, changes: dict) -> "Subject":
    """The same, compiled once for both, with some parameters replaced."""
    other = copy.copy(self)
    other.params = {**self.params, **changes}
    return other

  def extreme(self, shift: float = 0.0) -> "Subject":
    """Its gate pre-activations, if it has gates, are around `shift` +- 100."""
    if "gates" not in self.params:
      return self
    gates = self.params["gates"]
    if "map" in gates:
      weight = 100 * gates["map"]["weight"]
      bias = gates["bias"] + jnp.asarray(shift, gates["bias"].dtype)
      return self.with_params(
        {"gates": {"map": {"weight": weight}, "bias": bias}}
      )
    bias = self.params["bias"] + jnp.asarray(shift, self.params["bias"].dtype)
    weight = 100 * gates["weight"]
    return self.with_params({"gates": {"weight": weight}, "bias": bias})


@functools.cache
def subject(kind: str, dtype: str = "float64") -> Subject:
  param_dtype = "float64" if dtype == "float64" else "float32"
  compute = Compute(dtype=dtype, param_dtype=param_dtype)

  def create():
    return nnx.split(build(kind, compute, nnx.Rngs(0)))

  graph, abstract = jax.eval_shape(create)
  rng = np.random.default_rng(1)

  def draw(x):
    """The same numbers in every dtype."""
    fan_in = max(4, x.size // x.shape[-1])
    values = rng.normal(size=x.shape) / fan_in**0.5
    return jnp.asarray(values.astype(np.float32), x.dtype)

  params = jax.tree.map(draw, nnx.to_pure_dict(abstract))

  def run(params, x_BTD, segments_BT, state):
    return nnx.merge(graph, params)(x_BTD, segments_BT=segments_BT, state=state)

  empty = nnx.merge(graph, params).empty_state(B)
  return Subject(run, params, empty, kind, dtype)


def inputs(dtype: str = "float64", seed: int = 0) -> jax.Array:
  values = np.random.default_rng(seed).normal(size=(B, T, D))
  return jnp.asarray(values, dtype)


def assert_close(ours, theirs, bound: float = 1e-11):
  """Equal to `bound` of the largest value, in every array of a tree."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=bound * max(1.0, float(jnp.abs(y).max(initial=0)))
    ),
    ours,
    theirs,
  )


def real(y_BTD):
  """Without padding, whose outputs mean nothing."""
  return jnp.where(SEGMENTS_BT[..., None] > 0, y_BTD, 0)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


kinds = pytest.mark.parametrize("kind", CONFIGS)


def check_steps(mixer: Subject):
  x_BTD = inputs()
  y_BTD, last = mixer(x_BTD, SEGMENTS_BT)
  state, ys = None, []
  for t in range(T):
    y_B1D, state = mixer(x_BTD[:, t : t + 1], SEGMENTS_BT[:, t : t + 1], state)
    ys.append(y_B1D)
  assert_close(real(jnp.concatenate(ys, axis=1)), real(y_BTD))
  assert_close(state, last)


def padded(x, start: int, stop: int):
  """x[:, start:stop], followed by zeros up to the length of `x`."""
  widths = [(0, 0), (0, x.shape[1] - (stop - start))] + [(0, 0)] * (x.ndim - 2)
  return np.pad(np.asarray(x[:, start:stop]), widths)


def check_splits(mixer: Subject):
  """Any two pieces equal the whole; padding behind them changes nothing."""
  x_BTD = inputs()
  y_BTD, last = mixer(x_BTD, SEGMENTS_BT)
  for cut in range(T + 1):
    state, ys = None, []
    for start, stop in ((0, cut), (cut, T)):
      y_piece_BTD, state = mixer(
        jnp.asarray(padded(x_BTD, start, stop)),
        padded(SEGMENTS_BT, start, stop),
        state,
      )
      ys.append(y_piece_BTD[:, : stop - start])
    assert_close(real(jnp.concatenate(ys, axis=1)), real(y_BTD))
    assert_close(state, last)


def check_reach(mixer: Subject, *, everywhere: bool = True):
  """y depends on x of its own row and document, up to its own time."""
  x_BTD = inputs()
  direction_D = jnp.asarray(np.random.default_rng(2).normal(size=D))

  @jit
  def reach(params, x_BTD):
    def outputs(x_BTD):
      return (
        mixer.run(params, x_BTD, jnp.asarray(SEGMENTS_BT), None)[0]
        @ direction_D
      )

    # Output b, t with respect to x of row c at time s.
    return jnp.abs(jax.jacrev(outputs)(x_BTD)).sum(-1)

  reach_BTCS = np.asarray(reach(mixer.params, x_BTD))
  same = SEGMENTS_BT[:, :, None, None] == SEGMENTS_BT[None, None]
  rows, times = np.arange(B), np.arange(T)
  may_BTCS = (
    same
    & (rows[:, None, None, None] == rows[:, None])
    & (times[:, None, None] >= times)
  )
  real_BT = SEGMENTS_BT > 0
  assert np.isfinite(reach_BTCS).all()
  reach_BTCS, may_BTCS = reach_BTCS[real_BT], may_BTCS[real_BT]
  assert (reach_BTCS[~may_BTCS] == 0).all()
  if everywhere:
    assert (reach_BTCS[may_BTCS] > 0).all()


def check_packing(mixer: Subject):
  """Documents in one row compute what each computes alone."""
  x_BTD = inputs()
  y_BTD, _ = mixer(x_BTD, SEGMENTS_BT)
  for row in range(B):
    for segment in set(SEGMENTS_BT[row]) - {0}:
      at = np.flatnonzero(SEGMENTS_BT[row] == segment)
      alone_BTD = jnp.zeros_like(x_BTD).at[0, : at.size].set(x_BTD[row, at])
      segments_BT = np.zeros((B, T), np.int32)
      segments_BT[0, : at.size] = 1
      alone_y_BTD, _ = mixer(alone_BTD, segments_BT)
      assert_close(alone_y_BTD[0, : at.size], y_BTD[row, at], 1e-9)


def check_rows(mixer: Subject):
  x_BTD = inputs()
  other_BTD = x_BTD.at[1].set(-3 * x_BTD[1])
  for run in (mixer, mixer.extreme()):
    y_BTD, _ = run(x_BTD, SEGMENTS_BT)
    changed_BTD, _ = run(other_BTD, SEGMENTS_BT)
    np.testing.assert_array_equal(y_BTD[2:], changed_BTD[2:])
    np.testing.assert_array_equal(y_BTD[0], changed_BTD[0])
    assert (y_BTD[1] != changed_BTD[1]).any()


def check_finite(mixer: Subject):
  """Saturated gates of every sign have finite values and gradients."""

  def loss(params, x_BTD):
    y_BTD, state = mixer.run(params, x_BTD, None, None)
    leaves = jax.tree.leaves(state)
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return (y_BTD**2).sum() + sum(jnp.tanh(x).sum() for x in floats)

  grad = jit(jax.value_and_grad(loss, argnums=(0, 1)))
  for shift in (-100.0, -50.0, 0.0, 50.0, 100.0):
    params = mixer.extreme(shift).params
    value, grads = grad(params, inputs(mixer.dtype))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@kinds
def test_steps_equal_the_sequence(kind):
  check_steps(subject(kind))


@kinds
def test_any_split_equals_the_whole(kind):
  check_splits(subject(kind))


@kinds
def test_causality_by_gradient(kind):
  check_reach(subject(kind))


@kinds
def test_nothing_leaks_across_documents_at_extreme_gates(kind):
  check_reach(subject(kind).extreme(), everywhere=False)


@kinds
def test_packed_documents_equal_separate_ones_at_extreme_gates(kind):
  check_packing(subject(kind).extreme())


@kinds
def test_rows_are_independent(kind):
  check_rows(subject(kind))


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_at_saturated_gates(kind, dtype):
  check_finite(subject(kind, dtype))


# Relative L2 error of the outputs: twice what was measured. Others may lose as
# much as the worst of these.
BF16_BOUND = {
  "mlstm": 0.019,
  "mlstm_large": 0.012,
  "slstm": 0.0033,
  "lstm": 0.0035,
}


def check_bfloat16(mixer: Subject):
  x_BTD = inputs("bfloat16")
  y_BTD, state = mixer(x_BTD, SEGMENTS_BT)
  truth_BTD, _ = subject(mixer.kind)(x_BTD.astype("float64"), SEGMENTS_BT)
  assert y_BTD.dtype == jnp.bfloat16
  cell = getattr(state, "cell", state)
  assert {x.dtype.name for x in cell} == {"float32", "int32"}
  error = jnp.linalg.norm(real(y_BTD) - real(truth_BTD))
  error = error / jnp.linalg.norm(real(truth_BTD))
  assert error < BF16_BOUND.get(mixer.kind, max(BF16_BOUND.values()))


@kinds
def test_bfloat16_is_near_the_truth(kind):
  check_bfloat16(subject(kind, "bfloat16"))


@kinds
@pytest.mark.parametrize(
  ("axes", "follows"),
  [
    ((2, 2, 2, 1), False),
    ((1, 1, 2, 4), True),
    pytest.param((1, 2, 1, 4), False, marks=pytest.mark.slow),
    pytest.param((4, 1, 1, 2), True, marks=pytest.mark.slow),
  ],
)
def test_eight_devices_compute_what_one_does(kind, axes, follows):
  """Values, states and gradients; `follows` a state, without segments."""
  mixer = subject(kind)
  segments_BT = None if follows else jnp.asarray(SEGMENTS_BT)
  state = mixer(inputs(seed=1), SEGMENTS_BT)[1] if follows else None

  def loss(params, x_BTD, state):
    y_BTD, last = mixer.run(params, x_BTD, segments_BT, state)
    return (y_BTD**2).sum() + total(last), (y_BTD, last)

  def total(state):
    floats = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float64]
    return sum((x**2).sum() for x in floats)

  def grad(params, x_BTD, state):
    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(
      params, x_BTD, state
    )

  one = jit(grad)(mixer.params, inputs(), state)
  mesh = sharding.make_mesh(sharding.MeshConfig(*axes))
  with jax.set_mesh(mesh):
    x_BTD = jax.device_put(
      inputs(),
      jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence", None)),
    )
    eight = jit(grad)(mixer.params, x_BTD, state)
    assert len(eight[0][1][0].sharding.device_set) == 8
  ours, theirs = (
    [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    for tree in (eight, one)
  )
  assert_close(jax.tree.map(np.asarray, ours), theirs)


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_devices_that_do_not_pass_on_their_past_are_noticed(kind, monkeypatch):
  """Every device starts its convolution from the state of the whole row."""
  monkeypatch.setattr(conv, "_entering", lambda x, segments, state, axis: state)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    test_eight_devices_compute_what_one_does(kind, (1, 1, 2, 4), True)


def forgets_segments(run):
  return lambda params, x, segments, state: run(params, x, None, state)


def forgets_state(run):
  return lambda params, x, segments, state: run(params, x, segments, None)


def sees_the_future(run):
  def mutated(params, x, segments, state):
    y, state = run(params, x, segments, state)
    return y + 1e-6 * jnp.flip(x, axis=1), state

  return mutated


def mixes_rows(run):
  def mutated(params, x, segments, state):
    y, state = run(params, x, segments, state)
    return y + 1e-6 * jnp.roll(x, 1, axis=0), state

  return mutated


def overflows(run):
  def mutated(params, x, segments, state):
    y, state = run(params, x, segments, state)
    return y * jnp.sqrt(jnp.abs(y * 0)), state

  return mutated


def rounds_coarsely(run):
  def mutated(params, x, segments, state):
    y, state = run(params, x, segments, state)
    return y.astype(jnp.float8_e4m3fn).astype(y.dtype), state

  return mutated


MUTATIONS = {
  check_steps: forgets_state,
  check_splits: forgets_state,
  check_reach: sees_the_future,
  check_packing: forgets_segments,
  check_rows: mixes_rows,
  check_finite: overflows,
  check_bfloat16: rounds_coarsely,
}


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
@pytest.mark.parametrize("check", MUTATIONS, ids=lambda check: check.__name__)
def test_a_mutation_turns_the_check_red(check, kind):
  sound = subject(kind, "bfloat16" if check is check_bfloat16 else "float64")
  mutated = dataclasses.replace(sound, run=MUTATIONS[check](sound.run))
  with pytest.raises(AssertionError):
    check(mutated)
