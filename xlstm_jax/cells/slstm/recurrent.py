"""The definition of the sLSTM: one token after the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells import recurrence


class State(NamedTuple):
  """What an sLSTM keeps of its past; c and n are scaled by exp(-m).

  All zeros is the empty past.
  """

  y_BHD: Float[Array, "B H D"]
  c_BHD: Float[Array, "B H D"]
  n_BHD: Float[Array, "B H D"]
  m_BHD: Float[Array, "B H D"]
  segment_B: Int[Array, "B"]


def empty_state(
  batch: int, heads: int, head_dim: int, dtype: DTypeLike
) -> State:
  """The empty past, its numbers in `dtype` (the accumulator type)."""
  zeros = jnp.zeros((batch, heads, head_dim), dtype)
  return State(zeros, zeros, zeros, zeros, jnp.zeros(batch, jnp.int32))


def cell(
  raw_BGHD: Float[Array, "B G H D"], units: recurrence.Units
) -> recurrence.Units:
  """One step of every unit.

  Gates are in the order i, f, z, o, and raw_t = x_t + y_{t-1} R + b. For every
  unit,

      c_t = f_t c_{t-1} + i_t tanh(raw_z)      i_t = exp(raw_i)
      n_t = f_t n_{t-1} + i_t                  f_t = sigmoid(raw_f)
      y_t = sigmoid(raw_o) c_t / n_t

  Where a document starts, y = c = n = 0. c and n are kept scaled by exp(-m), so
  that the exponential gate cannot overflow:

      m_t = max(log f_t + m_{t-1}, raw_i)      (raw_i where n_{t-1} = 0)
      f'_t = exp(log f_t + m_{t-1} - m_t),     i'_t = exp(raw_i - m_t)
      c'_t = f'_t c'_{t-1} + i'_t tanh(raw_z)

  and n' likewise (Beck et al., xLSTM: Extended Long Short-Term Memory, 2024,
  eq. 8-17). y does not depend on m, and the gradient is taken through m.
  """
  i, f, z, o = jnp.moveaxis(raw_BGHD, 1, 0)
  _, c, n, m = units
  # A unit that holds nothing (n = 0) has no scale; its first input sets one.
  carried = jnp.where(n == 0, -jnp.inf, jax.nn.log_sigmoid(f) + m)
  m = jnp.where(carried >= i, carried, i)
  forget, write = jnp.exp(carried - m), jnp.exp(i - m)
  c = forget * c + write * jnp.tanh(z)
  n = forget * n + write
  return jax.nn.sigmoid(o) * c / n, c, n, m
