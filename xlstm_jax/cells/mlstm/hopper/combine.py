"""Sums over the tokens of a chunk, with a read of the state between chunks.

    y_r = scale_r (query_r state + bias_r vector) + the sum of pairs_rc value_c

h, dq, dk and dv are all of this form: `sums` has the table. A thread block
takes one item after the other: 128 rows of y in a chunk and up to 256 columns
o. A warpgroup computes 64 of the rows. One ring carries the operands of both
products, in steps over what is summed, 64 or 128 at a time (`depth`):

```
  memory                      shared memory            registers of a warpgroup
  query, state       --TMA--> ring of up to 8:     --> y_ro = query state
   (and the state's           left [128, depth],
   rests, if any)             right [depth, width]
  n or dn            --TMA--> ring of 2: [width]   --> y_ro += bias vector,
                                                       times scale
  pairs, value       --TMA--> the first ring       --> y_ro += pairs value
  k or v, for `dot`  --TMA--> the first ring       --> dot_r
  y, low bits of h   <--TMA-- 1 or 2 of [64, 64]   <-- y_ro, rounded
                              a warpgroup
```
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.lowered_once import lowered_once
from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  BLOCK,
  MULTIPROCESSORS,
  ROWS,
  combine_buffers,
  combine_depth,
  out_width,
  swizzled_columns,
)
from xlstm_jax.cells.mlstm.hopper.low_bits import low_bits, packed, packed_dim
from xlstm_jax.cells.mlstm.hopper.ring import Ring, stream
from xlstm_jax.cells.mlstm.hopper.schedule import Schedule
from xlstm_jax.cells.mlstm.hopper.sums import Form, Operands, Result, Sum
from xlstm_jax.cells.mlstm.hopper.tiles import (
  BF16,
  COLUMN,
  COMPILER,
  COMPUTING,
  F32,
  LOADING,
  MATRIX,
  load_rows,
  over_columns,
  over_rows,
  pieces,
  store,
  swizzled,
  zeros,
)


class _Shared(NamedTuple):
  """What a block has in shared memory.

  The operands of a product lie as they do in memory. `left` and `right` are
  pairs of views of the same buffers: as the product has the operand, and
  transposed.
  """

  left: Any
  right: Any
  vector: Any
  y: Any
  full: Any
  free: Any
  vector_full: Any
  vector_free: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes, and what is static otherwise.

  Attributes:
    inner: Columns of each sum's queries.
    out: Columns of each sum.
    width: Columns that a block computes of a sum at a time.
  """

  forms: tuple[Form, ...]
  batch: int
  heads: int
  chunks: int
  chunk: int
  inner: tuple[int, ...]
  out: tuple[int, ...]
  width: int
  most_blocks: int
  interpret: Any

  @property
  def row_tiles(self) -> int:
    return self.chunk // BLOCK

  @property
  def out_tiles(self) -> list[int]:
    return [out // self.width for out in self.out]

  @property
  def ends(self) -> list[int]:
    """Where the items of each sum end among those of a chunk."""
    items = (self.row_tiles * tiles for tiles in self.out_tiles)
    return list(itertools.accumulate(items))

  @property
  def schedule(self) -> Schedule:
    return Schedule(
      self.batch, self.heads, self.chunks, self.ends[-1], self.most_blocks
    )

  @property
  def depth(self) -> int:
    """Summands of a step."""
    return combine_depth(self.width, *self.inner)

  @property
  def buffers(self) -> tuple[int, int]:
    """Of the ring, and of a warpgroup's results."""
    return combine_buffers(self.width, self.depth)

  def shared(self) -> _Shared:
    """Types of what a block has in shared memory."""
    stages, stores = self.buffers
    depth, width = self.depth, self.width
    columns = swizzled_columns(width, *self.inner)

    def operand(*shape):
      return plgpu.RefUnion(
        swizzled(stages, *shape, columns=columns),
        swizzled(stages, *shape[::-1], columns=columns),
      )

    return _Shared(
      left=operand(BLOCK, depth),
      right=operand(depth, width),
      vector=plgpu.SMEM((2, width), F32),
      y=swizzled(2, stores, ROWS, 64, columns=columns),
      full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      vector_full=plgpu.Barrier(num_barriers=2),
      vector_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
    )

  def writes(self, i: int, x: Operands) -> Result:
    """Types of what the kernel writes for the i-th sum."""
    form, (*rows, out_dim) = self.forms[i], x.value_BTHO.shape
    dots = (self.out_tiles[i], *x.scale_BHT.shape)
    lows = (*rows, packed_dim(out_dim, self.width))
    return Result(
      jax.ShapeDtypeStruct(dots, F32) if form.dot else None,
      jax.ShapeDtypeStruct(lows, BF16) if form.low else None,
      jax.ShapeDtypeStruct((*rows, out_dim), BF16),
    )


@lowered_once("chunk", "interpret", "columns", "blocks")
def combine(
  sums: Sequence[Sum],
  *,
  chunk: int,
  columns: int = 256,
  blocks: int = MULTIPROCESSORS,
  interpret: Any = None,
) -> list[Result]:
  """All sums in one kernel: what they read together comes from memory once.

  The blocks take them from chunk after chunk, at most so many columns of a
  result at a time, so that those of a chunk run at about the same time.
  """
  batch, heads, chunks = sums[0].parts_BHN.shape
  operands = [x.operands for x in sums]
  out = tuple(x.value_BTHO.shape[-1] for x in operands)
  plan = _Plan(
    forms=tuple(x.form for x in sums),
    batch=batch,
    heads=heads,
    chunks=chunks,
    chunk=chunk,
    inner=tuple(x.query_BTHI.shape[-1] for x in operands),
    out=out,
    width=out_width(columns, *out),
    most_blocks=blocks,
    interpret=interpret,
  )

  def mlstm_sums(reads, parts_ref, writes, *shared):
    block = _Block.here(plan, reads, parts_ref, writes, _Shared(*shared))

    @pl.when(block.worker == 2)
    def _load():
      plgpu.set_max_registers(LOADING, action="decrease")
      block.each_item(_Loads.of)

    @pl.when(block.worker < 2)
    def _compute():
      plgpu.set_max_registers(COMPUTING, action="increase")
      half = pl.ds(block.worker * ROWS, ROWS)
      block.each_item(lambda item: _Computes.of(item, half))
      plgpu.wait_smem_to_gmem(0)

  (results,) = plgpu.kernel(
    mlstm_sums,
    out_type=([plan.writes(i, x) for i, x in enumerate(operands)],),
    grid=(plan.schedule.blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="worker",
    scratch_types=plan.shared(),
    compiler_params=COMPILER,
    interpret=interpret,
  )(operands, jnp.stack([x.parts_BHN for x in sums], axis=-1))
  return [_finished(result) for result in results]


def _finished(result: Result) -> Result:
  """With `dot` of all columns, and low bits that no one handles as numbers."""
  dot, low = result.dot_BHT, result.low_BTHO
  return result._replace(
    dot_BHT=None if dot is None else jnp.sum(dot, axis=0),
    low_BTHO=None if low is None else lax.bitcast_convert_type(low, jnp.int16),
  )


@dataclasses.dataclass(frozen=True)
class _Block:
  """A thread block: its rings, and which warpgroup this is.

  Attributes:
    worker: The warpgroup: 0 and 1 compute, 2 loads.
    number: The block's number.
    count: How many items it takes.
  """

  plan: _Plan
  reads: list[Operands]
  parts_ref: Any
  writes: list[Result]
  shared: _Shared
  worker: Any
  number: Any
  count: Any

  @classmethod
  def here(cls, plan: _Plan, reads, parts_ref, writes, shared: _Shared):
    worker, number = lax.axis_index("worker"), lax.axis_index("block")
    count = plan.schedule.count(number)
    return cls(plan, reads, parts_ref, writes, shared, worker, number, count)

  @property
  def ring(self) -> Ring:
    """Of the operands: a step is one buffer."""
    return Ring(self.shared.full, self.shared.free, self.plan.buffers[0])

  @property
  def vectors(self) -> Ring:
    """Of n and dn, for the items that read one."""
    return Ring(self.shared.vector_full, self.shared.vector_free, 2)

  def find(self, k):
    """Row, head, chunk, the number of the sum, and the place in its chunk."""
    b, h, n, place = self.plan.schedule.item(self.number, k)
    which = sum((place >= end).astype(jnp.int32) for end in self.plan.ends[:-1])
    return b, h, n, which, place

  def parts(self, k):
    """In how many parts the state is that the k-th item reads."""
    b, h, n, which, _ = self.find(k)
    return self.parts_ref[b, h, n, which]

  def each_item(self, work: Callable):
    """Runs `work(item).run(...)` for all items, each as its sum wants it.

    It is given, and returns, how many steps of each ring were used.
    """
    plan = self.plan

    def item(k, carry):
      parts, counts = carry
      # Read an item ahead, for memory answers late.
      parts_next = self.parts(jnp.minimum(k + 1, self.count - 1))
      b, h, n, which, place = self.find(k)

      def branch(i):
        def of_sum(counts):
          first = plan.ends[i - 1] if i else 0
          r = (place - first) // plan.out_tiles[i]
          o = lax.rem(place - first, plan.out_tiles[i])
          item = _Item(self, i, b, h, n, r, o)
          return work(item).run(parts, *counts)

        return of_sum

      branches = [branch(i) for i in range(len(plan.forms))]
      if len(branches) == 1:
        return parts_next, branches[0](counts)
      return parts_next, lax.switch(which, branches, counts)

    counts = jnp.int32(0), jnp.int32(0)
    lax.fori_loop(0, self.count, item, (self.parts(0), counts))


@dataclasses.dataclass(frozen=True)
class _Item:
  """128 rows and some columns of a sum.

  Attributes:
    i: The number of the sum.
    n: The chunk.
    r: The tile of rows in the chunk.
    o: The tile of columns.
  """

  block: _Block
  i: int
  b: Any
  h: Any
  n: Any
  r: Any
  o: Any

  @property
  def form(self) -> Form:
    return self.block.plan.forms[self.i]

  @property
  def reads(self) -> Operands:
    return self.block.reads[self.i]

  @property
  def pieces(self) -> list[tuple[int, pl.Slice]]:
    """What a step sums over in the product with the state."""
    return pieces(self.block.plan.inner[self.i], self.block.plan.depth)

  @property
  def steps_of_128(self) -> int:
    return BLOCK // self.block.plan.depth

  def seen(self):
    """The first block of 128 tokens that the rows sum over, and the end."""
    if self.form.later:
      return self.r, self.block.plan.row_tiles
    return 0, self.r + 1


@dataclasses.dataclass(frozen=True)
class _Loads:
  """Fills the rings with what `_Computes` takes from them, in that order."""

  item: _Item
  t0: Any  # of the chunk
  rows: Any
  columns: Any

  @classmethod
  def of(cls, item: _Item):
    t0 = item.n * item.block.plan.chunk
    rows = pl.ds(t0 + item.r * BLOCK, BLOCK)
    width = item.block.plan.width
    return cls(item, t0, rows, pl.ds(item.o * width, width))

  def run(self, parts, step, vector):
    item, form = self.item, self.item.form
    if form.transposed_state:
      vector = self.vector(vector)
    step = lax.fori_loop(0, parts, self.state, step)
    if form.dot == "state":
      step = self.partner(step)
    first, end = item.seen()
    step = lax.fori_loop(
      item.steps_of_128 * first, item.steps_of_128 * end, self.pairs, step
    )
    if form.dot == "y":
      step = self.partner(step)
    return step, vector

  def vector(self, step):
    item, ring = self.item, self.item.block.vectors
    slot = ring.room(step)
    source = item.reads.vector_BHNO.at[item.b, item.h, item.n, self.columns]
    ring.fill(slot, source, item.block.shared.vector.at[slot])
    return step + 1

  def state(self, part, step):
    """The queries and a part of the state: rounded, or what rounding took."""
    item, block = self.item, self.item.block
    reads, ring = item.reads, block.ring
    left, _ = block.shared.left
    right, transposed = block.shared.right
    for start, _ in item.pieces:
      slot = ring.room(step)
      inner = pl.ds(start, block.plan.depth)
      if item.form.transposed_state:
        place, target = (self.columns, inner), transposed
      else:
        place, target = (inner, self.columns), right
      ring.fill(
        slot,
        reads.query_BTHI.at[item.b, self.rows, item.h, inner],
        left.at[slot],
      )
      place = item.b, item.h, part * block.plan.chunks + item.n, *place
      ring.fill(slot, reads.state_BHPIO.at[*place], target.at[slot])
      step += 1
    return step

  def partner(self, step):
    """The rows that the result's rows are multiplied with."""
    item, block = self.item, self.item.block
    ring, depth = block.ring, block.plan.depth
    right, _ = block.shared.right
    for part in range(item.steps_of_128):
      slot = ring.room(step)
      start = self.t0 + item.r * BLOCK + part * depth
      place = item.b, pl.ds(start, depth), item.h, self.columns
      ring.fill(slot, item.reads.partner_BTHO.at[*place], right.at[slot])
      plgpu.barrier_arrive(ring.full.at[slot])  # for the operand it lacks
      step += 1
    return step

  def pairs(self, c, step):
    """Pairs of the rows and the c-th tokens of the chunk, and their values."""
    item, block = self.item, self.item.block
    reads, ring, depth = item.reads, block.ring, block.plan.depth
    left, transposed = block.shared.left
    right, _ = block.shared.right
    slot = ring.room(step)
    tokens = pl.ds(self.t0 + c * depth, depth)
    if item.form.transposed_pairs:
      place, target = (tokens, pl.ds(item.r * BLOCK, BLOCK)), transposed
    else:
      place, target = (self.rows, pl.ds(c * depth, depth)), left
    ring.fill(
      slot, reads.pairs_BHTL.at[item.b, item.h, *place], target.at[slot]
    )
    place = item.b, tokens, item.h, self.columns
    ring.fill(slot, reads.value_BTHO.at[*place], right.at[slot])
    return step + 1


@dataclasses.dataclass(frozen=True)
class _Computes:
  """Sums 64 rows of an item in registers, and writes them."""

  item: _Item
  half: Any  # of the 128 rows
  rows: Any  # the same in all tokens

  @classmethod
  def of(cls, item: _Item, half):
    plan, worker = item.block.plan, item.block.worker
    t0 = item.n * plan.chunk + item.r * BLOCK
    return cls(item, half, pl.ds(t0 + worker * ROWS, ROWS))

  def run(self, parts, step, vector):
    item, form = self.item, self.item.form
    scale_r = self.load_rows(item.reads.scale_BHT)
    bias_r = item.reads.bias_BHT
    bias_r = None if bias_r is None else self.load_rows(bias_r)
    width = item.block.plan.width
    step, y_ro = lax.fori_loop(
      0, parts, self.add_state, (step, zeros(ROWS, width))
    )
    if form.transposed_state:
      y_ro, vector = self.add_vector(y_ro, bias_r, vector)
    y_ro = y_ro * over_columns(scale_r, width)
    dot_r = None
    if form.dot == "state":
      dot_r, step = self.partner_product(y_ro, step)
    step, y_ro = lax.fori_loop(*item.seen(), self.add_pairs, (step, y_ro))
    if form.dot == "y":
      dot_r, step = self.partner_product(y_ro, step)
    if form.dot:
      dot_ref = item.block.writes[item.i].dot_BHT
      dot_ref.at[item.o, item.b, item.h, self.rows][...] = dot_r
    self.write(y_ro)
    return step, vector

  def load_rows(self, ref):
    return load_rows(ref.at[self.item.b, self.item.h, self.rows])

  def add_state(self, _, carry):
    """Adds the queries times a part of the state."""
    step, y_ro = carry
    left, _ = self.item.block.shared.left
    right, transposed = self.item.block.shared.right
    parts = self.item.pieces

    def product(multiply, slot, j, none):
      _, new = parts[j]
      if self.item.form.transposed_state:
        state = transposed.at[slot, :, new].transpose((1, 0))
      else:
        state = right.at[slot, new]
      multiply(left.at[slot, self.half, new], state)

    return self.add(len(parts), product, step, y_ro)

  def add_pairs(self, _, carry):
    """Adds the values of 128 tokens by their weights."""
    step, y_ro = carry
    left, transposed = self.item.block.shared.left
    right, _ = self.item.block.shared.right

    def product(multiply, slot, j, none):
      if self.item.form.transposed_pairs:
        pairs = transposed.at[slot, :, self.half].transpose((1, 0))
      else:
        pairs = left.at[slot, self.half]
      multiply(pairs, right.at[slot])

    return self.add(self.item.steps_of_128, product, step, y_ro)

  def add(self, count, product, step, y_ro):
    block = self.item.block
    y_ro, _, step = stream(
      block.ring, step, count, y_ro, None, product, block.plan.interpret
    )
    return step, y_ro

  def add_vector(self, y_ro, bias_r, step):
    """Adds n or dn, the same in each row but for its bias."""
    block = self.item.block
    slot = block.vectors.take(step)
    vector_o = plgpu.load(block.shared.vector.at[slot], layout=COLUMN)
    vector_ro = over_rows(vector_o, ROWS)
    if bias_r is not None:
      vector_ro = vector_ro * over_columns(bias_r, block.plan.width)
    y_ro = y_ro + vector_ro
    block.vectors.release(step)
    return y_ro, step + 1

  def partner_product(self, y_ro, step):
    """Every row times that of its partner."""
    block = self.item.block
    ring, count = block.ring, self.item.steps_of_128
    right, _ = block.shared.right
    slots = [ring.take(step + part) for part in range(count)]
    if count == 1:
      partner_ref = right.at[slots[0], self.half]
    else:
      partner_ref = right.at[jnp.where(block.worker == 0, *slots)]
    dot_r = zeros(ROWS)
    for start, new in pieces(block.plan.width, 64):
      columns = slice(start + new.start, start + 64)
      partner_ro = plgpu.load(partner_ref.at[:, columns], layout=MATRIX)
      dot_r = dot_r + (y_ro[:, columns] * partner_ro.astype(F32)).sum(axis=1)
    for part in range(count):
      ring.release(step + part)
    return dot_r, step + count

  def write(self, y_ro):
    """Writes the rows, 64 columns at a time, and what rounding takes."""
    item, width = self.item, self.item.block.plan.width
    writes = item.block.writes[item.i]
    saves = itertools.count()
    for pair in range(0, width, BLOCK):
      bits = []
      for start, _ in pieces(min(BLOCK, width - pair), 64):
        start += pair
        part_ro = y_ro[:, start : start + 64]
        rounded_ro = part_ro.astype(BF16)
        self.save(
          rounded_ro, writes.y_BTHO, item.o * width + start, next(saves)
        )
        if item.form.low:
          bits.append(low_bits(part_ro, rounded_ro))
      if item.form.low:
        start = (item.o * -(-width // BLOCK) + pair // BLOCK) * 64
        self.save(packed(bits), writes.low_BTHO, start, next(saves))

  def save(self, part_ro, target_ref, start, stored: int):
    """Starts writing 64 columns, the `stored`-th part of this item."""
    item, (_, stores) = self.item, self.item.block.plan.buffers
    store(
      item.block.shared.y.at[item.block.worker, stored % stores],
      part_ro,
      target_ref.at[item.b, self.rows, item.h, pl.ds(start, 64)],
      others=stores - 1,
    )
