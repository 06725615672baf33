"""Gates in log space and their sums over time.

Log forget gates are never positive, so nothing cancels in their sums. It would
in differences of running sums, and none are taken.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_BLOCK = 16
# Up to this length a sum over the rest of a row is one matrix product.
_LONG = 512


def log_gates(
  i_BTH: Float[Array, "B T H"],
  f_BTH: Float[Array, "B T H"],
  real_BT: Bool[Array, "B T"],
  *,
  input_gate: Literal["exp", "sigmoid"],
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
  """log i and log f; padding writes nothing (-inf) and forgets nothing (0)."""
  real_BT1 = real_BT[..., None]
  log_i_BTH = i_BTH if input_gate == "exp" else jax.nn.log_sigmoid(i_BTH)
  return (
    jnp.where(real_BT1, log_i_BTH, -jnp.inf),
    jnp.where(real_BT1, jax.nn.log_sigmoid(f_BTH), 0),
  )


def larger(
  past: Float[Array, "*shape"], present: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """The larger of two; if they are equal, the past gets all the gradient."""
  return jnp.where(past >= present, past, present)


@jax.custom_jvp
def largest(x: Float[Array, "*batch T"]) -> Float[Array, "*batch"]:
  """The largest along the last axis; the first of equals gets all the gradient.

  `jnp.max` shares its gradient among the entries that compare as equal to it.
  XLA may compute x again for that comparison and round it differently. Then no
  entry is equal, and the gradient is 0 / 0.
  """
  return jnp.max(x, axis=-1)


@largest.defjvp
def _largest_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  place = jnp.argmax(x, axis=-1, keepdims=True)
  chosen = jnp.arange(x.shape[-1]) == place
  return largest(x), jnp.sum(jnp.where(chosen, dx, 0), axis=-1)


def sums_upto(x: Float[Array, "*batch T"]) -> Float[Array, "*batch T"]:
  """y[t] = x[0] + ... + x[t]."""
  return _sums(x, "S,TS->T", np.tri(x.shape[-1]))


def sums_after(x: Float[Array, "*batch T"]) -> Float[Array, "*batch T"]:
  """y[t] = x[t+1] + ... + x[T-1]."""
  length = x.shape[-1]
  if length <= _LONG:
    return _sums(x, "S,TS->T", np.tri(length, k=-1).T)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % _LONG)])
  x = x.reshape(*x.shape[:-1], -1, _LONG)
  y = sums_after(x) + sums_after(x.sum(-1))[..., None]
  return y.reshape(*y.shape[:-2], -1)[..., :length]


def sums_between(x: Float[Array, "*batch T"]) -> Float[Array, "*batch T T"]:
  """y[t, s] = x[s+1] + ... + x[t] for s <= t; undefined elsewhere.

  Long rows are cut into blocks. A sum is then that of the end of the block of
  s, of the blocks in between, and of the beginning of the block of t.
  """
  length = x.shape[-1]
  if length <= _BLOCK:
    t, s, r = np.ogrid[:length, :length, :length]
    return _sums(x, "R,TSR->TS", (s < r) & (r <= t))
  if missing := -length % _BLOCK:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return sums_between(x)[..., :length, :length]
  x = x.reshape(*x.shape[:-1], -1, _BLOCK)
  upto = sums_upto(x)
  between = sums_between(upto[..., -1])  # from block s+1 to block t
  between = jnp.roll(between, 1, axis=-2)  # from block s+1 to block t-1
  apart = (
    upto[..., :, :, None, None]
    + between[..., :, None, :, None]
    + sums_after(x)[..., None, None, :, :]
  )
  same = np.eye(x.shape[-2], dtype=bool)[:, None, :, None]
  y = jnp.where(same, sums_between(x)[..., :, :, None, :], apart)
  return y.reshape(*y.shape[:-4], length, length)


def _sums(x, spec: str, chosen: np.ndarray):
  """Sums of chosen elements along the last axis, as one matrix product."""
  chosen_ones = jnp.asarray(chosen, x.dtype)
  spec = "..." + spec.replace("->", "->...")
  return jnp.einsum(spec, x, chosen_ones, precision="highest")
