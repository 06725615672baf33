"""The memory of the mLSTM and how a query reads it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells.precision import quotient


class State(NamedTuple):
  """What an mLSTM keeps of its past: C and n are scaled by exp(-m).

  Keys enter unscaled (the query carries the factor K^-0.5). All zeros is the
  empty past.
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
  """The same past, its C and n scaled by exp(-m_BH) for another m."""
  factor_BH = jnp.exp(state.m_BH - m_BH)
  return State(
    factor_BH[..., None, None] * state.C_BHKV,
    factor_BH[..., None] * state.n_BHK,
    m_BH,
    state.segment_B,
  )


# h does not depend on the scale exp(-m), except through eps. So the parallel
# forms treat the scale of C and n as a constant that happens to be exp(-m):
# this spares them a gradient made of terms that cancel.
constant = jax.lax.stop_gradient


def with_constant_scale(state: State) -> State:
  """The same numbers, the scale of C and n now being a constant."""
  return rescale(state, constant(state.m_BH))._replace(m_BH=state.m_BH)


def with_own_scale(state: State) -> State:
  """The way back from `with_constant_scale`."""
  return rescale(state._replace(m_BH=constant(state.m_BH)), state.m_BH)


def reading_scale(m: Float[Array, "..."]) -> Float[Array, "..."]:
  """The g of the scale exp(-g) in which outputs are computed: max(m, 0).

  exp(-m) would overflow where m is very negative.
  """
  return constant(jnp.maximum(m, 0))


def readout(
  numerator_HV: Float[Array, "*tokens H V"],
  normalizer_H: Float[Array, "*tokens H"],
  m_H: Float[Array, "*tokens H"],
  *,
  normalize: bool,
  eps: float,
  dtype: DTypeLike,
) -> Float[Array, "*tokens H V"]:
  """h from C^T q and n^T q, both scaled by exp(-g), g = `reading_scale(m)`.

  This is C^T q / (max(|n^T q|, exp(-m)) + eps), where C and n are scaled by
  exp(-m), numerator and denominator times exp(m - g). The numerator is made by
  products of operands in `dtype`.
  """
  g_H = reading_scale(m_H)
  if not normalize:
    return numerator_HV * jnp.exp(g_H)[..., None]
  size_H = jnp.abs(normalizer_H)
  # The gradient divides by the square of the denominator.
  smallest = jnp.finfo(g_H.dtype).tiny ** 0.5
  floor_H = jnp.maximum(jnp.exp(-g_H), smallest)
  size_H = jnp.where(size_H > floor_H, size_H, floor_H)
  denominator_H = size_H + eps * jnp.exp(m_H - g_H)
  return quotient(numerator_HV, denominator_H, dtype)
