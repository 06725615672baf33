"""The chunked loss against the plain one, its memory and its sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xlstm_jax import objective, sharding
from xlstm_jax.plan.collectives import collectives, traffic
from xlstm_jax.sharding import MeshConfig

B, D, Z = 4, 8, 96


def example(T, key=0):
  keys = jax.random.split(jax.random.key(key), 4)
  weight_ZD = jax.random.normal(keys[0], (Z, D))
  x_BTD = jax.random.normal(keys[1], (B, T, D))
  targets_BT = jax.random.randint(keys[2], (B, T), 0, Z)
  weights_BT = (jax.random.uniform(keys[3], (B, T)) < 0.7).astype(jnp.float32)
  return weight_ZD, x_BTD, targets_BT, weights_BT


def loss(*args, chunk, cap=30.0):
  return objective.cross_entropy(*args, chunk=chunk, cap=cap)


def plain(weight_ZD, x_BTD, targets_BT, weights_BT, cap=30.0):
  logits_BTZ = x_BTD @ weight_ZD.T
  if cap is not None:
    logits_BTZ = cap * jnp.tanh(logits_BTZ / cap)
  logp_BTZ = jax.nn.log_softmax(logits_BTZ)
  logp_BT = jnp.take_along_axis(logp_BTZ, targets_BT[..., None], -1)[..., 0]
  return -(logp_BT * weights_BT).sum(), weights_BT.sum()


@pytest.mark.parametrize(
  ("T", "chunk", "cap"),
  [
    *((T, chunk, 30.0) for T, chunk in ((1, 4), (12, 4), (13, 4), (7, 1))),
    *((13, 4, cap) for cap in (None, 3.0, 40.0, 41.0, 500.0)),
  ],
)
def test_chunks_change_nothing(T, chunk, cap):
  args = example(T)
  want, want_grads = value_and_grad(plain, cap=cap)(*args)
  got, grads = value_and_grad(loss, chunk=chunk, cap=cap)(*args)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def value_and_grad(function, **options):
  function = functools.partial(function, **options)
  return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))


@pytest.mark.parametrize("cap", [None, 40.0, 1000.0])
def test_logits_of_any_size_are_exact(cap):
  """All at -cap but one, or far beyond what exp can hold."""
  weight_ZD = jnp.full((Z, 1), -1.0).at[0].set(1.0)
  x_BTD = jnp.array([1e3, 1.0, 0.0])[None, :, None]
  targets_BT = jnp.array([[1, 1, 1]])
  args = (weight_ZD, x_BTD, targets_BT, jnp.ones((1, 3)))
  got, grads = value_and_grad(loss, chunk=2, cap=cap)(*args)
  with jax.enable_x64():
    wide = [np.asarray(x, np.float64) for x in args[:2]]
    want, want_grads = value_and_grad(plain, cap=cap)(*wide, *args[2:])
  np.testing.assert_allclose(got, want, rtol=2e-6)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_cotangent_scales_the_gradient():
  weight_ZD, *args = example(13)

  def mean(weight_ZD):
    total, count = loss(weight_ZD, *args, chunk=4)
    return total / count

  count = args[-1].sum()
  _, (grad, _) = value_and_grad(loss, chunk=4)(weight_ZD, *args)
  np.testing.assert_allclose(jax.grad(mean)(weight_ZD), grad / count, rtol=1e-6)


def test_token_losses_are_the_terms_of_the_sum():
  weight_ZD, x_BTD, targets_BT, weights_BT = example(13)
  losses_BT = objective.token_losses(
    weight_ZD, x_BTD, targets_BT, chunk=4, cap=30.0
  )
  total, count = loss(weight_ZD, x_BTD, targets_BT, weights_BT, chunk=4)
  np.testing.assert_allclose((losses_BT * weights_BT).sum(), total, rtol=1e-6)
  assert count == weights_BT.sum()


def test_what_does_not_count_cannot_poison_the_loss():
  weight_ZD, x_BTD, targets_BT, weights_BT = example(6)
  x_BTD = jnp.where(weights_BT[..., None] > 0, x_BTD, jnp.nan)
  total, _ = loss(weight_ZD, x_BTD, targets_BT, weights_BT, chunk=2)
  assert jnp.isfinite(total)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for sub in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
    ):
      if hasattr(sub, "eqns"):
        yield from equations(getattr(sub, "jaxpr", sub))


def all_shapes(jaxpr):
  for eqn in equations(jaxpr):
    yield from (v.aval.shape for v in eqn.outvars)


def test_the_logits_are_computed_once():
  """Of three products the others are the gradients."""
  step = jax.grad(functools.partial(loss, chunk=4), (0, 1), has_aux=True)
  jaxpr = jax.make_jaxpr(step)(*example(64)).jaxpr
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert len(products) == 3


def test_the_whole_logits_never_exist():
  T, chunk = 64, 4
  args = example(T)
  step = jax.value_and_grad(
    functools.partial(loss, chunk=chunk), (0, 1), has_aux=True
  )
  shapes = list(all_shapes(jax.make_jaxpr(step)(*args).jaxpr))
  with_vocabulary = [np.prod(s) for s in shapes if s and s[-1] == Z]
  assert max(with_vocabulary) == B * chunk * Z
  whole = jax.make_jaxpr(functools.partial(loss, chunk=T))(*args).jaxpr
  assert (B, T, Z) in set(all_shapes(whole))


@pytest.mark.parametrize(
  "mesh_cfg",
  [
    MeshConfig(data=2, fsdp=2, sequence=2),
    MeshConfig(data=1, sequence=8),
  ],
)
def test_a_sharded_batch_is_never_gathered(mesh_cfg):
  args = example(64)
  mesh = sharding.make_mesh(mesh_cfg)
  weight_ZD, *batch = args
  weight_ZD = jax.device_put(weight_ZD, sharding.replicated(mesh))
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  step = jax.jit(
    jax.value_and_grad(functools.partial(loss, chunk=8), has_aux=True)
  )
  with jax.set_mesh(mesh):
    compiled = step.lower(weight_ZD, *batch).compile()
    (got, count), grad = compiled(weight_ZD, *batch)
  text = compiled.as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in text
  assert "all-reduce" in text
  want, want_count = plain(*args)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  assert count == want_count
  np.testing.assert_allclose(
    grad, jax.grad(plain, has_aux=True)(*args)[0], rtol=1e-5, atol=1e-5
  )


def test_a_split_vocabulary_is_gathered_and_summed_once():
  """Whatever the number of chunks: within a chunk two sums over the parts."""
  args = example(64)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  weight_ZD, *batch = args
  split = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
  weight_ZD = jax.device_put(weight_ZD, split)
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  step = jax.jit(
    jax.value_and_grad(functools.partial(loss, chunk=8), (0, 1), has_aux=True),
    out_shardings=((None, None), (split, None)),
  )
  with jax.set_mesh(mesh):
    compiled = step.lower(weight_ZD, *batch).compile()
    (got, _), grads = compiled(weight_ZD, *batch)
  found = traffic(collectives(compiled.as_text()))
  chunks = 8
  assert found["all-gather"].times == 1
  # The sum of exponentials and the target's score of a chunk; and once the
  # gradients of x and of the weight, the loss and the count.
  assert found["all-reduce"].times <= 2 * chunks + 4
  want, want_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(*args)
  np.testing.assert_allclose(got, want[0], rtol=2e-6)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_rounded_weight_is_summed_in_float32():
  """Over chunks: 64 small terms beside a large one would vanish in bfloat16."""
  Z, D, T = 4, 2, 65
  weight_ZD = jnp.zeros((Z, D), jnp.bfloat16)
  x_BTD = jnp.ones((1, T, D), jnp.bfloat16) * 2**-9
  # The large one comes first.
  x_BTD = x_BTD.at[0, 0].set(1.0)
  targets_BT = jnp.zeros((1, T), jnp.int32)

  _, (grad, _) = value_and_grad(loss, chunk=1, cap=None)(
    weight_ZD, x_BTD, targets_BT, jnp.ones((1, T))
  )
  want = -0.75 * (1 + 64 * 2**-9)
  np.testing.assert_allclose(grad[0].astype(jnp.float32), want, rtol=2**-8)
