"""The cells unit by unit, as the kernels compute them.

A cell's memories are the numbers that a unit carries besides its output. The
backward pass of a step is cut in two: `local` needs nothing from later steps,
so it is off the path along which gradients travel; `back` is on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Units = Float[Array, "U N"]
Gates = tuple[Units, Units, Units, Units]
Memories = tuple[Units, ...]

# log n of a unit that has seen nothing.
NOTHING = -1e30


class Pointwise(NamedTuple):
  """A cell for the kernels.

  Attributes:
    empty: The memories of an empty past.
    forward: `forward(gates, memories) -> (h, memories)`.
    local: `local(gates, memories)`: derivatives of a step at the gates and the
      memories before it.
    back: `back(local, dh, dmemories) -> (dgates, dmemories)`: from gradients
      after the step to those of its gates and of the memories before it.
  """

  empty: tuple[float, ...]
  forward: Callable[[Gates, Memories], tuple[Units, Memories]]
  local: Callable[[Gates, Memories], Any]
  back: Callable[[Any, Units, Memories], tuple[Gates, Memories]]


def _sigmoid(x):
  return 1 / (1 + jnp.exp(-x))


def _tanh(x):
  # Where x is small, the difference of two numbers near 1 has few digits.
  square = x * x
  series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
  return jnp.where(square < 0.01, series, 1 - 2 / (1 + jnp.exp(2 * x)))


def _log1p(e):
  # 1 + e rounds away what e is where it is small.
  series = e * (1 - e * (0.5 - e * (1 / 3)))
  return jnp.where(e < 0.01, series, jnp.log(1 + e))


def _log_sigmoid(x):
  return jnp.minimum(x, 0.0) - _log1p(jnp.exp(-jnp.abs(x)))


def _merge(i, carried):
  """The shares of exp(i) and exp(carried) in their sum, and its logarithm."""
  e = jnp.exp(-jnp.abs(i - carried))
  larger = 1 / (1 + e)
  smaller = e * larger
  written = jnp.where(i >= carried, larger, smaller)
  kept = jnp.where(i >= carried, smaller, larger)
  return written, kept, jnp.maximum(i, carried) + _log1p(e)


def _slstm_forward(gates: Gates, memories: Memories):
  """The sLSTM in r = c / n and l = log n + m, which no scale can overflow.

  l_t = log(exp(raw_i) + f_t exp(l_{t-1}))     p_t = exp(raw_i - l_t)
  r_t = r_{t-1} + p_t (tanh(raw_z) - r_{t-1})
  y_t = sigmoid(raw_o) r_t
  """
  i, f, z, o = gates
  r, l = memories
  p, _, l = _merge(i, l + _log_sigmoid(f))
  r = r + p * (_tanh(z) - r)
  return r * _sigmoid(o), (r, l)


def _slstm_local(gates: Gates, memories: Memories):
  i, f, z, o = gates
  r, l = memories
  p, kept, _ = _merge(i, l + _log_sigmoid(f))
  written, read = _tanh(z), _sigmoid(o)
  change = written - r
  return (
    p,
    kept,
    _sigmoid(-f),
    change * p * kept,
    p * (1 - written * written),
    read,
    (r + p * change) * read * (1 - read),
  )


def _slstm_back(local, dh: Units, dmemories: Memories):
  p, kept, f_slope, i_slope, z_slope, read, o_slope = local
  dr, dl = dmemories
  dr = dr + dh * read
  through_p = dr * i_slope
  dcarried = dl * kept - through_p
  dgates = (
    dl * p + through_p,
    dcarried * f_slope,
    dr * z_slope,
    dh * o_slope,
  )
  return dgates, (dr * kept, dcarried)


def _lstm_forward(gates: Gates, memories: Memories):
  i, f, z, o = gates
  (c,) = memories
  c = _sigmoid(f) * c + _sigmoid(i) * _tanh(z)
  return _sigmoid(o) * _tanh(c), (c,)


def _lstm_local(gates: Gates, memories: Memories):
  i, f, z, o = gates
  (c,) = memories
  keep, write, written, read = _sigmoid(f), _sigmoid(i), _tanh(z), _sigmoid(o)
  shown = _tanh(keep * c + write * written)
  return (
    keep,
    c * keep * (1 - keep),
    written * write * (1 - write),
    write * (1 - written * written),
    read * (1 - shown * shown),
    shown * read * (1 - read),
  )


def _lstm_back(local, dh: Units, dmemories: Memories):
  keep, f_slope, i_slope, z_slope, read, o_slope = local
  (dc,) = dmemories
  dc = dc + dh * read
  return (dc * i_slope, dc * f_slope, dc * z_slope, dh * o_slope), (dc * keep,)


SLSTM = Pointwise((0.0, NOTHING), _slstm_forward, _slstm_local, _slstm_back)
LSTM = Pointwise((0.0,), _lstm_forward, _lstm_local, _lstm_back)
