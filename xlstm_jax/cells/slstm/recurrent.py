"""The definition of the sLSTM: one token after the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells import recurrence
from xlstm_jax.cells.precision import accumulator


class State(NamedTuple):
  """What an sLSTM keeps of its past: c and n are scaled by exp(-m).

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
  """One step of every unit, as defined in `slstm`."""
  i, f, z, o = jnp.moveaxis(raw_BGHD, 1, 0)
  _, c, n, m = units
  # A unit that holds nothing (n = 0) has no scale: the first input sets it.
  carried = jnp.where(n == 0, -jnp.inf, jax.nn.log_sigmoid(f) + m)
  m = jnp.where(carried >= i, carried, i)
  forget, write = jnp.exp(carried - m), jnp.exp(i - m)
  c = forget * c + write * jnp.tanh(z)
  n = forget * n + write
  return jax.nn.sigmoid(o) * c / n, c, n, m


def slstm(
  x_BTGHD: Float[Array, "B T 4 H D"],
  R_GHDE: Float[Array, "4 H D D"],
  b_GHD: Float[Array, "4 H D"],
  *,
  segments_BT: Int[Array, "B T"] | None = None,
  state: State | None = None,
) -> tuple[Float[Array, "B T H D"], State]:
  """Runs the sLSTM cell over T tokens.

  With gates in the order i, f, z, o and raw_t = x_t + y_{t-1} R + b, for
  every unit

      c_t = f_t c_{t-1} + i_t tanh(raw_z)      i_t = exp(raw_i)
      n_t = f_t n_{t-1} + i_t                  f_t = sigmoid(raw_f)
      y_t = sigmoid(raw_o) c_t / n_t

  with y = c = n = 0 where a document starts. c and n are kept scaled by
  exp(-m), so that the exponential gate cannot overflow:

      m_t = max(log f_t + m_{t-1}, raw_i)      (raw_i where n_{t-1} = 0)
      f'_t = exp(log f_t + m_{t-1} - m_t),     i'_t = exp(raw_i - m_t)
      c'_t = f'_t c'_{t-1} + i'_t tanh(raw_z)

  and n' likewise (Beck et al., xLSTM: Extended Long Short-Term Memory, 2024,
  eq. 8-17). y does not depend on m, and the gradient is taken through m.

  Args:
    x_BTGHD: The inputs' part of the gates.
    R_GHDE: One matrix per gate and head, from D units y to D units. Its type
      is that of the operands of the product y R.
    b_GHD: Biases.
    segments_BT: Document of each token, see `xlstm_jax.cells.documents`;
      without it every token is real and continues the state.
    state: What the last call returned; None is the empty past.

  Returns:
    y in the type of x (0 at padding) and the state after the last token.
  """
  if state is None:
    batch, _, _, heads, head_dim = x_BTGHD.shape
    state = empty_state(batch, heads, head_dim, accumulator(x_BTGHD.dtype))
  y_BTHD, units, segment_B = recurrence.run(
    cell, x_BTGHD, R_GHDE, b_GHD, segments_BT, state[:-1], state.segment_B
  )
  return y_BTHD, State(*units, segment_B=segment_B)


def slstm_step(
  x_BGHD: Float[Array, "B 4 H D"],
  R_GHDE: Float[Array, "4 H D D"],
  b_GHD: Float[Array, "4 H D"],
  *,
  segments_B: Int[Array, "B"] | None = None,
  state: State | None = None,
) -> tuple[Float[Array, "B H D"], State]:
  """`slstm` for a single token per row."""
  y_B1HD, state = slstm(
    x_BGHD[:, None],
    R_GHDE,
    b_GHD,
    segments_BT=None if segments_B is None else segments_B[:, None],
    state=state,
  )
  return y_B1HD[:, 0], state
