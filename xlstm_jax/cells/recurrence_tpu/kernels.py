"""The kernels of `pallas_tpu`: a loop over time beside R in VMEM.

              x of Tb steps in memory (next ones are on their way)
                                    |
   units  -->  raw = x_t + y R + b  -->  cell  -->  units  --> ... Tb steps
     |                  R in VMEM                     |
     |                                                y, and what the way back
  in VMEM from block to block of time                 needs, to memory

The grid is (groups of heads, groups of rows, blocks of time). Only the last
axis is sequential: the last units of a block, which lie in VMEM as a result
that every block of time has in common, are the first of the next.

The way back runs through the blocks and through their steps in reverse. It
restores raw of a block by one product of all its rows, and puts the gradients
of the gates in its place.

Arrays are padded: B to whole groups of sublanes, D to whole lanes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells.precision import multiplication
from xlstm_jax.cells.recurrence_tpu.blocks import Blocks
from xlstm_jax.cells.tpu_internals import pl, pltpu

# What the flags of a token say.
REAL, START = 1, 2


class Static(NamedTuple):
  """What is static in a call.

  Attributes:
    cell: The pointwise function.
    blocks: See `Blocks`.
    vmem: Bytes of VMEM that the kernel may take.
    interpret: As `pl.pallas_call` takes it.
  """

  cell: Callable[..., Any]
  blocks: Blocks
  vmem: int
  interpret: Any


def forward(
  static: Static,
  x_TGHBD: Float[Array, "T G H B D"],
  R_HDGE: Float[Array, "H D G D"],
  b_GHD: Float[Array, "G H D"],
  flags_TB1: Int[Array, "T B 1"],
  units: Sequence[Float[Array, "H B D"]],
  *,
  keep: bool,
) -> tuple[Float[Array, "T H B D"], tuple[Array, ...], tuple[Array, ...]]:
  """y of every step, the last units, and with `keep` what `backward` needs.

  That are the units before every step: y as the product has it, and the rest.
  """
  T, G, H, B, D = x_TGHBD.shape
  blocks = static.blocks
  count = len(units)

  def kernel(x_ref, R_ref, b_ref, flags_ref, *refs):
    first_refs, y_ref = refs[:count], refs[count]
    unit_refs = refs[count + 1 : 2 * count + 1]
    kept_refs = refs[2 * count + 1 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
      for unit_ref, first_ref in zip(unit_refs, first_refs, strict=True):
        unit_ref[...] = first_ref[...]

    def step(t, _):
      # Heads are independent: their products come first, so that they need
      # not wait for another's pointwise part.
      flags = flags_ref[t]
      before = [
        _fresh(flags, [unit_ref[head] for unit_ref in unit_refs])
        for head in range(blocks.H)
      ]
      operands = [units[0].astype(R_ref.dtype) for units in before]
      mixed = [
        _product(operand, R_ref[head], (1, 0))
        for head, operand in enumerate(operands)
      ]
      for head, units in enumerate(before):
        x = x_ref[t, :, head].astype(units[0].dtype)
        raw = x + _split(mixed[head], G) + b_ref[:, head]
        after = _next(static.cell, raw, flags, units)
        y_ref[t, head] = after[0].astype(y_ref.dtype)
        for unit_ref, unit in zip(unit_refs, after, strict=True):
          unit_ref[head] = unit
        if keep:
          kept = (operands[head], *units[1:])
          for kept_ref, unit in zip(kept_refs, kept, strict=True):
            kept_ref[t, head] = unit
      return ()

    lax.fori_loop(0, blocks.T, step, ())

  specs = _specs(blocks, (G, D), T // blocks.T, reverse=False)
  like = functools.partial(_like, x_TGHBD)
  wide = units[0].dtype
  kept_types = [R_HDGE.dtype, *[wide] * (count - 1)] if keep else []
  y, *results = pl.pallas_call(
    kernel,
    name="recurrent_forward",
    grid=(H // blocks.H, B // blocks.B, T // blocks.T),
    in_specs=[specs.x, specs.R, specs.b, specs.flags, *[specs.unit] * count],
    out_specs=[
      specs.step,
      *[specs.unit] * count,
      *[specs.step] * len(kept_types),
    ],
    out_shape=[
      like((T, H, B, D), x_TGHBD.dtype),
      *[like((H, B, D), wide)] * count,
      *[like((T, H, B, D), dtype) for dtype in kept_types],
    ],
    **_options(static),
  )(x_TGHBD, *_flat(R_HDGE, b_GHD), flags_TB1, *units)
  return y, tuple(results[:count]), tuple(results[count:])


def backward(
  static: Static,
  x_TGHBD: Float[Array, "T G H B D"],
  R_HDGE: Float[Array, "H D G D"],
  b_GHD: Float[Array, "G H D"],
  flags_TB1: Int[Array, "T B 1"],
  kept: Sequence[Float[Array, "T H B D"]],
  dy_THBD: Float[Array, "T H B D"],
  dlast: Sequence[Float[Array, "H B D"]],
) -> tuple[Array, Array, Float[Array, "G H B D"], tuple[Array, ...]]:
  """Gradients of raw of every step, of b by rows, and of the first units.

  The first two are of raw: as they are, and as products have them.
  """
  T, G, H, B, D = x_TGHBD.shape
  blocks = static.blocks
  count = len(dlast)
  wide = dlast[0].dtype
  two_types = R_HDGE.dtype != wide

  def kernel(x_ref, R_ref, b_ref, flags_ref, *refs):
    y_before_ref, *other_refs = refs[:count]
    dy_ref = refs[count]
    dlast_refs = refs[count + 1 : 2 * count + 1]
    draw_ref, db_ref = refs[2 * count + 1 : 2 * count + 3]
    dunit_refs = refs[2 * count + 3 : 3 * count + 3]
    operand_refs = refs[3 * count + 3 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
      db_ref[...] = jnp.zeros_like(db_ref)
      for dunit_ref, dlast_ref in zip(dunit_refs, dlast_refs, strict=True):
        dunit_ref[...] = dlast_ref[...]

    for head in range(blocks.H):
      # Rows of 16 bits can only be joined when they are wide.
      y = y_before_ref[:, head].astype(wide).reshape(blocks.T * blocks.B, D)
      mixed = _product(y.astype(R_ref.dtype), R_ref[head], (1, 0))
      for gate, of_gate in enumerate(_split(mixed, G)):
        draw_ref[:, gate, head] = (
          x_ref[:, gate, head].astype(wide)
          + of_gate.reshape(blocks.T, blocks.B, D)
          + b_ref[gate, head]
        )

    def gradients(t, flags, head: int):
      """Of raw, and of the units before but for what comes through raw."""
      raw = draw_ref[t, :, head]
      # The cell does not look at the y before.
      before = [jnp.zeros_like(raw[0])]
      before += [other_ref[t, head] for other_ref in other_refs]
      dunits = [dunit_ref[head] for dunit_ref in dunit_refs]
      dunits[0] += dy_ref[t, head].astype(wide)

      def after(raw, *units):
        return _next(static.cell, raw, flags, units)

      draw, *dbefore = jax.vjp(after, raw, *before)[1](tuple(dunits))
      return draw, dbefore

    def step(at, _):
      t = blocks.T - 1 - at
      flags = flags_ref[t]
      found = [gradients(t, flags, head) for head in range(blocks.H)]
      for head, (draw, dbefore) in enumerate(found):
        operand = draw.astype(R_ref.dtype)
        side_by_side = jnp.concatenate([*operand], axis=1)
        dbefore[0] += _product(side_by_side, R_ref[head], (1, 1))
        draw_ref[t, :, head] = draw
        db_ref[:, head] += draw
        for operand_ref in operand_refs:
          operand_ref[t, :, head] = operand
        dbefore = _fresh(flags, dbefore)
        for dunit_ref, dunit in zip(dunit_refs, dbefore, strict=True):
          dunit_ref[head] = dunit
      return ()

    lax.fori_loop(0, blocks.T, step, ())

  specs = _specs(blocks, (G, D), T // blocks.T, reverse=True)
  like = functools.partial(_like, x_TGHBD)
  draw, db, *results = pl.pallas_call(
    kernel,
    name="recurrent_backward",
    grid=(H // blocks.H, B // blocks.B, T // blocks.T),
    in_specs=[
      *(specs.x, specs.R, specs.b, specs.flags),
      *[specs.step] * count,
      specs.step,
      *[specs.unit] * count,
    ],
    out_specs=[
      *(specs.x, specs.by_row),
      *[specs.unit] * count,
      *[specs.x] * two_types,
    ],
    out_shape=[
      *(like(x_TGHBD.shape, wide), like((G, H, B, D), wide)),
      *[like((H, B, D), wide)] * count,
      *[like(x_TGHBD.shape, R_HDGE.dtype)] * two_types,
    ],
    **_options(static),
  )(x_TGHBD, *_flat(R_HDGE, b_GHD), flags_TB1, *kept, dy_THBD, *dlast)
  operand = results[-1] if two_types else draw
  return draw, operand, db, tuple(results[:count])


def _flat(R_HDGE, b_GHD):
  """The gates side by side in lanes, and a row for the biases of each."""
  return R_HDGE.reshape(*R_HDGE.shape[:2], -1), b_GHD[:, :, None]


def _split(x_BG, gates: int):
  """The gates, that lie side by side in lanes, in front."""
  return jnp.stack(jnp.split(x_BG, gates, axis=1))


def _fresh(flags, units):
  start = (flags & START) != 0
  return [jnp.where(start, 0.0, unit) for unit in units]


def _next(cell, raw, flags, units):
  real = (flags & REAL) != 0
  after = cell(raw, tuple(units))
  return tuple(
    jnp.where(real, new, old) for new, old in zip(after, units, strict=True)
  )


def _product(x, y, contracted: tuple[int, int]):
  """With operands as they come and a sum in at least float32."""
  return lax.dot_general(
    x,
    y,
    (([contracted[0]], [contracted[1]]), ([], [])),
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    precision=multiplication(x.dtype),
  )


class _Specs(NamedTuple):
  """Blocks of the arrays by what they are of."""

  x: pl.BlockSpec  # [T, G, H, B, D]
  R: pl.BlockSpec
  b: pl.BlockSpec
  flags: pl.BlockSpec
  step: pl.BlockSpec  # [T, H, B, D]
  unit: pl.BlockSpec  # [H, B, D]
  by_row: pl.BlockSpec  # [G, H, B, D]


def _specs(
  blocks: Blocks, sizes: tuple[int, int], steps: int, *, reverse: bool
) -> _Specs:
  (G, D), (H, B, T) = sizes, blocks

  def time(t):
    return steps - 1 - t if reverse else t

  return _Specs(
    x=pl.BlockSpec((T, G, H, B, D), lambda h, b, t: (time(t), 0, h, b, 0)),
    R=pl.BlockSpec((H, D, G * D), lambda h, b, t: (h, 0, 0)),
    b=pl.BlockSpec((G, H, 1, D), lambda h, b, t: (0, h, 0, 0)),
    flags=pl.BlockSpec((T, B, 1), lambda h, b, t: (time(t), b, 0)),
    step=pl.BlockSpec((T, H, B, D), lambda h, b, t: (time(t), h, b, 0)),
    unit=pl.BlockSpec((H, B, D), lambda h, b, t: (h, b, 0)),
    by_row=pl.BlockSpec((G, H, B, D), lambda h, b, t: (0, h, b, 0)),
  )


def _options(static: Static) -> dict[str, Any]:
  return {
    "interpret": static.interpret or False,
    "compiler_params": pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=static.vmem,
    ),
  }


def _like(x, shape: tuple[int, ...], dtype: DTypeLike):
  """The type of a result that varies over the axes of a mesh as x does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)
