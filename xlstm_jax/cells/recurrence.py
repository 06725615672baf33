"""Recurrences that feed their output back through a matrix per head.

The sLSTM and the LSTM differ only in their pointwise cell; this module has the
rest. With G gates, the output y, and a D by D matrix R per gate and head,

    raw_t = x_t + y_{t-1} R + b

and the cell maps raw_t and the state, unit by unit, to the next state.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xlstm_jax.cells.backends import Registry
from xlstm_jax.cells.documents import Documents, documents
from xlstm_jax.cells.precision import accumulator, product
from xlstm_jax.cells.varying import vary_together

# The numbers of a state without its segment, y first: zeros are the past of
# a document's first token. A cell works on units of any shape.
Units = tuple[Float[Array, "*units"], ...]
# raw of every gate: a sequence, or an array with the gates in front.
Gates = Iterable[Float[Array, "*units"]]
Cell = Callable[[Gates, Units], Units]


class Shapes(NamedTuple):
  """Shapes and types that one device computes.

  Attributes:
    B: Rows.
    T: Tokens of a row.
    H: Heads.
    D: Units of a head.
    dtype: Type of the inputs' part of the gates.
    matrix_dtype: Type of R, and so of the operands of the product y R.
  """

  B: int
  T: int
  H: int
  D: int
  dtype: str
  matrix_dtype: str


def run(
  registry: Registry,
  backend: str,
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  segments_BT: Int[Array, "B T"] | None,
  units: Units,
  segment_B: Int[Array, "B"],
) -> tuple[Float[Array, "B T H D"], Units, Int[Array, "B"]]:
  """Runs a cell over T tokens from a state of `units` and `segment_B`.

  Returns y of every token (0 at padding), and the units and the segment after
  the last one. Operands of matrix products have the type of R; everything else
  has the accumulator type.
  """
  B, T, _, H, D = x_BTGHD.shape
  shapes = Shapes(B, T, H, D, str(x_BTGHD.dtype), str(R_GHDE.dtype))
  form = registry.choose(backend, shapes)
  x_BTGHD, R_GHDE, b_GHD, segments_BT, units, segment_B = vary_together(
    x_BTGHD, R_GHDE, b_GHD, segments_BT, units, segment_B
  )
  wide = accumulator(jnp.promote_types(x_BTGHD.dtype, R_GHDE.dtype))
  tokens = documents(segments_BT, segment_B, T)
  y_BTHD, units = form.run(
    x_BTGHD,
    R_GHDE,
    b_GHD.astype(wide),
    tokens,
    tuple(unit.astype(wide) for unit in units),
  )
  y_BTHD = jnp.where(tokens.real_BT[..., None, None], y_BTHD, 0)
  return y_BTHD.astype(x_BTGHD.dtype), units, tokens.last_B


def scan(
  cell: Cell,
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  tokens: Documents,
  units: Units,
) -> tuple[Float[Array, "B T H D"], Units]:
  """The native form of these recurrences: one token after the other.

  Returns y of every token (anything at padding), and the units after the last.
  """
  states = _states(
    cell,
    jnp.moveaxis(x_BTGHD, 1, 0),
    R_GHDE,
    b_GHD,
    *(mask.T[..., None, None] for mask in (tokens.real_BT, tokens.start_BT)),
    units,
  )
  return jnp.moveaxis(states[0], 0, 1), tuple(unit[-1] for unit in states)


def _scan(step, first, tokens, *, reverse: bool = False):
  """`jax.lax.scan`, unrolled by 8 steps on accelerators and by 1 on CPUs.

  On two busy CPU cores, 8 steps took 3.7 times as long to compile and 2.8 times
  as long to run backwards.
  """

  def scan(unroll: int, first, tokens):
    return jax.lax.scan(step, first, tokens, reverse=reverse, unroll=unroll)

  return jax.lax.platform_dependent(
    first, tokens, cpu=partial(scan, 1), default=partial(scan, 8)
  )


def _fresh(start, units):
  return tuple(jnp.where(start, 0, unit) for unit in units)


def _next(cell: Cell, raw, real, units: Units) -> Units:
  after = cell(jnp.moveaxis(raw, 1, 0), units)
  return jax.tree.map(partial(jnp.where, real), after, units)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(
  cell: Cell,
  x_TBGHD: Float[Array, "T B G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  real_TBHD: Bool[Array, "T B 1 1"],
  start_TBHD: Bool[Array, "T B 1 1"],
  units: Units,
) -> tuple[Float[Array, "T B H D"], ...]:
  """The units after every token."""

  def step(units, token):
    x, real, start = token
    units = _fresh(start, units)
    raw = x + product("BHD,GHDE->BGHE", units[0], R_GHDE, R_GHDE.dtype) + b_GHD
    units = _next(cell, raw, real, units)
    return units, units

  tokens = (x_TBGHD, real_TBHD, start_TBHD)
  return _scan(step, units, tokens)[1]


def _states_forward(cell, x, R, b, real, start, units):
  states = _states(cell, x, R, b, real, start, units)
  return states, (x, R, b, real, start, units, states)


def _states_backward(cell, kept, dstates):
  """The gradient, in which only the way back through time is a scan.

  That scan needs the gates of every step, which one product over all steps
  computes again. It yields their gradients, which one product turns into the
  gradient of R. Autodiff of the forward scan would sum the gradient of R step
  by step.
  """
  x, R, b, real, start, first, states = kept
  before = jax.tree.map(
    lambda unit, states: jnp.concatenate([unit[None], states[:-1]]),
    first,
    states,
  )
  before = _fresh(start, before)
  raw = x + product("TBHD,GHDE->TBGHE", before[0], R, R.dtype) + b
  # Padding may hold anything: 0 times its derivative would not be 0.
  raw = jnp.where(real[..., None], raw, 0)

  def step(dunits, token):
    dstate, raw, before, real, start = token
    dunits = jax.tree.map(jnp.add, dunits, dstate)
    _, pullback = jax.vjp(
      lambda raw, units: _next(cell, raw, real, units), raw, before
    )
    draw, (dy, *dothers) = pullback(dunits)
    dy += product("BGHE,GHDE->BHD", draw, R, R.dtype)
    return _fresh(start, (dy, *dothers)), draw

  dunits, draw = _scan(
    step,
    jax.tree.map(jnp.zeros_like, first),
    (dstates, raw, before, real, start),
    reverse=True,
  )
  dR = product("TBHD,TBGHE->GHDE", before[0], draw, R.dtype)
  db = jnp.sum(draw, axis=(0, 1))
  return draw.astype(x.dtype), dR.astype(R.dtype), db, None, None, dunits


_states.defvjp(_states_forward, _states_backward)
