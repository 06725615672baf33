"""What both kernels do with a warpgroup's units, on a GPU and interpreted.

Interpret mode has no inline code; what stands in for it here has the same
arguments and results.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xlstm_jax.cells.gpu_internals import plgpu
from xlstm_jax.cells.recurrence_gpu import ptx
from xlstm_jax.cells.recurrence_gpu.blocks import LANES, PADDING, ROWS, START
from xlstm_jax.cells.recurrence_gpu.pointwise import Pointwise

# The kernels place their own barriers.
COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)

Units = Float[Array, "32 8"]


class Access(NamedTuple):
  """Reads and writes of global memory, as in `ptx`."""

  load: Any
  store: Any
  load_bias: Any
  load_marks: Any


def _store(ref, time, x):
  ref.at[:, time][...] = x.T


def _over_rows(x):
  return jnp.broadcast_to(x[:, None], (LANES, ROWS))


_INTERPRETED = Access(
  load=lambda ref, time: ref[:, time].T,
  store=_store,
  load_bias=lambda ref: _over_rows(ref[...]),
  load_marks=lambda ref, time: jnp.broadcast_to(ref[time], (LANES, ROWS)),
)
_COMPILED = Access(ptx.load, ptx.store, ptx.load_bias, ptx.load_marks)


def access(interpret: Any) -> Access:
  """Reads and writes of global memory."""
  return _INTERPRETED if interpret else _COMPILED


def filled(value: float, interpret: Any) -> Units:
  """An array of one value."""
  x = jnp.full((LANES, ROWS), value, jnp.float32)
  return x if interpret else plgpu.layout_cast(x, ptx.UNITS)


def load_tiles(R_ref, R_smem, there, in_registers, interpret: Any) -> list:
  """A warpgroup's tiles of R, each in registers or in shared memory.

  Args:
    R_ref: All tiles, in global memory.
    R_smem: Room for those that stay in shared memory, and for one at least:
      those for registers pass through the last of it.
    there: The barrier of the copies.
    in_registers: For each tile.
    interpret: As of the kernel.
  """
  tiles = []
  for tile, in_register in enumerate(in_registers):
    kept = in_registers[:tile].count(False)
    last = max(in_registers.count(False) - 1, 0)
    buffer_ref = R_smem.at[last if in_register else kept]
    plgpu.copy_gmem_to_smem(R_ref.at[tile], buffer_ref, there)
    plgpu.barrier_wait(there)
    if in_register:
      tiles.append(plgpu.load(buffer_ref, layout=ptx.MATRIX))
    else:
      tiles.append(buffer_ref)
    if not interpret:
      # Before the next copy overwrites what other warps still read.
      ptx.synchronise()
  return tiles


def where(condition: Bool[Array, "32 8"], x: tuple, y: tuple) -> tuple:
  """`jnp.where` of the arrays of two tuples."""
  return tuple(
    jnp.where(condition, one, other) for one, other in zip(x, y, strict=True)
  )


def empty(cell: Pointwise, interpret: Any) -> tuple[Units, ...]:
  """h and the memories where a document starts."""
  return tuple(filled(value, interpret) for value in (0.0, *cell.empty))


def rem(t: Int[Array, ""], count: int) -> Int[Array, ""]:
  """The place of step t in a ring."""
  return lax.rem(t, jnp.int32(count))


def starts(marks: Array) -> Bool[Array, "32 8"]:
  """Which tokens start a document."""
  return (marks & START) != 0


def is_padding(marks: Array) -> Bool[Array, "32 8"]:
  """Which tokens are padding."""
  return (marks & PADDING) != 0


def no_marks(marks: Array) -> Array:
  """An array of no marks, laid out as marks are."""
  return marks & 0


def cluster_barrier(warpgroups: int):
  """A barrier for all warpgroups of a cluster."""
  return plgpu.ClusterBarrier(
    collective_axes=("block",), num_arrivals=warpgroups
  )


def meet(barrier_ref, interpret: Any) -> None:
  """Waits for all warpgroups of the cluster."""
  if not interpret:
    # Each warp tells other blocks that the warpgroup is here.
    ptx.synchronise()
  plgpu.barrier_arrive(barrier_ref)
  plgpu.barrier_wait(barrier_ref)


def ring(interpret: Any, global_: Any, shared: Any) -> tuple[tuple, tuple]:
  """Where a cluster's blocks exchange: an output, or a scratch.

  Blocks that are interpreted see no other's shared memory, so they exchange
  through global memory.
  """
  return ((global_,), ()) if interpret else ((), (shared,))
