"""One training step: a pure function, jitted here and nowhere else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xlstm_jax import objective, optim, sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.train import state as states
from xlstm_jax.train.state import TrainState

# "inputs", "targets" and "segments", int32 [B, T] each.
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def compiled(definition: Definition, cfg: RunConfig, mesh: Mesh) -> Any:
  """The jitted `train_step`, which reuses the memory of the state.

  Training, plans for other machines and benchmarks all use this function.
  """
  of_state = states.shardings(definition, mesh)
  return jax.jit(
    functools.partial(train_step, definition=definition, cfg=cfg, mesh=mesh),
    in_shardings=(of_state, sharding.batch_sharding(mesh)),
    out_shardings=(of_state, sharding.replicated(mesh)),
    donate_argnums=0,
    compiler_options=_compiler_options(cfg, mesh),
  )


def _compiler_options(cfg: RunConfig, mesh: Mesh) -> dict[str, bool]:
  if not cfg.compute.deterministic or _platform(mesh) != "gpu":
    return {}
  # The first option forbids atomic sums, as of the embedding's gradient, and
  # timing kernels against each other. Without timing, and without a device to
  # ask, Triton's matmul kernels have no tiles.
  return {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_enable_triton_gemm": False,
  }


def _platform(mesh: Mesh) -> str:
  return mesh.devices.flat[0].platform


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> Any:
  """Shape, dtype and sharding of a batch."""
  array = jax.ShapeDtypeStruct(
    (cfg.batch_size, cfg.data.context),
    jnp.int32,
    sharding=sharding.batch_sharding(mesh),
  )
  return dict.fromkeys(("inputs", "targets", "segments"), array)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  definition: Definition,
  cfg: RunConfig,
  mesh: Mesh,
) -> tuple[TrainState, Metrics]:
  """The state after one update, and what was measured before it.

  The loss is the sum over all tokens of the global batch divided by their
  number, whatever the sharding, the accumulation and the packing.

  If the loss or the gradient is not finite, parameters and moments stay as they
  are, and only step and position advance.

  Returns:
    The state, and "loss" (nats per token), "tokens" (that count),
    "grad_norm" (before clipping), "param_norm", "learning_rate" and "skipped"
    (updates so far that were).
  """
  # A key for every row, so that parts of a batch draw the same as the whole.
  dropout_key = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.fold_in(states.keys(cfg.seed)[1], state.position),
    jnp.arange(len(batch["inputs"])),
  )
  loss_sum, tokens, grads = _sums(
    state.params, batch, dropout_key, definition=definition, cfg=cfg, mesh=mesh
  )
  count = jnp.maximum(tokens, 1)
  grads = jax.tree.map(lambda g: g / count, grads)
  rate = optim.learning_rate(cfg.optim, state.step, steps=cfg.steps)
  updates, moments = optim.update(cfg.optim, grads, state.moments, state.params)
  params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
  loss, grad_norm = loss_sum / count, optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  params, moments = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (params, moments),
    (state.params, state.moments),
  )
  new = TrainState(
    params=params,
    moments=moments,
    step=state.step + 1,
    position=state.position + 1,
  )
  return new, {
    "loss": loss,
    "tokens": tokens,
    "grad_norm": grad_norm,
    "param_norm": optax.tree.norm(state.params),
    "learning_rate": rate,
    "skipped": new.step - moments.count,
  }


def _sums(
  params: Params,
  batch: Batch,
  dropout_key: jax.Array,
  *,
  definition: Definition,
  cfg: RunConfig,
  mesh: Mesh,
) -> tuple[jax.Array, jax.Array, Params]:
  """Loss, tokens and gradient, summed over the batch one part at a time."""
  where = sharding.shardings(mesh, definition.axes(), params)

  def of_part(part: Batch, key: jax.Array):
    loss = functools.partial(
      _loss_sum, batch=part, dropout_key=key, definition=definition, cfg=cfg
    )
    (loss_sum, tokens), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return loss_sum, tokens, jax.lax.with_sharding_constraint(grads, where)

  if cfg.accumulation == 1:
    return of_part(batch, dropout_key)

  def add(sums, scanned):
    return jax.tree.map(jnp.add, sums, of_part(*scanned)), None

  parts = jax.tree.map(lambda x: _split_rows(x, cfg.accumulation), batch)
  # Part n holds the rows n, n + parts, ..., and so do its keys.
  keys = dropout_key.reshape(-1, cfg.accumulation).T
  shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], (parts, keys)))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, (parts, keys))[0]


def _loss_sum(
  params: Params,
  *,
  batch: Batch,
  dropout_key: jax.Array,
  definition: Definition,
  cfg: RunConfig,
) -> tuple[jax.Array, jax.Array]:
  lm = definition.bind(params)
  x_BTD, _ = lm(
    batch["inputs"], segments_BT=batch["segments"], dropout_key=dropout_key
  )
  weights_BT = (batch["segments"] > 0).astype(jnp.float32)
  return objective.cross_entropy(
    lm.vocabulary_weight(),
    x_BTD,
    batch["targets"],
    weights_BT,
    chunk=cfg.loss_chunk,
    cap=cfg.model.logit_cap,
  )


def _split_rows(x_BT: jax.Array, parts: int) -> jax.Array:
  """[B, T] to [parts, B / parts, T] without moving rows between devices.

  Part n holds the rows n, n + parts, n + 2 parts, ...
  """
  B, T = x_BT.shape
  x_PBT = x_BT.reshape(B // parts, parts, T).swapaxes(0, 1)
  return sharding.constrain(x_PBT, None, "batch", "time")
