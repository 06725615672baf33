"""The LSTM of the textbooks, its recurrent matrices one per head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells import recurrence
from xlstm_jax.cells.precision import accumulator


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
  """One step of every unit, as defined in `lstm`."""
  i, f, z, o = jnp.moveaxis(raw_BGHD, 1, 0)
  _, c = units
  c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


def lstm(
  x_BTGHD: Float[Array, "B T 4 H D"],
  R_GHDE: Float[Array, "4 H D D"],
  b_GHD: Float[Array, "4 H D"],
  *,
  segments_BT: Int[Array, "B T"] | None = None,
  state: State | None = None,
) -> tuple[Float[Array, "B T H D"], State]:
  """Runs the LSTM cell over T tokens.

  With gates in the order i, f, z, o and raw_t = x_t + y_{t-1} R + b, for
  every unit

      c_t = sigmoid(raw_f) c_{t-1} + sigmoid(raw_i) tanh(raw_z)
      y_t = sigmoid(raw_o) tanh(c_t)

  with y = c = 0 where a document starts. A single head is the usual LSTM.
  Arguments and results are those of `xlstm_jax.cells.slstm.slstm`.
  """
  if state is None:
    batch, _, _, heads, head_dim = x_BTGHD.shape
    state = empty_state(batch, heads, head_dim, accumulator(x_BTGHD.dtype))
  y_BTHD, units, segment_B = recurrence.run(
    cell, x_BTGHD, R_GHDE, b_GHD, segments_BT, state[:-1], state.segment_B
  )
  return y_BTHD, State(*units, segment_B=segment_B)


def lstm_step(
  x_BGHD: Float[Array, "B 4 H D"],
  R_GHDE: Float[Array, "4 H D D"],
  b_GHD: Float[Array, "4 H D"],
  *,
  segments_B: Int[Array, "B"] | None = None,
  state: State | None = None,
) -> tuple[Float[Array, "B H D"], State]:
  """`lstm` for a single token per row."""
  y_B1HD, state = lstm(
    x_BGHD[:, None],
    R_GHDE,
    b_GHD,
    segments_BT=None if segments_B is None else segments_B[:, None],
    state=state,
  )
  return y_B1HD[:, 0], state
