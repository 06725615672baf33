"""Next-token cross-entropy in chunks of time, as a sum and a count.

The logits of a whole batch are the largest array of a training step (8192
tokens x 50304 entries are 1.6 GB in fp32). Here those of one chunk exist at a
time, forward and backward, and every device has the weight of its part of the
vocabulary whole: it is gathered once and its gradient summed over the devices
once, not for every chunk.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.sharding import on_mesh, vocabulary_axis

# Logits [B, L, Z] of the weight [Z, D] and of vectors [B, L, D].
Head = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(
  head: Head,
  weight_ZD: Float[Array, "Z D"],
  x_BTD: Float[Array, "B T D"],
  targets_BT: Int[Array, "B T"],
  weights_BT: Float[Array, "B T"],
  *,
  chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The weighted sum of the losses in nats, and the sum of the weights.

  Args:
    head: the logits of any rows of `weight_ZD`, which it may round as it reads
      them: their gradient is summed over the chunks in at least fp32.
    weight_ZD: of the vocabulary projection.
    x_BTD: what `head` reads.
    targets_BT: ids below Z; where the weight is 0 any id will do.
    weights_BT: 0 where the target does not count, else 1.
    chunk: positions of every row whose logits exist at a time on a device.
  """
  loss_BT = token_losses(head, weight_ZD, x_BTD, targets_BT, chunk=chunk)
  # where: an infinite loss at a position that does not count stays out.
  loss_BT = jnp.where(weights_BT > 0, loss_BT * weights_BT, 0)
  return loss_BT.sum(), weights_BT.sum()


def token_losses(
  head: Head,
  weight_ZD: Float[Array, "Z D"],
  x_BTD: Float[Array, "B T D"],
  targets_BT: Int[Array, "B T"],
  *,
  chunk: int,
) -> Float[Array, "B T"]:
  """The loss of every target in nats; arguments as in `cross_entropy`."""
  axis_name = vocabulary_axis(weight_ZD.shape[0])
  dtype = weight_ZD.dtype

  def losses(weight_ZD, x_BTD, targets_BT):
    weight_ZD = weight_ZD.astype(jnp.promote_types(dtype, jnp.float32))

    @jax.checkpoint
    def of_chunk(x_BLD, targets_BL):
      logits_BLZ = head(weight_ZD.astype(dtype), x_BLD)
      return _losses(logits_BLZ, targets_BL, axis_name)

    T = targets_BT.shape[1]
    chunks = -(-T // chunk)
    if chunks <= 1:
      return of_chunk(x_BTD, targets_BT)
    split = (_split(x_BTD, chunks), _split(targets_BT, chunks))
    loss_NBL = jax.lax.map(lambda xs: of_chunk(*xs), split)
    return jnp.moveaxis(loss_NBL, 0, 1).reshape(x_BTD.shape[0], -1)[:, :T]

  return on_mesh(
    losses,
    weight_ZD,
    x_BTD,
    targets_BT,
    axes=(("vocabulary", None), ("batch", "time", None), ("batch", "time")),
    out_axes=("batch", "time"),
  )


def _losses(
  logits_BLZ: jax.Array, targets_BL: jax.Array, axis_name: str | None
) -> jax.Array:
  """log sum exp(logits) - logits[target], without a gather over Z.

  With `axis_name` each device along it has an equal part of the vocabulary.
  """
  max_BL = jax.lax.stop_gradient(logits_BLZ.max(-1))
  ids_Z = jnp.arange(logits_BLZ.shape[-1])
  if axis_name is not None:
    max_BL = jax.lax.pmax(max_BL, axis_name)
    ids_Z += jax.lax.axis_index(axis_name) * len(ids_Z)
  exp_BL = jnp.exp(logits_BLZ - max_BL[..., None]).sum(-1)
  target_BL = jnp.where(ids_Z == targets_BL[..., None], logits_BLZ, 0).sum(-1)
  if axis_name is not None:
    exp_BL, target_BL = jax.lax.psum((exp_BL, target_BL), axis_name)
  return max_BL + jnp.log(exp_BL) - target_BL


def _split(x: jax.Array, chunks: int) -> jax.Array:
  """[B, T, ...] to [N, B, ceil(T / N), ...], padded with zeros."""
  B, T, *rest = x.shape
  padding = [(0, 0), (0, -T % chunks)] + [(0, 0)] * len(rest)
  x = jnp.pad(x, padding).reshape(B, chunks, -1, *rest)
  return jnp.moveaxis(x, 1, 0)
