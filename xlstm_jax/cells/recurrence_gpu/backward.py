"""The backward kernel: gradients of the gates of every step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.recurrence_gpu import arrays, ptx
from xlstm_jax.cells.recurrence_gpu.blocks import LANES, ROWS, TILE, Blocks
from xlstm_jax.cells.recurrence_gpu.pointwise import Pointwise


def backward(
  R_tiles: Float[Array, "H S W tiles 64 4*W*32"],
  raw_BTGHD: Float[Array, "B T G H D"],
  marks_FTB: Int[Array, "F T B"],
  dy_BTHD: Float[Array, "B T H D"],
  memories_BPHD: tuple[Float[Array, "B T+1 H D"], ...],
  dlast_BHD: tuple[Float[Array, "B H D"], ...],
  *,
  cell: Pointwise,
  cut: Blocks,
  interpret: Any = None,
) -> tuple[Float[Array, "B T G H D"], tuple[Float[Array, "B H D"], ...]]:
  """Gradients through T steps, from the last to the first.

  Args:
    R_tiles: R by `backward_tiles`, in bfloat16.
    raw_BTGHD: The gates of every step, in float32.
    marks_FTB: As of the forward pass.
    dy_BTHD: The gradient of every y.
    memories_BPHD: The memories before the first and after every step.
    dlast_BHD: The gradient of the memories after the last step.
    cell: The cell's pointwise part.
    cut: How a cluster divides a head.
    interpret: `InterpretGPUParams` to run on any device, slowly.

  Returns:
    The gradients of the gates, and those of y and of the memories before the
    first step.
  """
  B, T, _, H, D = raw_BTGHD.shape
  S, W = cut.blocks, cut.warpgroups
  owned, depth = W * LANES, 4 * W * LANES
  sharing = H // marks_FTB.shape[0]
  tiles = D // TILE // W
  in_registers = (True,) * cut.backward + (False,) * (tiles - cut.backward)
  memories = len(cell.empty)
  at = arrays.access(interpret)

  def recur(*refs):
    refs = iter(refs)
    R_ref, raw_ref, marks_ref, dy_ref = itertools.islice(refs, 4)
    memory_refs = list(itertools.islice(refs, memories))
    dlast_refs = list(itertools.islice(refs, memories))
    draw_ref = next(refs)
    dfirst_refs = list(itertools.islice(refs, 1 + memories))
    operand, R_smem, parts, barriers, R_there, together = refs
    block, worker = lax.axis_index("block"), lax.axis_index("worker")
    head = lax.axis_index("head")
    rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
    first = (block * W + worker) * LANES
    units = pl.ds(first, LANES)
    R = arrays.load_tiles(
      R_ref.at[head, block, worker],
      R_smem.at[worker],
      R_there.at[worker],
      in_registers,
      interpret,
    )[: cut.backward]

    def expect(slot, size):
      @pl.when(worker == 0)
      def _expect():
        ptx.expect(size)(barriers, slot)

    def send(dgates, slot):
      """The products of R and the block's gradients, to the units' owners."""
      if not interpret:
        ptx.send_products(S, W, D, cut.backward)(
          *(dgates, tuple(R), R_smem.at[worker], operand.at[slot], parts),
          *(barriers, slot, worker),
        )
        return
      for gate, dgate in enumerate(dgates):
        place = pl.ds(worker * (4 * LANES) + gate * LANES, LANES)
        operand.at[slot, rows, head, block, place][...] = dgate.T.astype(
          jnp.bfloat16
        )
      arrays.meet(together, interpret)

    def gather(slot, parity):
      """dh of the warpgroup's units: the sum of what all blocks sent."""
      if not interpret:
        return ptx.gather(S, D)(parts, barriers, slot, parity, worker)
      tile, row = first // TILE, first % TILE
      dh = jnp.zeros((LANES, ROWS), jnp.float32)
      for sender in range(S):
        R_ud = R_ref[
          *(head, sender, tile // tiles, tile % tiles, pl.ds(row, LANES))
        ].astype(jnp.float32)
        dh += R_ud @ operand[slot, rows, head, sender].astype(jnp.float32).T
      return dh

    # Nothing comes back into the last step: slot 0 has zeros.
    if interpret:
      operand.at[0, rows, head, block][...] = jnp.zeros(
        (ROWS, depth), jnp.bfloat16
      )
    else:
      ptx.clear(S, D)(parts, worker)

      @pl.when(worker == 0)
      def _first():
        ptx.make_barriers(barriers)

      expect(jnp.int32(0), 0)
    arrays.meet(together, interpret)

    marks_ref = marks_ref.at[head // sharing, :, rows]

    def fetch(t):
      """What a step needs of the forward pass."""
      return (
        at.load_marks(marks_ref, t),
        at.load(dy_ref.at[rows, :, head, units], t),
        tuple(
          at.load(raw_ref.at[rows, :, gate, head, units], t)
          for gate in range(4)
        ),
        tuple(at.load(ref.at[rows, :, head, units], t) for ref in memory_refs),
      )

    nothing = arrays.empty(cell, interpret)
    zero = nothing[0]
    zeros = (zero,) * (1 + memories)

    def dh_before(marks, passed, slot, parity):
      """What reaches y from the step after it, whose marks are given."""
      (dh,) = arrays.where(
        arrays.starts(marks), (zero,), (passed + gather(slot, parity),)
      )
      return dh

    def step(s, carry):
      marks_after, passed, dmemories, (marks, dy, raw, before) = carry
      t, slot = T - 1 - s, arrays.rem(s, 2)
      padding = arrays.is_padding(marks)
      before = arrays.where(arrays.starts(marks), nothing[1:], before)
      # This needs nothing from the steps after it.
      local = cell.local(raw, before)
      fetched = fetch(jnp.maximum(t - 1, 0))
      if not interpret:
        expect(1 - slot, S * owned * ROWS * 4)
      dh = dy + dh_before(marks_after, passed, slot, arrays.rem(s // 2, 2))
      dgates, dbefore = cell.back(local, dh, dmemories)
      dgates = arrays.where(padding, (zero,) * 4, dgates)
      send(dgates, 1 - slot)
      for gate, dgate in enumerate(dgates):
        at.store(draw_ref.at[rows, :, gate, head, units], t, dgate)
      # Padding passes on what it gets.
      passed, *dbefore = arrays.where(
        padding, (dh, *dmemories), (zero, *dbefore)
      )
      dbefore = arrays.where(arrays.starts(marks), zeros[1:], tuple(dbefore))
      return marks, passed, dbefore, fetched

    start = jnp.int32(0)
    fetched = fetch(jnp.int32(T - 1))
    dlast = tuple(
      at.load(ref.at[rows, :, head, units], start) for ref in dlast_refs
    )
    carry = arrays.no_marks(fetched[0]), zero, dlast, fetched
    marks, passed, dfirst, _ = lax.fori_loop(
      jnp.int32(0), jnp.int32(T), step, carry
    )
    dh = dh_before(marks, passed, jnp.int32(T % 2), jnp.int32(T // 2 % 2))
    for ref, x in zip(dfirst_refs, (dh, *dfirst), strict=True):
      at.store(ref.at[rows, :, head, units], start, x)
    # Nothing is sent to a block that has ended: each has its last sums.
    arrays.meet(together, interpret)

  shape = jax.ShapeDtypeStruct
  kept_tiles = max(in_registers.count(False), 1)
  ring, ring_scratch = arrays.ring(
    interpret,
    shape((2, B, H, S, depth), jnp.bfloat16),
    plgpu.SMEM((2, ROWS, depth), jnp.bfloat16, transforms=ptx.SWIZZLED),
  )
  draw_BTGHD, *dfirst = plgpu.kernel(
    recur,
    out_type=(
      shape((B, T, 4, H, D), jnp.float32),
      *[shape((B, 1, H, D), jnp.float32)] * (1 + memories),
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
        (W, kept_tiles, TILE, depth), jnp.bfloat16, transforms=ptx.SWIZZLED
      ),
      plgpu.SMEM((2, S, owned, ROWS), jnp.float32),
      plgpu.SMEM((4,), jnp.int32),
      plgpu.Barrier(num_barriers=W),
      arrays.cluster_barrier(W),
    ),
    compiler_params=arrays.COMPILER,
    interpret=interpret,
  )(
    R_tiles,
    raw_BTGHD,
    marks_FTB,
    dy_BTHD,
    *memories_BPHD,
    *(x[:, None] for x in dlast_BHD),
  )
  return draw_BTGHD, tuple(x[:, 0] for x in dfirst[: 1 + memories])
