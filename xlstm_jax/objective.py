"""The loss: next-token cross-entropy in chunks of time, as a sum and a count.

The logits of a whole batch would be the largest array of a training step (8192
tokens x 50304 entries are 1.6 GB in fp32). Here only the logits of one chunk
exist at a time, and on every device only those of its part of the vocabulary.

The gradient is computed together with the loss, from the same logits. That is
possible because the loss is a sum, whose cotangent only scales the gradient. So
no logits are computed twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.precision import accumulator, product
from xlstm_jax.layers.compute import wide
from xlstm_jax.layers.embedding import attend
from xlstm_jax.layers.linear import soft_cap
from xlstm_jax.sharding import on_mesh, split_over

# exp(-2 cap) is a normal number in float32.
LARGEST_CAP = 40.0
ROWS = ("batch", "time")
VECTORS = ("batch", "time", None)
WEIGHT = ("vocabulary", None)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
  weight_ZD: Float[Array, "Z D"],
  x_BTD: Float[Array, "B T D"],
  targets_BT: Int[Array, "B T"],
  weights_BT: Float[Array, "B T"],
  chunk: int,
  cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The weighted sum of the losses in nats, and the sum of the weights.

  It can be differentiated once, with respect to `weight_ZD` and `x_BTD`.

  Args:
    weight_ZD: weight of the vocabulary projection. Its gradient is summed over
      the chunks in fp32 or wider.
    x_BTD: the hidden vectors that it projects.
    targets_BT: ids below Z, or any id where the weight is 0.
    weights_BT: 1 where the target counts, 0 elsewhere.
    chunk: positions of every row whose logits exist at a time on a device.
    cap: soft cap of the logits; None for none.
  """
  loss_BT = token_losses(weight_ZD, x_BTD, targets_BT, chunk=chunk, cap=cap)
  return _counted(loss_BT, weights_BT).sum(), weights_BT.sum()


def token_losses(
  weight_ZD: Float[Array, "Z D"],
  x_BTD: Float[Array, "B T D"],
  targets_BT: Int[Array, "B T"],
  *,
  chunk: int,
  cap: float | None = None,
) -> Float[Array, "B T"]:
  """The loss of every target in nats; arguments as in `cross_entropy`.

  Differentiate `cross_entropy` instead: autodiff of this function would keep
  the logits of all chunks.
  """
  vocabulary = split_over("vocabulary", weight_ZD.shape[0])

  def losses(weight_ZD, x_BTD, targets_BT):
    def of_chunk(xs):
      x_BLD, targets_BL = xs
      log_sum_BL = _log_sum(attend(weight_ZD, x_BLD), cap, vocabulary)
      return log_sum_BL - _target(weight_ZD, x_BLD, targets_BL, cap, vocabulary)

    loss_NBL = jax.lax.map(of_chunk, _split((x_BTD, targets_BT), chunk))
    return _joined(loss_NBL, targets_BT.shape[1])

  return on_mesh(
    losses,
    weight_ZD,
    x_BTD,
    targets_BT,
    axes=(WEIGHT, VECTORS, ROWS),
    out_axes=ROWS,
  )


def _forward(weight_ZD, x_BTD, targets_BT, weights_BT, chunk, cap):
  vocabulary = split_over("vocabulary", weight_ZD.shape[0])
  batch = split_over("batch", x_BTD.shape[0])
  shares = batch + split_over("time", x_BTD.shape[1])

  def sums(weight_ZD, x_BTD, targets_BT, weights_BT):
    dtype = weight_ZD.dtype

    def of_chunk(dweight_ZD, xs):
      x_BLD, targets_BL, weights_BL = xs
      scores_BLZ = attend(weight_ZD, x_BLD)
      log_sum_BL = _log_sum(scores_BLZ, cap, vocabulary)
      # After the barrier the compiler caps the scores again as it reads them,
      # instead of writing the capped scores and reading those.
      scores_BLZ = jax.lax.optimization_barrier(scores_BLZ)
      logits_BLZ, uncap = jax.vjp(partial(soft_cap, cap=cap), scores_BLZ)
      ids_BL = _local(targets_BL, len(weight_ZD), vocabulary)
      one_hot_BLZ = jnp.arange(len(weight_ZD)) == ids_BL[..., None]
      dlogits_BLZ = _counted(
        jnp.exp(logits_BLZ - log_sum_BL[..., None]) - one_hot_BLZ,
        weights_BL[..., None],
      )
      (dscores_BLZ,) = uncap(dlogits_BLZ.astype(logits_BLZ.dtype))
      dx_BLD = product("BLZ,ZD->BLD", dscores_BLZ, weight_ZD, dtype)
      dweight_ZD += product("BLZ,BLD->ZD", dscores_BLZ, x_BLD, dtype)
      target_BL = _target(weight_ZD, x_BLD, targets_BL, cap, vocabulary)
      loss = _counted(log_sum_BL - target_BL, weights_BL).sum()
      return dweight_ZD, (loss, dx_BLD.astype(x_BLD.dtype))

    dweight_ZD, (loss_N, dx_NBLD) = jax.lax.scan(
      of_chunk,
      jnp.zeros(weight_ZD.shape, accumulator(dtype)),
      _split((x_BTD, targets_BT, weights_BT), chunk),
    )
    loss, count = loss_N.sum(), weights_BT.sum()
    dweight_ZD = dweight_ZD.astype(dtype)
    dx_BTD = _joined(dx_NBLD, x_BTD.shape[1])
    if shares:
      loss, count, dweight_ZD = jax.lax.psum((loss, count, dweight_ZD), shares)
    if vocabulary:
      dx_BTD = jax.lax.psum(dx_BTD, vocabulary)
    return loss, count, dweight_ZD, dx_BTD

  loss, count, *grads = on_mesh(
    sums,
    weight_ZD,
    x_BTD,
    targets_BT,
    weights_BT,
    axes=(WEIGHT, VECTORS, ROWS, ROWS),
    out_axes=((), (), WEIGHT, VECTORS),
  )
  return (loss, count), grads


def _backward(chunk, cap, grads, cotangents):
  del chunk, cap
  scale, _ = cotangents
  return *((scale * grad).astype(grad.dtype) for grad in grads), None, None


cross_entropy.defvjp(_forward, _backward)


def _log_sum(
  scores_BLZ: jax.Array, cap: float | None, vocabulary: tuple[str, ...]
) -> jax.Array:
  """log sum exp of the logits.

  A cap takes the place of the largest logit, which would take a pass to find.
  """
  logits_BLZ = soft_cap(scores_BLZ, cap)
  if cap is not None and cap <= LARGEST_CAP:
    largest_BL = jnp.full(scores_BLZ.shape[:-1], cap, scores_BLZ.dtype)
  else:
    largest_BL = logits_BLZ.max(-1)
    if vocabulary:
      largest_BL = jax.lax.pmax(largest_BL, vocabulary)
  exp_BLZ = jnp.exp(logits_BLZ - largest_BL[..., None])
  return largest_BL + jnp.log(_summed(exp_BLZ, vocabulary))


def _target(
  weight_ZD: jax.Array,
  x_BLD: jax.Array,
  targets_BL: jax.Array,
  cap: float | None,
  vocabulary: tuple[str, ...],
) -> jax.Array:
  """The logit of the target, computed again, not read from all logits."""
  ids_BL = _local(targets_BL, len(weight_ZD), vocabulary)
  here_BL = (ids_BL >= 0) & (ids_BL < len(weight_ZD))
  rows_BLD = weight_ZD.at[ids_BL].get(mode="clip")
  terms_BLD = jnp.where(here_BL[..., None], wide(x_BLD) * wide(rows_BLD), 0)
  return soft_cap(_summed(terms_BLD, vocabulary), cap)


def _summed(x: jax.Array, vocabulary: tuple[str, ...]) -> jax.Array:
  """The sum over the last axis, which may be split over devices."""
  x_BL = x.sum(-1)
  return jax.lax.psum(x_BL, vocabulary) if vocabulary else x_BL


def _local(
  targets_BL: jax.Array, size: int, vocabulary: tuple[str, ...]
) -> jax.Array:
  """The targets' places among the `size` entries on this device."""
  if not vocabulary:
    return targets_BL
  return targets_BL - jax.lax.axis_index(vocabulary) * size


def _counted(x: jax.Array, weights: jax.Array) -> jax.Array:
  """x times its weights; weight 0 gives 0, even where x is infinite."""
  return jnp.where(weights > 0, x * weights, 0)


def _split(xs: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
  """Each [B, T, ...] as chunks [N, B, L, ...], padded with zeros."""
  B, T = xs[0].shape[:2]
  chunks = -(-T // chunk)

  def split(x):
    padding = [(0, 0), (0, -T % chunks)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding).reshape(B, chunks, -1, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return tuple(split(x) for x in xs)


def _joined(x_NBL: jax.Array, time: int) -> jax.Array:
  """The inverse of `_split`: [N, B, L, ...] to [B, T, ...]."""
  x_BNL = jnp.moveaxis(x_NBL, 0, 1)
  return x_BNL.reshape(len(x_BNL), -1, *x_BNL.shape[3:])[:, :time]
