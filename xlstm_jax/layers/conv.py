"""Causal depthwise convolution over time, with state and segments."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute, wide
from xlstm_jax.sharding import from_before, of_holder, on_mesh, time_axis


class ConvState(NamedTuple):
  """The last W - 1 real inputs of each row, and their segments.

  All zeros, with segment 0, is the empty past.
  """

  inputs_BWU: Float[Array, "B W-1 U"]
  segments_BW: Int[Array, "B W-1"]


class CausalConv(nnx.Module):
  """`y_t = bias + sum_j weight[j] x_{t-W+1+j}` over inputs of t's own segment.

  Weights and bias start at U(+-1/sqrt(W)).
  """

  def __init__(
    self, window: int, channels: int, *, compute: Compute, rngs: nnx.Rngs
  ):
    init = initializers.uniform(window**-0.5)
    self.window = window
    self.weight = nnx.Param(
      init(rngs.params(), (window, channels), compute.param_dtype),
      axes=(None, "inner"),
    )
    self.bias = nnx.Param(
      init(rngs.params(), (channels,), compute.param_dtype), axes=("inner",)
    )

  def empty_state(self, batch: int, dtype: DTypeLike) -> ConvState:
    """The empty past of `batch` rows."""
    past = self.window - 1
    return ConvState(
      jnp.zeros((batch, past, self.weight.shape[-1]), dtype),
      jnp.zeros((batch, past), jnp.int32),
    )

  def __call__(
    self,
    x_BTU: Float[Array, "B T U"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    state: ConvState | None = None,
  ) -> tuple[Float[Array, "B T U"], ConvState]:
    """Convolves `x`; without segments every token continues the state.

    If time is split over devices, each must hold at least the W - 1 tokens that
    the next one sees.
    """
    B, T, _ = x_BTU.shape
    if state is None:
      state = self.empty_state(B, x_BTU.dtype)
    state_axes = ConvState._make([("batch", None, "inner"), ("batch", None)])
    return on_mesh(
      functools.partial(_convolve, axis_name=time_axis(T)),
      x_BTU,
      self.weight[...],
      self.bias[...],
      segments_BT,
      state,
      axes=(
        ("batch", "time", "inner"),
        (None, "inner"),
        ("inner",),
        None if segments_BT is None else ("batch", "time"),
        state_axes,
      ),
      out_axes=(("batch", "time", "inner"), state_axes),
    )


def _convolve(
  x_BTU, weight_WU, bias_U, segments_BT, state, *, axis_name
) -> tuple[jax.Array, ConvState]:
  """The convolution of the channels and tokens that a device holds."""
  B, T, _ = x_BTU.shape
  past = len(weight_WU) - 1
  real_BT = None if segments_BT is None else segments_BT > 0
  if segments_BT is None:
    last_B1 = state.segments_BW[:, -1:] if past else 1
    segments_BT = jnp.broadcast_to(jnp.maximum(last_B1, 1), (B, T))
  if axis_name is not None:
    state = _entering(x_BTU, segments_BT, state, axis_name)
  # Along S: the state's W - 1 inputs, then x.
  x_BSU = jnp.concatenate([state.inputs_BWU, x_BTU], axis=1)
  segments_BS = jnp.concatenate([state.segments_BW, segments_BT], axis=1)
  y_BTU = wide(bias_U)
  for j in range(past + 1):
    same_BT = segments_BS[:, j : j + T] == segments_BT
    past_BTU = jnp.where(same_BT[..., None], x_BSU[:, j : j + T], 0)
    y_BTU = y_BTU + wide(weight_WU[j]) * wide(past_BTU)
  if real_BT is None:
    real_BT = jnp.ones((B, T), bool)
    new = ConvState(x_BSU[:, T:], segments_BS[:, T:])
  else:
    new = _last_real(x_BSU, segments_BS, real_BT.sum(1), past)
  if axis_name is not None:
    new = of_holder(new, _ends_here(real_BT, axis_name), axis_name)
  return y_BTU.astype(x_BTU.dtype), new


def _last_real(x_BSU, segments_BS, length_B, past: int) -> ConvState:
  """The last inputs before the trailing padding of each row."""

  def tail(x_SU, segments_S, length):
    return ConvState(
      jax.lax.dynamic_slice_in_dim(x_SU, length, past),
      jax.lax.dynamic_slice_in_dim(segments_S, length, past),
    )

  return jax.vmap(tail)(x_BSU, segments_BS, length_B)


def _entering(x_BTU, segments_BT, state: ConvState, axis_name) -> ConvState:
  """The inputs before this device's first token.

  If that token is real, so are they.
  """
  T, past = x_BTU.shape[1], state.inputs_BWU.shape[1]
  if past > T:
    raise ValueError(f"{T} tokens of a device are no past of {past} inputs")
  last = ConvState(x_BTU[:, T - past :], segments_BT[:, T - past :])
  first = jax.lax.axis_index(axis_name) == 0
  return jax.tree.map(
    functools.partial(jnp.where, first), state, from_before(last, axis_name)
  )


def _ends_here(real_BT, axis_name) -> jax.Array:
  """Whether a row's last real token is on this device; a row may have none."""
  at = jax.lax.axis_index(axis_name)
  last_B = jax.lax.pmax(jnp.where(real_BT.any(1), at, 0), axis_name)
  return at == last_B
