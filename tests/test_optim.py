"""AdamW against its equations, schedules against numbers, decay by name."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax import optim
from xlstm_jax.models import presets
from xlstm_jax.models.language_model import Definition
from xlstm_jax.optim import OptimConfig


def rates(cfg, steps):
  return [float(optim.learning_rate(cfg, n, steps=steps)) for n in range(steps)]


def test_warmup_ends_on_the_peak_and_never_is_zero():
  got = rates(OptimConfig(peak_lr=2.0, warmup_steps=4, schedule="constant"), 6)
  np.testing.assert_allclose(got, [0.5, 1, 1.5, 2, 2, 2], rtol=1e-6)


def test_cosine_halves_in_the_middle_and_ends_on_its_final_fraction():
  cfg = OptimConfig(peak_lr=1.0, warmup_steps=10, final_fraction=0.1)

  def at(step):
    return float(optim.learning_rate(cfg, step, steps=110))

  np.testing.assert_allclose(at(10), 1, rtol=1e-6)
  np.testing.assert_allclose(at(60), 0.55, rtol=1e-6)
  np.testing.assert_allclose(at(35), 0.1 + 0.9 * (1 + 2**-0.5) / 2, rtol=1e-6)
  np.testing.assert_allclose(at(109), 0.10022205, rtol=1e-6)


def test_the_7b_schedule_decays_exponentially_then_cools_down():
  cfg = OptimConfig(
    peak_lr=5e-4,
    schedule="exponential",
    warmup_steps=3000,
    decay_steps=500_000,
    cooldown_steps=50_000,
  )

  def at(step):
    return float(optim.learning_rate(cfg, step, steps=550_000))

  np.testing.assert_allclose(at(1499), 2.5e-4, rtol=1e-6)
  np.testing.assert_allclose(at(3000), 5e-4, rtol=1e-6)
  np.testing.assert_allclose(at(251_500), 5e-4 * 0.1**0.5, rtol=1e-5)
  np.testing.assert_allclose(at(500_000), 5e-5, rtol=1e-5)
  np.testing.assert_allclose(at(525_000), 2.5e-5, rtol=1e-5)
  np.testing.assert_allclose(at(549_999), 5e-5 / 50_000, rtol=1e-5)


def test_a_decay_that_ends_early_stays_on_its_final_fraction():
  cfg = OptimConfig(peak_lr=1.0, final_fraction=0.25, decay_steps=4)
  np.testing.assert_allclose(rates(cfg, 8)[4:], 0.25, rtol=1e-6)


def test_constant_with_linear_cooldown():
  cfg = OptimConfig(peak_lr=1.0, schedule="constant", cooldown_steps=4)
  np.testing.assert_allclose(
    rates(cfg, 8), [1, 1, 1, 1, 1, 0.75, 0.5, 0.25], rtol=1e-6
  )


def params():
  key = jax.random.key(0)

  def leaf(n, *shape):
    return jax.random.normal(jax.random.fold_in(key, n), shape)

  return {
    "embedding": {"weight": leaf(0, 7, 4)},
    "blocks": {
      "0": {
        "norm": {"scale": leaf(1, 4)},
        "mlstm": {"up": {"weight": leaf(2, 4, 8), "bias": leaf(3, 8)}},
      }
    },
    "head": {"weight": leaf(4, 7, 4)},
  }


def test_adamw_is_its_equations():
  cfg = OptimConfig(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=None)
  p = params()
  mask = optim.decay_mask(p, cfg)
  moments = optim.init(cfg, p)
  m = v = jax.tree.map(jnp.zeros_like, p)
  for n in (1, 2, 3):
    g = jax.tree.map(lambda x, n=n: jnp.sin(n * x), p)
    updates, moments = optim.update(cfg, g, moments, p)
    m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, v, g)
    expected = jax.tree.map(
      lambda m, v, p, d, n=n: (
        m / (1 - 0.8**n) / (jnp.sqrt(v / (1 - 0.9**n)) + 1e-3) + 0.3 * d * p
      ),
      m,
      v,
      p,
      mask,
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      updates,
      expected,
    )


def test_decay_shrinks_what_decays_and_leaves_the_rest():
  cfg = OptimConfig(weight_decay=0.5)
  p = params()
  zero = jax.tree.map(jnp.zeros_like, p)
  updates, _ = optim.update(cfg, zero, optim.init(cfg, p), p)
  head = updates["head"]["weight"]
  np.testing.assert_allclose(head, 0.5 * p["head"]["weight"], rtol=1e-6)
  assert not updates["embedding"]["weight"].any()
  assert not updates["blocks"]["0"]["mlstm"]["up"]["bias"].any()


def test_clipping_scales_large_gradients_alone():
  grads = {"a": jnp.array([3.0, 0]), "b": jnp.array([4.0])}
  clipped = optim.clip(grads, 1.0)
  np.testing.assert_allclose(optax.tree.norm(clipped), 1, rtol=1e-6)
  np.testing.assert_allclose(clipped["a"], [0.6, 0], rtol=1e-6)
  for max_norm in (5.0, 6.0, None):
    same = optim.clip(grads, max_norm)
    np.testing.assert_array_equal(same["a"], grads["a"])


def test_a_zero_gradient_survives_clipping():
  clipped = optim.clip({"a": jnp.zeros(3)}, 1.0)
  np.testing.assert_array_equal(clipped["a"], 0)


def paper_cases():
  return [n for n in golden.model_names() if n.startswith("paper_")]


@pytest.mark.parametrize("name", paper_cases())
def test_what_decays_in_the_papers_code_decays_here(name):
  case = golden.model(name)
  _, names, _ = golden.converted(name, "float32")
  found = {
    stored: [decays("/".join(piece.path)) for piece in pieces]
    for stored, pieces in names.pieces.items()
  }
  expected = dict.fromkeys(case.meta["weight_decay"], True)
  expected |= dict.fromkeys(case.meta["no_weight_decay"], False)
  for stored, answers in found.items():
    assert set(answers) == {expected.pop(stored)}, stored
  assert not expected


def test_the_7b_recipe_decays_its_kernels_alone():
  """In its JAX code those named "kernel": every dense map, gates included."""
  cfg = dataclasses.replace(presets.large("165M"), num_blocks=1)
  paths = jax.tree_util.tree_leaves_with_path(Definition(cfg).abstract())
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
  ]
  block = "blocks/0/0_mlstm_large"
  assert {name for name in names if decays(name)} == {
    "head/weight",
    *(f"{block}/feedforward/{n}/weight" for n in ("up", "down")),
    *(f"{block}/mixer/{n}/weight" for n in ("q", "k", "v", "o", "out")),
    f"{block}/mixer/gates/map/weight",
  }


def test_the_embedding_decays_on_request_tied_or_not():
  assert not decays("embedding/weight")
  assert decays("embedding/weight", decay_embedding=True)
  assert not decays("norm/scale", decay_embedding=True)


def decays(path, **options):
  return optim.decays(path, OptimConfig(**options))
