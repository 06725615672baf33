"""The recurrent cells on TPUs: R stays in VMEM and the loop in the kernel.

The scan reads R from memory for every token and starts a dozen operations, each
of which waits for the one before. Here one kernel runs over all tokens;
`recurrent_tpu_kernels` has it. This module cuts the arrays into blocks that
fit, and says what does not.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlstm_jax.cells.backends import this_device
from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.precision import accumulator, multiplied
from xlstm_jax.cells.recurrence import Cell, Shapes, Units

if TYPE_CHECKING:
  from xlstm_jax.cells.recurrent_tpu_kernels import Blocks, Static

LANES, SUBLANES = 128, 8
# Rows of all steps of a block: so many hide what starting a block costs.
ROWS = 512
# Of a program; more share each use of R, but need room.
MOST_ROWS = 64
# Fewer tokens do not pay for the transposed copies.
LEAST_TOKENS = 8
# Names of what an sLSTM keeps of a step; an LSTM keeps less.
UNITS = 4
GATES = 4
# Of VMEM, what blocks may take. The rest is for what the compiler spills.
SHARE = 0.75


class Chip(NamedTuple):
  """A generation of TPUs.

  Attributes:
    vmem: Bytes of a core.
    cores: Of a device: independent programs run side by side.
  """

  vmem: int
  cores: int


# By how JAX names the devices; the compiler has taken the kernels for these.
CHIPS = {
  "TPU v5 lite": Chip(128 * 2**20, 1),
  "TPU v5": Chip(64 * 2**20, 2),
  "TPU v6 lite": Chip(128 * 2**20, 1),
  "TPU7x": Chip(64 * 2**20, 1),
}
SMALLEST = Chip(64 * 2**20, 1)


def why_not(device: Any, shapes: Shapes) -> str | None:
  """Why the kernels cannot compute this there, as a clause."""
  if device.platform != "tpu":
    return f"it needs a TPU, and the device is {device.platform}"
  if device.device_kind not in CHIPS:
    return (
      f"it is compiled for {', '.join(CHIPS)}, and the device is "
      f"{device.device_kind}"
    )
  for name, dtype in (("inputs", shapes.dtype), ("R", shapes.matrix_dtype)):
    if dtype not in ("float32", "bfloat16"):
      return f"{name} in {dtype} are not float32 or bfloat16"
  if _blocks(shapes, CHIPS[device.device_kind]) is None:
    size = shapes.D**2 * GATES * jnp.dtype(shapes.matrix_dtype).itemsize
    return (
      f"R of a head of {shapes.D} units takes {size / 2**20:.0f} MiB, which "
      f"leaves too little of the {device.device_kind}'s VMEM"
    )
  return None


def why_not_auto(shapes: Shapes) -> str | None:
  """Why "auto" leaves such arrays to the scan, as a clause."""
  if shapes.T < LEAST_TOKENS:
    return f"{shapes.T} tokens are too few"
  return None


def pallas_tpu(
  cell: Cell,
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  tokens: Documents,
  units: Units,
  *,
  interpret: Any = None,
) -> tuple[Float[Array, "B T H D"], Units]:
  """`recurrence.scan` on a TPU.

  With `interpret` (`pltpu.InterpretParams`) it runs on any device, slowly.
  """
  # Pallas takes seconds to import.
  from xlstm_jax.cells.recurrent_tpu_kernels import REAL, START, Static

  B, T, G, H, D = x_BTGHD.shape
  shapes = Shapes(B, T, H, D, str(x_BTGHD.dtype), str(R_GHDE.dtype))
  chip = CHIPS.get(this_device().device_kind, SMALLEST)
  blocks = _blocks(shapes, chip)
  assert blocks is not None, "why_not has refused it"
  static = Static(cell, blocks, chip.vmem * 7 // 8, interpret)
  more_B, more_T, more_D = -B % blocks.B, -T % blocks.T, -D % LANES

  def padded(x, *more):
    return jnp.pad(x, [(0, count) for count in more])

  x_TGHBD = padded(
    x_BTGHD.transpose(1, 2, 3, 0, 4), more_T, 0, 0, more_B, more_D
  )
  R_HDGE = padded(R_GHDE.transpose(1, 2, 0, 3), 0, more_D, 0, more_D)
  b_GH1D = padded(b_GHD, 0, 0, more_D)[:, :, None]
  flags_BT = REAL * tokens.real_BT + START * tokens.start_BT
  flags_TB1 = padded(flags_BT.T, more_T, more_B)[..., None]
  units = tuple(
    padded(unit.swapaxes(0, 1), 0, more_B, more_D) for unit in units
  )
  y_THBD, last = _run(
    static,
    x_TGHBD,
    R_HDGE.reshape(*R_HDGE.shape[:2], -1),
    b_GH1D,
    flags_TB1.astype(jnp.int32),
    units,
  )
  y_BTHD = y_THBD[:T, :, :B, :D].transpose(2, 0, 1, 3)
  return y_BTHD, tuple(unit[:, :B, :D].swapaxes(0, 1) for unit in last)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: "Static", x, R, b, flags, units):
  """y and the last units, arrays as the kernels have them."""
  from xlstm_jax.cells.recurrent_tpu_kernels import forward

  return forward(static, x, R, b, flags, units, keep=False)[:2]


def _run_forward(static, x, R, b, flags, units):
  from xlstm_jax.cells.recurrent_tpu_kernels import forward

  y, last, kept = forward(static, x, R, b, flags, units, keep=True)
  return (y, last), (x, R, b, flags, kept)


def _run_backward(static, saved, cotangents):
  from xlstm_jax.cells.recurrent_tpu_kernels import backward

  x, R, b, flags, kept = saved
  dy, dlast = cotangents
  draw, dfirst = backward(static, x, R, b, flags, kept, dy, dlast)
  dR = multiplied("THBD,TGHBE->HDGE", kept.y_THBD, draw, R.dtype)
  db = jnp.sum(draw, axis=(0, 3))[:, :, None]
  dR = dR.reshape(R.shape).astype(R.dtype)
  return draw.astype(x.dtype), dR, db, None, dfirst


_run.defvjp(_run_forward, _run_backward)


def _blocks(shapes: Shapes, chip: Chip) -> "Blocks | None":
  """The blocks of both kernels; None where none fit.

  All heads in one program let one head's products run beside another's
  pointwise part; devices of two cores want a program for each.
  """
  from xlstm_jax.cells.recurrent_tpu_kernels import Blocks

  groups = math.ceil(shapes.B / MOST_ROWS)
  rows = _up(math.ceil(shapes.B / groups), SUBLANES)
  most_T = max(SUBLANES, 2 ** math.floor(math.log2(ROWS / rows)))
  for steps in _halves(min(most_T, _up(shapes.T, SUBLANES))):
    for heads in range(shapes.H, 0, -1):
      programs = shapes.H // heads * groups
      if shapes.H % heads or (programs < chip.cores and heads > 1):
        continue
      blocks = Blocks(heads, rows, steps)
      if max(_bytes(shapes, blocks)) <= SHARE * chip.vmem:
        return blocks
  return None


def _halves(steps: int) -> Sequence[int]:
  return [steps // 2**at for at in range(steps.bit_length())]


def _bytes(shapes: Shapes, blocks: "Blocks") -> tuple[int, int]:
  """What the forward and the backward kernel have in VMEM, for an sLSTM.

  Every block is there twice, while the one is in use and the other is copied.
  """
  D = _up(shapes.D, LANES)
  x, matrix = (
    jnp.dtype(d).itemsize for d in (shapes.dtype, shapes.matrix_dtype)
  )
  wide = accumulator(shapes.dtype).itemsize
  kept = matrix + (UNITS - 1) * wide
  of_units = blocks.H * blocks.B * D
  shared = (
    blocks.H * D * GATES * D * matrix
    + blocks.T * blocks.B * LANES * 4
    + 2 * UNITS * of_units * wide
  )
  forward = of_units * blocks.T * (GATES * x + x + kept)
  backward = of_units * blocks.T * (GATES * (x + wide) + x + kept)
  # The product of a head's block, for raw.
  raw = blocks.T * blocks.B * GATES * D * wide
  return 2 * (shared + forward), 2 * (shared + backward) + raw


def _up(size: int, multiple: int) -> int:
  return size + -size % multiple
