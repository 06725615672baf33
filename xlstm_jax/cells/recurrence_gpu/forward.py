"""The forward kernel: y and the memories after every step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.recurrence_gpu import arrays, ptx
from xlstm_jax.cells.recurrence_gpu.blocks import (
  LANES,
  ROWS,
  TILE,
  Blocks,
  forward_gates,
)
from xlstm_jax.cells.recurrence_gpu.pointwise import Pointwise

AHEAD = 4  # steps whose inputs have room in shared memory


def forward(
  R_tiles: Float[Array, "H S W 2 64 D"],
  x_BTGHD: Float[Array, "B T G H D"],
  b_GHD: Float[Array, "G H D"],
  marks_FTB: Int[Array, "F T B"],
  y_BHD: Float[Array, "B H D"],
  memories_BHD: tuple[Float[Array, "B H D"], ...],
  *,
  cell: Pointwise,
  cut: Blocks,
  interpret: Any = None,
) -> tuple[Float[Array, "B T H D"], tuple[Float[Array, "B T+1 H D"], ...]]:
  """Runs a cell over T steps.

  Args:
    R_tiles: R by `forward_tiles`, in bfloat16.
    x_BTGHD: In float32 or bfloat16; B is a multiple of 8.
    b_GHD: Biases, in float32.
    marks_FTB: `START` and `PADDING` of every token; H / F heads share them.
    y_BHD: y before the first step, 0 where that starts a document.
    memories_BHD: The memories before the first step, `cell.empty` where that
      starts a document.
    cell: The cell's pointwise part.
    cut: How a cluster divides a head.
    interpret: `InterpretGPUParams` to run on any device, slowly.

  Returns:
    y after every step, and the memories before the first and after every step,
    in float32. Padding leaves them as they are.
  """
  B, T, _, H, D = x_BTGHD.shape
  S, W = cut.blocks, cut.warpgroups
  sharing = H // marks_FTB.shape[0]
  memories = len(cell.empty)
  at = arrays.access(interpret)

  def recur(*refs):
    refs = iter(refs)
    R_ref, x_ref, b_ref, marks_ref, h_ref = itertools.islice(refs, 5)
    before_refs = list(itertools.islice(refs, 1 + memories))
    y_ref = next(refs)
    memory_refs = list(itertools.islice(refs, memories))
    h_ring, R_smem, x_ring, barriers, R_there, x_there, together = refs
    block, worker = lax.axis_index("block"), lax.axis_index("worker")
    head = lax.axis_index("head")
    rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
    first = (block * W + worker) * LANES
    units = pl.ds(first, LANES)
    R = arrays.load_tiles(
      R_ref.at[head, block, worker],
      R_smem.at[worker],
      R_there.at[worker],
      cut.forward,
      interpret,
    )

    def fetch(t):
      slot = arrays.rem(t, AHEAD)
      plgpu.copy_gmem_to_smem(
        x_ref.at[rows, jnp.minimum(t, T - 1), :, head, units],
        x_ring.at[worker, slot],
        x_there.at[worker * AHEAD + slot],
      )

    def gates(t):
      """x + R h of the warpgroup's units."""
      slot = arrays.rem(t, AHEAD)
      plgpu.barrier_wait(x_there.at[worker * AHEAD + slot])
      x_slot, h_slot = x_ring.at[worker, slot], arrays.rem(t, 2)
      if not interpret:
        return ptx.gates(D, cut.forward, x_BTGHD.dtype)(
          tuple(R), h_ring, x_slot, barriers, h_slot, arrays.rem(t // 2, 2)
        )
      h = h_ring[h_slot, rows, head].astype(jnp.float32)
      sums = [forward_gates(tile[...].astype(jnp.float32) @ h.T) for tile in R]
      return [
        x_slot[:, gate].astype(jnp.float32).T + sum_
        for gate, sum_ in enumerate(itertools.chain(*sums))
      ]

    def send(h, slot):
      """To all blocks' slot."""
      if interpret:
        h_ring.at[slot, rows, head, units][...] = h.T.astype(jnp.bfloat16)
        arrays.meet(together, interpret)
      else:
        ptx.send_units(S, D)(h, h_ring, barriers, slot, first)

    def expect(slot, size):
      @pl.when(worker == 0)
      def _expect():
        ptx.expect(size)(barriers, slot)

    # y before the first step is in slot 0.
    if interpret:
      h_ring.at[0, rows, head, units][...] = h_ref[rows, head, units]
    else:

      @pl.when(worker == 0)
      def _first():
        ptx.make_barriers(barriers)
        there = R_there.at[0]
        plgpu.copy_gmem_to_smem(h_ref.at[rows, head], h_ring.at[0], there)
        plgpu.barrier_wait(there)

      expect(jnp.int32(0), 0)
    arrays.meet(together, interpret)

    marks_ref = marks_ref.at[head // sharing, :, rows]
    marks = [at.load_marks(marks_ref, jnp.int32(min(t, T - 1))) for t in (0, 1)]
    bias = [at.load_bias(b_ref.at[gate, head, units]) for gate in range(4)]
    before = tuple(
      at.load(ref.at[rows, :, head, units], jnp.int32(0)) for ref in before_refs
    )
    nothing = arrays.empty(cell, interpret)

    def keep(place, numbers):
      for ref, x in zip(memory_refs, numbers, strict=True):
        at.store(ref.at[rows, :, head, units], place, x)

    keep(jnp.int32(0), before[1:])

    def step(t, carry):
      before, marks, marks_next = carry
      slot = arrays.rem(t + 1, 2)
      if not interpret:
        expect(slot, ROWS * D * 2)
      marks_ahead = at.load_marks(marks_ref, jnp.minimum(t + 2, T - 1))
      raw = [x + b for x, b in zip(gates(t), bias, strict=True)]
      # All warps of the cluster have sent what they made of the last input, so
      # they have read it.
      fetch(t + AHEAD - 1)
      h, after = cell.forward(tuple(raw), before[1:])
      after = arrays.where(arrays.is_padding(marks), before, (h, *after))
      carried = arrays.where(arrays.starts(marks_next), nothing, after)
      send(carried[0], slot)
      h, *kept = after
      at.store(y_ref.at[rows, :, head, units], t, h)
      keep(t + 1, kept)
      return carried, marks_next, marks_ahead

    for t in range(AHEAD - 1):
      fetch(jnp.int32(t))
    lax.fori_loop(jnp.int32(0), jnp.int32(T), step, (before, *marks))
    for t in range(T, T + AHEAD - 1):
      plgpu.barrier_wait(x_there.at[worker * AHEAD + t % AHEAD])
    if not interpret:
      # Nothing may be sent to a block that has ended.
      ptx.wait(barriers, jnp.int32(T % 2), jnp.int32(T // 2 % 2))
    arrays.meet(together, interpret)

  shape = jax.ShapeDtypeStruct
  kept_tiles = max(cut.forward.count(False), 1)
  ring, ring_scratch = arrays.ring(
    interpret,
    shape((2, B, H, D), jnp.bfloat16),
    plgpu.SMEM((2, ROWS, D), jnp.bfloat16, transforms=ptx.SWIZZLED),
  )
  y_BTHD, *outs = plgpu.kernel(
    recur,
    out_type=(
      shape((B, T, H, D), jnp.float32),
      *[shape((B, T + 1, H, D), jnp.float32)] * memories,
      *ring,
    ),
    grid=(B // ROWS, H),
    grid_names=("rows", "head"),
    cluster=(S,),
    cluster_names=("block",),
    num_threads=W,
    thread_name="worker",
    scratch_types=(
      *ring_scratch,
      plgpu.SMEM(
        (W, kept_tiles, TILE, D), jnp.bfloat16, transforms=ptx.SWIZZLED
      ),
      plgpu.SMEM((W, AHEAD, ROWS, 4, LANES), x_BTGHD.dtype),
      plgpu.SMEM((4,), jnp.int32),
      plgpu.Barrier(num_barriers=W),
      plgpu.Barrier(num_barriers=W * AHEAD),
      arrays.cluster_barrier(W),
    ),
    compiler_params=arrays.COMPILER,
    interpret=interpret,
  )(
    R_tiles,
    x_BTGHD,
    b_GHD,
    marks_FTB,
    y_BHD.astype(jnp.bfloat16),
    *(x[:, None] for x in (y_BHD, *memories_BHD)),
  )
  return y_BTHD, tuple(outs[:memories])
