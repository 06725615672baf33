"""The step against plain code, and what must not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import FakeDefinition

from xlstm_jax import optim, sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.optim import OptimConfig
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps

T, B = 16, 8
CFG = RunConfig(
  data=DataConfig(context=T),
  optim=OptimConfig(peak_lr=1e-2, warmup_steps=2),
  batch_size=B,
  steps=10,
  loss_chunk=5,
)
ONE = MeshConfig(data=1)


def batch(seed=0):
  """Rows with several documents and padding of very different lengths."""
  rng = np.random.default_rng(seed)
  segments = 1 + np.cumsum(rng.random((B, T)) < 0.2, axis=1, dtype=np.int32)
  for row, length in enumerate((16, 1, 0, 9, 16, 2, 13, 5)):
    segments[row, length:] = 0
  tokens = rng.integers(0, 24, (2, B, T), dtype=np.int32)
  return {"inputs": tokens[0], "targets": tokens[1], "segments": segments}


@functools.cache
def run(cfg, *, dropout=0.0, count=3, devices=1):
  """The state and the metrics after some steps."""
  definition = FakeDefinition(dropout=dropout)
  mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    state = states.init(definition, mesh, cfg.optim, seed=cfg.seed)
    step = steps.compiled(definition, cfg, mesh)
    measured = []
    for n in range(count):
      on_mesh = jax.device_put(batch(n), sharding.batch_sharding(mesh))
      state, metrics = step(state, on_mesh)
      measured.append({k: float(v) for k, v in metrics.items()})
  assert step._cache_size() == 1
  return jax.tree.map(np.asarray, state), measured


def assert_same(a, b, **tolerance):
  (state_a, measured_a), (state_b, measured_b) = a, b
  for x, y in zip(measured_a, measured_b, strict=True):
    for name in x:
      np.testing.assert_allclose(x[name], y[name], **tolerance)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=1e-4),
    state_a.params,
    state_b.params,
  )


def plain_loss(params, batch):
  x_BTD, _ = FakeDefinition().bind(params)(
    batch["inputs"], segments_BT=batch["segments"]
  )
  logp_BTZ = jax.nn.log_softmax(FakeDefinition().bind(params).logits(x_BTD))
  logp_BT = jnp.take_along_axis(logp_BTZ, batch["targets"][..., None], -1)
  real_BT = batch["segments"] > 0
  return -jnp.mean(logp_BT[..., 0], where=real_BT)


def norm(tree):
  return jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))


def test_a_step_is_the_mean_loss_over_tokens_and_one_update():
  definition = FakeDefinition()
  params = definition.init(states.keys(0)[0])
  moments = optim.init(CFG.optim, params)
  want = []

  @jax.jit
  def update(params, moments, batch, rate):
    loss, grads = jax.value_and_grad(plain_loss)(params, batch)
    measured = (loss, norm(grads), norm(params))
    updates, moments = optim.update(CFG.optim, grads, moments, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, moments, measured

  for n, rate in enumerate((5e-3, 1e-2)):
    params, moments, measured = update(params, moments, batch(n), rate)
    names = ("loss", "grad_norm", "param_norm")
    want.append(dict(zip(names, map(float, measured), strict=True)))
    want[-1] |= {"tokens": 62.0, "learning_rate": rate, "skipped": 0}
  state, measured = run(dataclasses.replace(CFG, mesh=ONE), count=2)
  for got, expected in zip(measured, want, strict=True):
    assert got == pytest.approx(expected, rel=2e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
    state.params,
    params,
  )
  assert state.step == state.position == 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_accumulation_changes_nothing_but_memory(dropout):
  cfg = dataclasses.replace(CFG, mesh=ONE)
  split = dataclasses.replace(cfg, accumulation=4)
  parts, whole = (run(c, dropout=dropout) for c in (split, cfg))
  assert_same(parts, whole, rtol=2e-6)


@pytest.mark.parametrize(
  ("mesh", "parts"),
  [
    (MeshConfig(data=8), 1),
    (MeshConfig(data=2, fsdp=2, sequence=2), 2),
  ],
)
def test_the_mesh_changes_nothing(mesh, parts):
  cfg = dataclasses.replace(CFG, mesh=mesh, accumulation=parts)
  one = dataclasses.replace(CFG, mesh=ONE)
  assert_same(run(cfg, devices=8), run(one), rtol=2e-6)


def test_dropout_follows_the_position_and_not_the_updates():
  definition = FakeDefinition(dropout=0.5)
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  step = steps.compiled(definition, CFG, mesh)
  on_mesh = jax.device_put(batch(), sharding.batch_sharding(mesh))

  def loss(updates, position):
    with jax.set_mesh(mesh):
      state = states.init(definition, mesh, CFG.optim, seed=0)
      state = states.from_items(
        states.to_items(state),
        state,
        step=updates,
        position=position,
        skipped=position - updates,
        mesh=mesh,
      )
      return float(step(state, on_mesh)[1]["loss"])

  # With a batch skipped or not, position 4 draws what it draws.
  assert loss(4, 4) == loss(3, 4)
  assert loss(4, 4) != loss(4, 5)


def test_a_batch_without_tokens_changes_no_gradient_into_nan():
  definition = FakeDefinition()
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  empty = {name: np.zeros((B, T), np.int32) for name in batch()}
  with jax.set_mesh(mesh):
    state = states.init(definition, mesh, CFG.optim, seed=0)
    state, measured = steps.compiled(definition, CFG, mesh)(state, empty)
  assert (float(measured["loss"]), float(measured["tokens"])) == (0, 0)
  assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(state.params))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_parameters(bad, monkeypatch):
  sums = steps._sums

  def spoiled(params, batch, *args, **kwargs):
    loss, tokens, grads = sums(params, batch, *args, **kwargs)
    spoil = jnp.where(batch["inputs"].max() == 23, jnp.inf, 1)
    if bad == "loss":
      return loss * spoil, tokens, grads
    bias = grads["mixer"]["bias"].at[3].multiply(spoil)
    mixer = grads["mixer"] | {"bias": bias}
    return loss, tokens, grads | {"mixer": mixer}

  monkeypatch.setattr(steps, "_sums", spoiled)
  definition = FakeDefinition()
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  good = batch() | {"inputs": batch()["inputs"] % 23}
  wrong = good | {"inputs": np.full((B, T), 23, np.int32)}
  with jax.set_mesh(mesh):
    train_step = steps.compiled(definition, CFG, mesh)
    state = states.init(definition, mesh, CFG.optim, seed=0)
    before, measured = train_step(state, good)
    assert measured["skipped"] == 0
    before = jax.tree.map(np.asarray, before)
    after, measured = train_step(before, wrong)
    assert not (
      np.isfinite(measured["loss"]) and np.isfinite(measured["grad_norm"])
    )
    assert measured["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(
      np.testing.assert_array_equal, after.optimizer, before.optimizer
    )
    assert (after.step, after.position) == (2, 2)
    after, measured = train_step(after, good)
  assert measured["skipped"] == 1
  assert after.optimizer.count == 2
  assert np.isfinite(measured["loss"])


def test_the_step_takes_over_the_memory_of_the_state():
  definition = FakeDefinition()
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = states.init(definition, mesh, CFG.optim, seed=0)
    steps.compiled(definition, CFG, mesh)(state, batch())
  assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_the_abstract_batch_is_what_the_step_takes():
  mesh = sharding.make_mesh(MeshConfig(data=4, sequence=2))
  definition = FakeDefinition()
  with jax.set_mesh(mesh):
    lowered = steps.compiled(definition, CFG, mesh).lower(
      states.abstract(definition, mesh, CFG.optim),
      steps.abstract_batch(CFG, mesh),
    )
  shapes = {x.shape for x in jax.tree.leaves(lowered.in_avals[0][1])}
  assert shapes == {(B, T)}


@pytest.mark.parametrize(
  ("deterministic", "platform", "options"),
  [
    (False, "gpu", {}),
    (True, "cpu", {}),
    (True, "tpu", {}),
    (
      True,
      "gpu",
      {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False},
    ),
  ],
)
def test_gpus_are_told_to_be_deterministic(
  deterministic, platform, options, monkeypatch
):
  """That XLA obeys is tested where it compiles for GPUs."""
  given = {}
  monkeypatch.setattr(jax, "jit", lambda _, **how: given.update(how))
  compute = dataclasses.replace(CFG.compute, deterministic=deterministic)
  cfg = dataclasses.replace(CFG, compute=compute)
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  monkeypatch.setattr(
    steps, "_platform", lambda of: platform if of is mesh else None
  )
  steps.compiled(FakeDefinition(), cfg, mesh)
  assert given["compiler_options"] == options
