"""The backend `pallas_gpu` of the sLSTM and the LSTM."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.hopper_gpus import device_refusal
from xlstm_jax.cells.precision import product
from xlstm_jax.cells.recurrence import Shapes, Units
from xlstm_jax.cells.recurrence_gpu.batched import batched
from xlstm_jax.cells.recurrence_gpu.blocks import (
  BLOCKS,
  PADDING,
  ROWS,
  START,
  Blocks,
  backward_tiles,
  forward_tiles,
)
from xlstm_jax.cells.recurrence_gpu.pointwise import (
  LSTM,
  NOTHING,
  SLSTM,
  Memories,
  Pointwise,
)

# Of heads of more than 256 units about 8 clusters fit a GPU at a time. At so
# many, two rounds of them, it was measured or is expected to be faster.
MOST_WIDE_CLUSTERS = 16


class _Options(NamedTuple):
  """What is static in the kernels."""

  cell: Pointwise
  cut: Blocks
  interpret: Any


def slstm(
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  tokens: Documents,
  units: Units,
  *,
  interpret: Any = None,
) -> tuple[Float[Array, "B T H D"], Units]:
  """The sLSTM as `recurrence.scan` runs it, on a Hopper GPU.

  The last state is that of the scan in another scale: n is 1, or 0 where no
  token was read.
  """
  y, c, n, m = units
  empty = n == 0
  size = jnp.where(empty, 1, n)
  memories = (
    jnp.where(empty, 0, c / size),
    jnp.where(empty, NOTHING, jnp.log(size) + m),
  )
  y_BTHD, y, (r, l) = _run(
    SLSTM, x_BTGHD, R_GHDE, b_GHD, tokens, y, memories, interpret
  )
  empty = l <= NOTHING / 2
  n = jnp.where(empty, 0.0, 1.0)
  return y_BTHD, (y, r, n, jnp.where(empty, 0, l))


def lstm(
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  tokens: Documents,
  units: Units,
  *,
  interpret: Any = None,
) -> tuple[Float[Array, "B T H D"], Units]:
  """The LSTM as `recurrence.scan` runs it, on a Hopper GPU."""
  y, c = units
  y_BTHD, y, (c,) = _run(
    LSTM, x_BTGHD, R_GHDE, b_GHD, tokens, y, (c,), interpret
  )
  return y_BTHD, (y, c)


def why_not(device: Any, shapes: Shapes) -> str | None:
  """Why the kernels cannot compute such arrays on a device, or None."""
  reason = device_refusal(device)
  if reason is not None:
    return reason
  if shapes.matrix_dtype != "bfloat16":
    return (
      "it multiplies in bfloat16, and the recurrent matrices are "
      f"{shapes.matrix_dtype}"
    )
  if shapes.dtype not in ("float32", "bfloat16"):
    return (
      f"it takes inputs in float32 or bfloat16, and these are in {shapes.dtype}"
    )
  if shapes.D not in BLOCKS:
    sizes = ", ".join(map(str, BLOCKS))
    return f"it takes heads of {sizes} units, and these have {shapes.D}"
  return None


def why_not_auto(shapes: Shapes) -> str | None:
  """Why "auto" leaves such arrays to the scan, or None."""
  if shapes.T == 1:
    return "there is one step only"
  clusters = -(-shapes.B // ROWS) * shapes.H
  if shapes.D > 256 and clusters > MOST_WIDE_CLUSTERS:
    return (
      f"{shapes.B} rows of {shapes.H} heads of {shapes.D} units are more than "
      "it was found to be faster for"
    )
  return None


def _kernels():
  # Pallas takes seconds to import, and only Hopper GPUs need it.
  from xlstm_jax.cells.recurrence_gpu import backward, forward

  return forward.forward, backward.backward


def _run(cell, x_BTGHD, R_GHDE, b_GHD, tokens, y, memories, interpret):
  """y of every token, and y and the memories after the last."""
  start_B = tokens.start_BT[:, 0, None, None]
  y, *memories = (
    jnp.where(start_B, jnp.asarray(value, x.dtype), x)
    for value, x in zip((0.0, *cell.empty), (y, *memories), strict=True)
  )
  marks_BT = START * tokens.start_BT.astype(jnp.int32)
  marks_BT += PADDING * (~tokens.real_BT).astype(jnp.int32)
  options = _Options(cell, BLOCKS[x_BTGHD.shape[-1]], interpret)
  y_BTHD, memories = _recur(
    options, x_BTGHD, R_GHDE, b_GHD, marks_BT, y, tuple(memories)
  )
  return y_BTHD, y_BTHD[:, -1], memories


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
  options: _Options,
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  marks_BT: Int[Array, "B T"],
  y_BHD: Float[Array, "B H D"],
  memories_BHD: Memories,
) -> tuple[Float[Array, "B T H D"], Memories]:
  """y after every step, and the memories after the last."""
  return _forward(
    options, x_BTGHD, R_GHDE, b_GHD, marks_BT, y_BHD, memories_BHD
  )[0]


def _forward(options, x, R, b, marks, y_first, first):
  y, *memories = _forward_kernel(options)(x, R, b, marks[None], y_first, *first)
  last = tuple(memory[:, -1] for memory in memories)
  return (y, last), (x, R, b, marks, y_first, y, memories)


def _backward(options, kept, cotangents):
  """One product restores the gates of all steps, another makes dR."""
  x, R, b, marks, y_first, y, memories = kept
  dy, dlast = cotangents
  before = jnp.concatenate([y_first[:, None], y[:, :-1]], axis=1)
  start = (marks & START) != 0
  before = jnp.where(start[..., None, None], 0, before).astype(R.dtype)
  raw = x + product("BTHD,GHDE->BTGHE", before, R, R.dtype) + b
  draw, dy_first, *dfirst = _backward_kernel(options)(
    raw, R, marks[None], dy, *memories, *dlast
  )
  dR = product("BTHD,BTGHE->GHDE", before, draw, R.dtype)
  db = jnp.sum(draw, axis=(0, 1))
  dinputs = draw.astype(x.dtype), dR.astype(R.dtype), db
  return *dinputs, None, dy_first, tuple(dfirst)


_recur.defvjp(_forward, _backward)


def _forward_kernel(options: _Options):
  numbers = len(options.cell.empty)

  def run(x, R, b, marks, y_first, *first):
    B = len(x)
    y, memories = _kernels()[0](
      forward_tiles(R, options.cut),
      _whole(x),
      b,
      _whole(marks.swapaxes(1, 2), axis=2),
      _whole(y_first),
      tuple(map(_whole, first)),
      **options._asdict(),
    )
    return tuple(x[:B] for x in (y, *memories))

  return batched(
    run,
    ("BTGHD", "GHDE", "GHD", "FBT", *["BHD"] * (1 + numbers)),
    ("BTHD", *["BPHD"] * numbers),
  )


def _backward_kernel(options: _Options):
  numbers = len(options.cell.empty)

  def run(raw, R, marks, dy, *others):
    B = len(raw)
    draw, dfirst = _kernels()[1](
      backward_tiles(R, options.cut),
      _whole(raw),
      _whole(marks.swapaxes(1, 2), axis=2),
      _whole(dy),
      tuple(map(_whole, others[:numbers])),
      tuple(map(_whole, others[numbers:])),
      **options._asdict(),
    )
    return tuple(x[:B] for x in (draw, *dfirst))

  return batched(
    run,
    (
      *("BTGHD", "GHDE", "FBT", "BTHD"),
      *["BPHD"] * numbers,
      *["BHD"] * numbers,
    ),
    ("BTGHD", *["BHD"] * (1 + numbers)),
  )


def _whole(x: Array, *, axis: int = 0) -> Array:
  """x with rows for whole clusters."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % ROWS)
  return jnp.pad(x, widths) if any(widths[axis]) else x
