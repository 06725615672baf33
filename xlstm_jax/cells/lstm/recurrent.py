"""The LSTM of the textbooks, its recurrent matrices one per head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells import recurrence


class State(NamedTuple):
  """What an LSTM keeps of its past; all zeros is the empty past."""

  y_BHD: Float[Array, "B H D"]
  c_BHD: Float[Array, "B H D"]
  segment_B: Int[Array, "B"]


def empty_state(
  batch: int, heads: int, head_dim: int, dtype: DTypeLike
) -> State:
  """The empty past, its numbers in `dtype` (the accumulator type)."""
  zeros = jnp.zeros((batch, heads, head_dim), dtype)
  return State(zeros, zeros, jnp.zeros(batch, jnp.int32))


def cell(
  raw_BGHD: Float[Array, "B G H D"], units: recurrence.Units
) -> recurrence.Units:
  """One step of every unit.

  Gates are in the order i, f, z, o, and raw_t = x_t + y_{t-1} R + b. For every
  unit,

      c_t = sigmoid(raw_f) c_{t-1} + sigmoid(raw_i) tanh(raw_z)
      y_t = sigmoid(raw_o) tanh(c_t)

  Where a document starts, y = c = 0. With a single head this is the usual LSTM.
  """
  i, f, z, o = jnp.moveaxis(raw_BGHD, 1, 0)
  _, c = units
  c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c
