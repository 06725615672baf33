"""What the two kernels over pairs of tokens share: `weigh`, `score_gradients`.

A thread block takes one item after the other: 128 rows, which are tokens of a
chunk, and all columns, which are other tokens of the chunk that they see, 128
at a time. In `weigh` rows read and columns have written before them; in
`score_gradients` rows write and columns read after them. A warpgroup computes
64 of the rows.

```
  memory                          shared memory                 registers
  rows of q (k, v)       --TMA--> ring of 5: [128, 64] of   --> products of 64
  columns of k (q, dh)            rows and of columns           rows and 128
                                                                columns (wgmma)
  exponents of columns   --TMA--> ring of 2: [2 to 4, 128]  --> exponentials
  n or dn of the chunk   --TMA--> ring of 2: [K]            --> its products
                                                                with the rows
  P or dS     <--TMA--            2 of [64, 64] a warpgroup <-- rounded
```
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  BLOCK,
  ROWS,
  copies,
  swizzled_columns,
)
from xlstm_jax.cells.mlstm.hopper.ring import Ring, stream
from xlstm_jax.cells.mlstm.hopper.schedule import Schedule
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

STAGES = 5  # buffers of the ring of operands


class Shared(NamedTuple):
  """What a block has in shared memory, and the barriers of its rings."""

  rows: Any
  columns: Any
  state: Any
  vectors: Any
  pairs: Any
  full: Any
  free: Any
  vectors_full: Any
  vectors_free: Any
  state_full: Any
  state_free: Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes, and what is static otherwise.

  Attributes:
    vectors: How many numbers of a column's token the kernel needs.
    most_blocks: Blocks that run at once.
  """

  batch: int
  heads: int
  chunks: int
  chunk: int
  key_dim: int
  vectors: int
  most_blocks: int
  interpret: Any

  @property
  def tiles(self) -> int:
    """Tiles of rows, or of columns, of a chunk."""
    return self.chunk // BLOCK

  @property
  def schedule(self) -> Schedule:
    return Schedule(
      self.batch, self.heads, self.chunks, self.tiles, self.most_blocks
    )

  def run(self, kernel: Callable, reads, writes):
    """Runs a kernel over these arrays; it is given refs and `Shared`."""
    operands = swizzled(
      STAGES, BLOCK, 64, columns=swizzled_columns(self.key_dim)
    )
    (written,) = plgpu.kernel(
      kernel,
      out_type=(writes,),
      grid=(self.schedule.blocks,),
      grid_names=("block",),
      num_threads=3,
      thread_name="worker",
      scratch_types=Shared(
        rows=operands,
        columns=operands,
        state=plgpu.SMEM((2, self.key_dim), F32),
        vectors=plgpu.SMEM((2, self.vectors, BLOCK), F32),
        pairs=swizzled(2, 2, ROWS, 64),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        vectors_full=plgpu.Barrier(num_arrivals=self.vectors, num_barriers=2),
        vectors_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        state_full=plgpu.Barrier(
          num_arrivals=len(copies(self.key_dim)), num_barriers=2
        ),
        state_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
      ),
      compiler_params=COMPILER,
      interpret=self.interpret,
    )(reads)
    return written


@dataclasses.dataclass(frozen=True)
class Block:
  """A thread block: its rings, and which warpgroup this is.

  The ring of operands is used once for every 64 numbers of a tile (`step`),
  that of the columns' vectors once for every tile (`column`), and that of n or
  dn once for every item (`k`).

  Attributes:
    worker: The warpgroup: 0 and 1 compute, 2 loads.
    number: The block's number.
    count: How many items it takes.
  """

  plan: Plan
  shared: Shared
  worker: Any
  number: Any
  count: Any

  @classmethod
  def here(cls, plan: Plan, shared: Shared):
    worker, number = lax.axis_index("worker"), lax.axis_index("block")
    return cls(plan, shared, worker, number, plan.schedule.count(number))

  @property
  def operands(self) -> Ring:
    return Ring(self.shared.full, self.shared.free, STAGES)

  @property
  def vectors(self) -> Ring:
    return Ring(self.shared.vectors_full, self.shared.vectors_free, 2)

  @property
  def states(self) -> Ring:
    return Ring(self.shared.state_full, self.shared.state_free, 2)

  def run(self, load: Callable, compute: Callable):
    """Runs `load` or `compute` on every item of this block.

    They are `load(k, item, counts)` and `compute(half, k, item, counts)`, of
    the rows of this warpgroup in a tile of 128, the item's number, its row,
    head, chunk and tile of rows, and how often the rings were used, and return
    the counts.
    """

    @pl.when(self.worker == 2)
    def _load():
      plgpu.set_max_registers(LOADING, action="decrease")
      self.each_item(load)

    @pl.when(self.worker < 2)
    def _compute():
      plgpu.set_max_registers(COMPUTING, action="increase")
      half = pl.ds(self.worker * ROWS, ROWS)
      self.each_item(functools.partial(compute, half))
      plgpu.wait_smem_to_gmem(0)

  def each_item(self, run: Callable):
    schedule = self.plan.schedule
    lax.fori_loop(
      0,
      self.count,
      lambda k, counts: run(k, schedule.item(self.number, k), counts),
      (jnp.int32(0), jnp.int32(0)),
    )

  def load(
    self,
    state_ref,
    vector_refs: Sequence[Any],
    operand_refs: Sequence[tuple[Any, Any]],
    others: Callable,
  ) -> Callable:
    """Loads what an item needs, the tile of its own columns first.

    Args:
      state_ref: n or dn of every chunk.
      vector_refs: The numbers of the columns' tokens.
      operand_refs: Rows and columns of each matrix product.
      others: `others(r)`: the first of the other tiles that a row tile sees,
        and their end.
    """
    plan, shared = self.plan, self.shared

    def item(k, place, counts):
      b, h, n, r = place
      t0 = n * plan.chunk
      rows = pl.ds(t0 + r * BLOCK, BLOCK)
      slot = self.states.room(k)
      for start, size in copies(plan.key_dim):
        keys = pl.ds(start, size)
        self.states.fill(
          slot, state_ref.at[b, h, n, keys], shared.state.at[slot, keys]
        )

      def tile(c, counts):
        step, column = counts
        columns = pl.ds(t0 + c * BLOCK, BLOCK)
        slot = self.vectors.room(column)
        for i, source in enumerate(vector_refs):
          self.vectors.fill(
            slot, source.at[b, h, columns], shared.vectors.at[slot, i]
          )
        for row_ref, column_ref in operand_refs:
          for start, _ in pieces(row_ref.shape[-1], 64):
            dims = pl.ds(start, 64)
            slot = self.operands.room(step)
            for source, target in (
              (row_ref.at[b, rows, h, dims], shared.rows),
              (column_ref.at[b, columns, h, dims], shared.columns),
            ):
              self.operands.fill(slot, source, target.at[slot])
            step += 1
        return step, column + 1

      counts = tile(r, counts)
      first, end = others(r)
      return lax.fori_loop(first, end, tile, counts)

    return item


@dataclasses.dataclass(frozen=True)
class Rows:
  """The 64 rows of a warpgroup in an item.

  Attributes:
    k: The item's number.
    r: Its tile of rows.
    half: The rows in a tile of 128.
    tokens: The rows in all T tokens.
    exponents: Their exponents, in two parts.
    border: The first or last column that each sees, counted from the first of
      the columns' tile r.
    weight: With which each reads, or writes, the state between chunks.
    state_slot: Where that state's vector lies.
  """

  block: Block
  k: Any
  b: Any
  h: Any
  r: Any
  half: Any
  tokens: Any
  exponents: list[Any]
  border: Any
  weight: Any
  state_slot: Any

  @classmethod
  def of(
    cls, block: Block, half, k, place, exponent_refs, border_ref, weight_ref
  ):
    b, h, n, r = place
    start = n * block.plan.chunk + r * BLOCK + block.worker * ROWS
    tokens = pl.ds(start, ROWS)
    exponents = [load_rows(ref.at[b, h, tokens]) for ref in exponent_refs]
    border = load_rows(border_ref.at[b, tokens]) - r * BLOCK
    weight = load_rows(weight_ref.at[b, h, tokens])
    slot = block.states.take(k)
    return cls(
      block, k, b, h, r, half, tokens, exponents, border, weight, slot
    )  # fmt: skip

  def load(self, ref):
    """A number of each row from memory."""
    return load_rows(ref.at[self.b, self.h, self.tokens])

  def products(self, step, dim: int):
    """Rows times columns over `dim` numbers, and the step after them."""
    products_rc, _, step = self._products(step, dim, None)
    return products_rc, step

  def products_with_state(self, step, dim: int):
    """The same, and the rows times the state's vector, by their weights."""
    products_rc, state_r, step = self._products(step, dim, zeros(ROWS))
    state_r = state_r * self.weight
    self.block.states.release(self.k)
    return products_rc, state_r, step

  def _products(self, step, dim: int, state_r):
    parts = pieces(dim, 64)
    shared = self.block.shared

    def product(multiply, slot, j, state_r):
      start, new = parts[j]
      row_ref = shared.rows.at[slot, self.half, new]
      multiply(row_ref, shared.columns.at[slot, :, new].transpose((1, 0)))
      if state_r is None:
        return None
      row_rk = plgpu.load(row_ref, layout=MATRIX).astype(F32)
      keys = pl.ds(start + new.start, new.size)
      n_k = plgpu.load(shared.state.at[self.state_slot, keys], layout=COLUMN)
      return state_r + (row_rk * over_rows(n_k, ROWS)).sum(axis=1)

    return stream(
      self.block.operands,
      *(step, len(parts), zeros(ROWS, BLOCK), state_r, product),
      self.block.plan.interpret,
    )

  def column_vector(self, slot, i: int, start: int):
    """The i-th number of 64 columns' tokens, the same in every row."""
    vector = self.block.shared.vectors.at[slot, i, pl.ds(start, 64)]
    return over_rows(plgpu.load(vector, layout=COLUMN), ROWS)

  def log_weights(self, slot, start: int):
    """The sum of exponents of rows and of 64 columns, like parts first."""
    coarse, rest = (
      over_columns(self.exponents[i], 64) + self.column_vector(slot, i, start)
      for i in range(2)
    )
    return coarse, rest

  def save(self, pairs_ref, pairs_rc, c, start: int, stored: int):
    """Writes the pairs with 64 columns of tile c."""
    columns = pl.ds(c * BLOCK + start, 64)
    store(
      self.block.shared.pairs.at[self.block.worker, stored % 2],
      pairs_rc.astype(BF16),
      pairs_ref.at[self.b, self.h, self.tokens, columns],
      others=1,
    )
