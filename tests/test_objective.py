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


def head(weight_ZD, x_BTD):
  return 30 * jnp.tanh(x_BTD @ weight_ZD.T / 30)


def example(T, key=0):
  keys = jax.random.split(jax.random.key(key), 4)
  weight_ZD = jax.random.normal(keys[0], (Z, D))
  x_BTD = jax.random.normal(keys[1], (B, T, D))
  targets_BT = jax.random.randint(keys[2], (B, T), 0, Z)
  weights_BT = (jax.random.uniform(keys[3], (B, T)) < 0.7).astype(jnp.float32)
  return weight_ZD, x_BTD, targets_BT, weights_BT


def loss(weight_ZD, x_BTD, targets_BT, weights_BT, *, chunk):
  return objective.cross_entropy(
    head,
    weight_ZD,
    x_BTD,
    targets_BT,
    weights_BT,
    chunk=chunk,
  )


def plain(weight_ZD, x_BTD, targets_BT, weights_BT):
  logits_BTZ = head(weight_ZD, x_BTD)
  logp_BTZ = jax.nn.log_softmax(logits_BTZ)
  logp_BT = jnp.take_along_axis(logp_BTZ, targets_BT[..., None], -1)[..., 0]
  return -(logp_BT * weights_BT).sum(), weights_BT.sum()


@pytest.mark.parametrize(("T", "chunk"), [(1, 4), (12, 4), (13, 4), (7, 1)])
def test_chunks_change_nothing(T, chunk):
  args = example(T)
  want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(
    *args
  )
  got, grads = jax.jit(
    jax.value_and_grad(
      functools.partial(loss, chunk=chunk), (0, 1), has_aux=True
    )
  )(*args)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_token_losses_are_the_terms_of_the_sum():
  weight_ZD, x_BTD, targets_BT, weights_BT = example(13)
  losses_BT = objective.token_losses(
    head, weight_ZD, x_BTD, targets_BT, chunk=4
  )
  total, count = loss(weight_ZD, x_BTD, targets_BT, weights_BT, chunk=4)
  np.testing.assert_allclose((losses_BT * weights_BT).sum(), total, rtol=1e-6)
  assert count == weights_BT.sum()


def test_what_does_not_count_cannot_poison_the_loss():
  weight_ZD, x_BTD, targets_BT, weights_BT = example(6)
  x_BTD = jnp.where(weights_BT[..., None] > 0, x_BTD, jnp.nan)
  total, _ = loss(weight_ZD, x_BTD, targets_BT, weights_BT, chunk=2)
  assert jnp.isfinite(total)


def all_shapes(jaxpr):
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars)
    for sub in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
    ):
      if hasattr(sub, "eqns"):
        yield from all_shapes(getattr(sub, "jaxpr", sub))


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
  # The largest, the sum of exponentials and the target's logit of a chunk,
  # forward and again backward, where the gradient of x is summed too; and once
  # the loss, the count and the gradient of the weight.
  assert found["all-reduce"].times <= 2 * 2 * chunks + chunks + 3
  want, want_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(*args)
  np.testing.assert_allclose(got, want[0], rtol=2e-6)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_rounded_weight_is_summed_in_float32():
  """Over chunks: 64 small terms beside a large one would vanish in bfloat16."""
  Z, D, T = 4, 2, 65
  weight_ZD = jnp.zeros((Z, D), jnp.bfloat16)
  x_BTD = jnp.ones((1, T, D), jnp.bfloat16) * 2**-9
  # The last chunk is the first of the backward pass.
  x_BTD = x_BTD.at[0, -1].set(1.0)
  targets_BT = jnp.zeros((1, T), jnp.int32)

  def attend(weight_ZD, x_BLD):
    return (x_BLD @ weight_ZD.T).astype(jnp.float32)

  grad = jax.jit(
    jax.grad(
      lambda w: objective.token_losses(
        attend, w, x_BTD, targets_BT, chunk=1
      ).sum()
    )
  )(weight_ZD)
  want = -0.75 * (1 + 64 * 2**-9)
  np.testing.assert_allclose(grad[0].astype(jnp.float32), want, rtol=2**-8)
