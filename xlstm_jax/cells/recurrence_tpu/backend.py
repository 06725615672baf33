"""The recurrent cells on TPUs: R stays in VMEM and the loop in the kernel.

The scan reads R from memory for every token and starts a dozen operations, each
of which waits for the one before. Here one kernel runs over all tokens.
docs/kernels_tpu.md has the design.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.backends import Backend, this_device
from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.precision import multiplied
from xlstm_jax.cells.recurrence import Cell, Shapes, Units
from xlstm_jax.cells.recurrence_tpu import blocks

# Fewer tokens are not worth the copies of what lies otherwise in memory.
LEAST_TOKENS = 8


def tpu_row(cell: Cell) -> Backend:
  """The row of a cell's registry."""
  return Backend(
    "pallas_tpu",
    partial(pallas_tpu, cell),
    why_not=why_not,
    why_not_auto=why_not_auto,
    platform="tpu",
  )


def why_not(device: Any, shapes: Shapes) -> str | None:
  """Why the kernels cannot compute this there, as a clause."""
  if device.platform != "tpu":
    return f"it needs a TPU, and the device is {device.platform}"
  if device.device_kind not in blocks.CHIPS:
    return (
      f"it is known to compile for {', '.join(blocks.CHIPS)}, and the device "
      f"is {device.device_kind}"
    )
  types = {"inputs": shapes.dtype, "matrices": shapes.matrix_dtype}
  for name, dtype in types.items():
    if dtype not in ("float32", "bfloat16"):
      return f"{name} of {dtype} are neither float32 nor bfloat16"
  if blocks.choose(shapes, blocks.CHIPS[device.device_kind]) is None:
    number = jnp.dtype(shapes.matrix_dtype).itemsize
    matrices = blocks.GATES * shapes.D**2 * number
    return (
      f"the matrices of a head of {shapes.D} units take "
      f"{matrices / 2**20:.0f} MiB of VMEM, of which {device.device_kind} has "
      f"{blocks.CHIPS[device.device_kind].vmem / 2**20:.0f} for everything"
    )
  return None


def why_not_auto(shapes: Shapes) -> str | None:
  """Why "auto" leaves such arrays to the scan, as a clause."""
  if shapes.T < LEAST_TOKENS:
    return f"{shapes.T} tokens are too few for it"
  return None


def pallas_tpu(
  cell: Cell,
  x_BTGHD: Float[Array, "B T G H D"],
  R_GHDE: Float[Array, "G H D D"],
  b_GHD: Float[Array, "G H D"],
  tokens: Documents,
  units: Units,
  *,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Units]:
  """`recurrence.scan` on a TPU.

  With `interpret` (`pltpu.InterpretParams`) it runs on any device, slowly.
  """
  kernels = _kernels()
  B, T, _, H, D = x_BTGHD.shape
  shapes = Shapes(B, T, H, D, str(x_BTGHD.dtype), str(R_GHDE.dtype))
  chip = blocks.CHIPS.get(this_device().device_kind, blocks.SMALLEST)
  block = blocks.choose(shapes, chip)
  assert block is not None, "why_not refuses what does not fit"
  static = kernels.Static(cell, block, chip.vmem * 7 // 8, interpret)
  more_B, more_T = -B % block.B, -T % block.T
  more_D = -D % blocks.LANES

  def padded(x, *more: int):
    return jnp.pad(x, [(0, count) for count in more])

  flags_BT = kernels.REAL * tokens.real_BT + kernels.START * tokens.start_BT
  y_THBD, last = _run(
    static,
    padded(x_BTGHD.transpose(1, 2, 3, 0, 4), more_T, 0, 0, more_B, more_D),
    padded(R_GHDE.transpose(1, 2, 0, 3), 0, more_D, 0, more_D),
    padded(b_GHD, 0, 0, more_D),
    padded(flags_BT.T, more_T, more_B)[..., None],
    tuple(padded(unit.swapaxes(0, 1), 0, more_B, more_D) for unit in units),
  )
  y_BTHD = y_THBD[:T, :, :B, :D].transpose(2, 0, 1, 3)
  return y_BTHD, tuple(unit[:, :B, :D].swapaxes(0, 1) for unit in last)


def _kernels():
  # Pallas takes seconds to import, and only TPUs need it.
  from xlstm_jax.cells.recurrence_tpu import kernels

  return kernels


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
  static: Any,
  x_TGHBD: Float[Array, "T G H B D"],
  R_HDGE: Float[Array, "H D G D"],
  b_GHD: Float[Array, "G H D"],
  flags_TB1: Int[Array, "T B 1"],
  units: Units,
) -> tuple[Float[Array, "T H B D"], Units]:
  """y and the last units of arrays that are cut into whole blocks."""
  args = (x_TGHBD, R_HDGE, b_GHD, flags_TB1, units)
  return _kernels().forward(static, *args, keep=False)[:2]


def _run_forward(static, *args):
  y, last, kept = _kernels().forward(static, *args, keep=True)
  return (y, last), (*args[:4], kept)


def _run_backward(static, saved, cotangents):
  x, R, b, flags, kept = saved
  draw, operand, db_GHBD, dfirst = _kernels().backward(
    static, x, R, b, flags, kept, *cotangents
  )
  dR = multiplied("THBD,TGHBE->HDGE", kept[0], operand, R.dtype)
  db = jnp.sum(db_GHBD, axis=2)
  return draw.astype(x.dtype), dR.astype(R.dtype), db, None, dfirst


_run.defvjp(_run_forward, _run_backward)
