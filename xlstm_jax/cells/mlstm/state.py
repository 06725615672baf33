"""The memory of the mLSTM, and how a query reads it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells.precision import accumulator, quotient


class State(NamedTuple):
  """What an mLSTM keeps of its past; C and n are scaled by exp(-m).

  Keys enter unscaled, because the query carries the factor K^-0.5. All zeros is
  the empty past.
  """

  C_BHKV: Float[Array, "B H K V"]
  n_BHK: Float[Array, "B H K"]
  m_BH: Float[Array, "B H"]
  segment_B: Int[Array, "B"]


def empty_state(
  batch: int, heads: int, key_dim: int, value_dim: int, dtype: DTypeLike
) -> State:
  """The empty past, its numbers in `dtype` (the accumulator type)."""
  return State(
    jnp.zeros((batch, heads, key_dim, value_dim), dtype),
    jnp.zeros((batch, heads, key_dim), dtype),
    jnp.zeros((batch, heads), dtype),
    jnp.zeros(batch, jnp.int32),
  )


def rescale(state: State, m_BH: Float[Array, "B H"]) -> State:
  """The same past, with C and n scaled by another m."""
  factor_BH = jnp.exp(state.m_BH - m_BH)
  return State(
    factor_BH[..., None, None] * state.C_BHKV,
    factor_BH[..., None] * state.n_BHK,
    m_BH,
    state.segment_B,
  )


def constant(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
  """A scale m, which is a constant to autodiff if `dtype` is a narrow type.

  h does not depend on the scale exp(-m), except through eps, so the gradients
  that flow back through m sum to zero. In a narrow type they are made of
  rounded products and do not cancel, so they are left out.

  In the accumulator type they are kept. Where an old memory dominates, its
  weight is 1 whatever the forget gates are. With a constant m it would seem to
  depend on them, and another term would have to cancel that.
  """
  return x if dtype == accumulator(dtype) else jax.lax.stop_gradient(x)


def with_constant_scale(state: State, dtype: DTypeLike) -> State:
  """The same numbers, with a `constant` as the scale of C and n."""
  m_BH = constant(state.m_BH, dtype)
  return rescale(state, m_BH)._replace(m_BH=state.m_BH)


def with_own_scale(state: State, dtype: DTypeLike) -> State:
  """The inverse of `with_constant_scale`."""
  m_BH = constant(state.m_BH, dtype)
  return rescale(state._replace(m_BH=m_BH), state.m_BH)


def reading_scale(
  m: Float[Array, "..."], dtype: DTypeLike
) -> Float[Array, "..."]:
  """g = max(m, 0), for the scale exp(-g) in which outputs are computed.

  exp(-m) would overflow where m is very negative.
  """
  return constant(jnp.maximum(m, 0), dtype)


def readout(
  numerator_HV: Float[Array, "*tokens H V"],
  normalizer_H: Float[Array, "*tokens H"],
  m_H: Float[Array, "*tokens H"],
  *,
  normalize: bool,
  eps: float,
  dtype: DTypeLike,
) -> Float[Array, "*tokens H V"]:
  """h from C^T q and n^T q, both scaled by exp(-g) with g = `reading_scale(m)`.

  With C and n scaled by exp(-m), h is C^T q / (max(|n^T q|, exp(-m)) + eps).
  Here numerator and denominator are multiplied by exp(m - g). The numerator
  comes from products with operands in `dtype`.
  """
  g_H = reading_scale(m_H, dtype)
  if not normalize:
    return numerator_HV * jnp.exp(g_H)[..., None]
  size_H = jnp.abs(normalizer_H)
  # The gradient divides by the square of the denominator.
  smallest = jnp.finfo(g_H.dtype).tiny ** 0.5
  floor_H = jnp.maximum(jnp.exp(-g_H), smallest)
  size_H = jnp.where(size_H > floor_H, size_H, floor_H)
  denominator_H = size_H + eps * jnp.exp(m_H - g_H)
  return quotient(numerator_HV, denominator_H, dtype)
