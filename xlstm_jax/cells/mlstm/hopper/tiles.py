"""Tiles of the Hopper kernels: how they lie in shared memory and registers."""

import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.mlstm.hopper.block_sizes import ROWS

F32, BF16 = jnp.float32, jnp.bfloat16
# How a warpgroup holds a matrix that wgmma reads or writes, and a vector with a
# number for each of its rows or of its columns.
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
COMPILER = plgpu.CompilerParams(approx_math=True)
# Registers of a thread: what loads gives its own to what computes.
LOADING, COMPUTING = 40, 232


def swizzled(*shape: int, columns: int = 64):
  """Buffers of bfloat16 as wgmma and TMA want them: in swizzled tiles."""
  transforms = (
    plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(2 * columns),  # pyright: ignore[reportAbstractUsage]
  )
  return plgpu.SMEM(shape, BF16, transforms=transforms)


def pieces(dim: int, size: int) -> list[tuple[int, pl.Slice]]:
  """Starts of pieces of `size` of `dim` numbers, and what is new in each.

  The last piece begins in the one before where `size` does not divide `dim`: a
  copy fills its buffer.
  """
  found = []
  for end in range(0, dim, size):
    start = min(end, dim - size)
    found.append((start, pl.ds(end - start, start + size - end)))
  return found


def zeros(*shape: int):
  """Float32 zeros in registers, a matrix or a number for each of its rows."""
  layout = MATRIX if len(shape) == 2 else ROW
  return plgpu.layout_cast(jnp.zeros(shape, F32), layout)


def load_rows(ref):
  """Numbers from memory, one for each row of a matrix."""
  return plgpu.load(ref, layout=ROW, optimized=False)


def over_rows(x, rows):
  """The same row that many times."""
  return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def over_columns(x, columns):
  """The same column that many times."""
  return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def indices(axis: int, interpret):
  """Every element's row (axis 0) or column (axis 1) in a 64 x 64 matrix."""
  shape = (ROWS, 64)
  if interpret:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def store(buffer_ref, x, target_ref, *, others=0):
  """Starts writing x, once all but `others` writes have left their buffers."""
  plgpu.wait_smem_to_gmem(others, wait_read_only=True)
  buffer_ref[...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer_ref, target_ref)
