"""The states between chunks: C and n, and backward in time their gradients.

    C_n = keep_n C_{n-1} + sum over the chunk's tokens s of  k_s write_s v_s^T
    n_n = keep_n n_{n-1} + sum over the chunk's tokens s of  k_s write_n_s

The gradients D and dn follow the same recurrence from the last chunk to the
first, with other data in the place of k, v, write and write_n (`spans`).

A thread block keeps up to 128 keys by 256 values of C in registers while it
runs over the chunks of a span: a warpgroup has 64 of the keys, K' in all, and
all V' values.

```
  memory            shared memory              registers of a warpgroup
  k, v  --TMA-->    ring of tiles of 64        k_kl: transposed, times write_l,
  write             tokens: k [64, K'],  --->        rounded to bfloat16
  write_n           v [64, V'], weights        C_kv += k_kl v_lv        (wgmma)
                                               n_k  += sum of k_kl write_n_l
  C, n   <--TMA--   C [64, V'] bfloat16  <---  C_kv, n_k as a chunk begins
```
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.lowered_once import lowered_once
from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  ROWS,
  TOKENS,
  scan_blocks,
  swizzled_columns,
)
from xlstm_jax.cells.mlstm.hopper.ring import Ring, accumulate
from xlstm_jax.cells.mlstm.hopper.tiles import (
  BF16,
  COLUMN,
  COMPILER,
  COMPUTING,
  F32,
  LOADING,
  MATRIX,
  load_rows,
  over_rows,
  store,
  swizzled,
)


class _Reads(NamedTuple):
  """What the kernel reads from memory: references there, arrays outside."""

  k_BTHK: Any
  v_BTHV: Any
  write_BHT: Any
  write_n_BHT: Any
  keep_BHN: Any
  parts_BHN: Any
  C_BHRKV: Any
  n_BHRK: Any


class _Writes(NamedTuple):
  """What it writes there."""

  C_BHPKV: Any
  n_BHNK: Any
  C_last_BHRKV: Any
  n_last_BHRK: Any


class _Shared(NamedTuple):
  """What a block has in shared memory: tiles in a ring, and C to be written."""

  k: Any
  v: Any
  write: Any
  write_n: Any
  C: Any
  full: Any
  free: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes, and what is static otherwise.

  Attributes:
    columns: Most columns of C that a block keeps.
    buffers: Buffers of the ring.
  """

  batch: int
  heads: int
  spans: int
  chunks: int
  chunk: int
  key_dim: int
  value_dim: int
  columns: int
  buffers: int
  reverse: bool
  save: bool
  interpret: Any

  @property
  def tiles(self) -> int:
    """Tiles of tokens of a chunk."""
    return self.chunk // TOKENS

  @property
  def span_chunks(self) -> int:
    return self.chunks // self.spans

  @property
  def blocks(self) -> tuple[int, int]:
    """Blocks of keys and of values."""
    return scan_blocks(self.key_dim, self.value_dim, self.columns)

  @property
  def block_keys(self) -> int:
    return self.key_dim // self.blocks[0]

  @property
  def width(self) -> int:
    """Values of a block."""
    return self.value_dim // self.blocks[1]

  @property
  def workers(self) -> int:
    """Warpgroups that compute."""
    return -(-self.block_keys // ROWS)

  @property
  def paired(self) -> bool:
    """Whether two blocks of keys are a cluster.

    Each then loads half of the values for both. Interpret mode knows no such
    copy.
    """
    return self.blocks[0] % 2 == 0 and not self.interpret


@lowered_once("chunk", "interpret", "columns", "reverse", "save", "buffers")
def scan_states(
  k_BTHK: jax.Array,
  v_BTHV: jax.Array,
  write_BHT: jax.Array,
  write_n_BHT: jax.Array,
  keep_BHN: jax.Array,
  parts_BHN: jax.Array,
  C_BHRKV: jax.Array,
  n_BHRK: jax.Array,
  *,
  chunk: int,
  columns: int = 256,
  reverse: bool = False,
  save: bool = True,
  buffers: int = 3,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """C -> keep C + sum of write k v^T, n -> keep n + sum of write_n k.

  R independent spans of chunks run side by side, each from its own first
  state; `reverse` runs from the last chunk to the first. A block computes at
  most so many columns of C.

  Returns:
    With `save` the states that enter every chunk (otherwise placeholders), and
    the states after every span, without `save` but the last. The first are
    n_BHNK and in bfloat16 C_BHPKV: N times C, then N times what rounding took
    from it, which is written only where `parts_BHN` is 2.
  """
  batch, time, heads, key_dim = k_BTHK.shape
  plan = _Plan(
    batch=batch, heads=heads, spans=C_BHRKV.shape[2],
    chunks=time // chunk, chunk=chunk,
    key_dim=key_dim, value_dim=v_BTHV.shape[-1], columns=columns,
    buffers=buffers, reverse=reverse, save=save, interpret=interpret,
  )  # fmt: skip

  def mlstm_states(reads, writes, *shared):
    worker = lax.axis_index("worker")
    block = _Block.here(plan, reads, writes, _Shared(*shared))

    @pl.when(worker == plan.workers)
    def _load():
      plgpu.set_max_registers(LOADING, action="decrease")
      block.load()

    @pl.when(worker < plan.workers)
    def _compute():
      plgpu.set_max_registers(COMPUTING, action="increase")
      block.compute(worker)

  reads = _Reads(
    k_BTHK, v_BTHV, write_BHT, write_n_BHT, keep_BHN, parts_BHN, C_BHRKV, n_BHRK
  )
  return tuple(_launch(mlstm_states, plan, reads))


def _launch(kernel, plan: _Plan, reads: _Reads) -> _Writes:
  """Runs it for all blocks of keys and values, heads, rows and spans."""
  key_blocks, value_blocks = plan.blocks
  workers, buffers = plan.workers, plan.buffers
  if plan.paired:
    key_blocks //= 2
    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("pair",)}
    freed = plgpu.ClusterBarrier(
      collective_axes=("pair",), num_arrivals=workers, num_barriers=buffers
    )
  else:
    cluster = {}
    freed = plgpu.Barrier(num_arrivals=workers, num_barriers=buffers)
  batch, heads = plan.batch, plan.heads
  key_dim, value_dim = plan.key_dim, plan.value_dim
  saved = plan.chunks if plan.save else 1
  writes = _Writes(
    jax.ShapeDtypeStruct((batch, heads, 2 * saved, key_dim, value_dim), BF16),
    jax.ShapeDtypeStruct((batch, heads, saved, key_dim), F32),
    jax.ShapeDtypeStruct(reads.C_BHRKV.shape, F32),
    jax.ShapeDtypeStruct(reads.n_BHRK.shape, F32),
  )
  # Nothing starts from what the last span leaves.
  spans = plan.spans if plan.save else plan.spans - 1
  (written,) = plgpu.kernel(
    kernel,
    out_type=(writes,),
    grid=(value_blocks, key_blocks, heads, batch, spans),
    grid_names=("value", "key", "head", "batch", "span"),
    **cluster,
    num_threads=workers + 1,
    thread_name="worker",
    scratch_types=_Shared(
      k=swizzled(
        buffers, TOKENS, plan.block_keys, columns=swizzled_columns(key_dim)
      ),
      v=swizzled(buffers, TOKENS, plan.width),
      write=plgpu.SMEM((buffers, TOKENS), F32),
      write_n=plgpu.SMEM((buffers, TOKENS), F32),
      C=swizzled(workers, ROWS, plan.width if plan.save else 64),
      full=plgpu.Barrier(num_arrivals=4, num_barriers=buffers),
      free=freed,
    ),
    compiler_params=COMPILER,
    interpret=plan.interpret,
  )(reads)
  return written


@dataclasses.dataclass(frozen=True)
class _Block:
  """A thread block: its part of C in one head, row and span of chunks.

  Attributes:
    k0: The first of its keys.
    values: Its values.
    first: Whether these are the first, whose block has n, too.
  """

  plan: _Plan
  reads: _Reads
  writes: _Writes
  shared: _Shared
  ring: Ring
  b: Any
  h: Any
  span: Any
  k0: Any
  values: Any
  first: Any

  @classmethod
  def here(cls, plan: _Plan, reads: _Reads, writes: _Writes, shared: _Shared):
    b, h, span = (lax.axis_index(name) for name in ("batch", "head", "span"))
    key_block = lax.axis_index("key")
    if plan.paired:
      key_block = 2 * key_block + lax.axis_index("pair")
    k0 = key_block * plan.block_keys
    values = pl.ds(lax.axis_index("value") * plan.width, plan.width)
    first = lax.axis_index("value") == 0
    ring = Ring(shared.full, shared.free, plan.buffers)
    return cls(
      plan, reads, writes, shared, ring, b, h, span, k0, values, first
    )  # fmt: skip

  def place(self, c):
    """The number of the span's c-th chunk among all chunks of the row."""
    position = self.span * self.plan.span_chunks + c
    return self.plan.chunks - 1 - position if self.plan.reverse else position

  def load(self):
    """Loads all tiles of tokens of the span, chunk after chunk."""
    plan, reads, shared, ring = self.plan, self.reads, self.shared, self.ring
    steps = plan.span_chunks * plan.tiles
    keys = pl.ds(self.k0, plan.block_keys)

    def tile(step, _):
      slot = ring.room(step)
      t0 = self.place(step // plan.tiles) * plan.chunk
      tokens = pl.ds(t0 + lax.rem(step, plan.tiles) * TOKENS, TOKENS)
      for source, target in (
        (reads.k_BTHK.at[self.b, tokens, self.h, keys], shared.k),
        (reads.write_BHT.at[self.b, self.h, tokens], shared.write),
        (reads.write_n_BHT.at[self.b, self.h, tokens], shared.write_n),
      ):
        ring.fill(slot, source, target.at[slot])
      ring.fill(
        slot,
        reads.v_BTHV.at[self.b, tokens, self.h, self.values],
        shared.v.at[slot],
        together="pair" if plan.paired else None,
      )

    lax.fori_loop(0, steps, tile, None)
    if plan.paired:
      # No block may end while the other still tells it what it has read.
      for step in range(max(steps - plan.buffers, 0), steps):
        plgpu.barrier_wait(shared.free.at[step % plan.buffers])

  def compute(self, worker):
    """Runs over the chunks of the span with 64 keys of C and n in registers."""
    plan, reads, writes = self.plan, self.reads, self.writes
    # Of 96 keys 32 belong to both warpgroups, which write the same.
    offset = worker * (plan.block_keys - ROWS)
    keys = pl.ds(self.k0 + offset, ROWS)
    state = (self.b, self.h, self.span, keys)
    C_kv = plgpu.load(
      reads.C_BHRKV.at[*state, self.values], layout=MATRIX, optimized=False
    )
    n_k = load_rows(reads.n_BHRK.at[*state])

    def chunk(c, carry):
      C_kv, n_k, keep, parts = carry
      # Read a chunk ahead, for memory answers late.
      keep_next, parts_next = self.gates(
        jnp.minimum(c + 1, plan.span_chunks - 1)
      )
      if plan.save:
        self.save(worker, keys, c, C_kv, n_k, parts)
      # What the last chunk leaves may be read by whatever follows.
      exact = (parts_next > 1) | (c == plan.span_chunks - 1)
      add = functools.partial(self.add_chunk, pl.ds(offset, ROWS))
      C_kv, n_k = lax.cond(
        exact,
        functools.partial(add, operands=2),
        functools.partial(add, operands=1),
        *(c, C_kv * keep, n_k * keep),
      )
      return C_kv, n_k, keep_next, parts_next

    C_kv, n_k, *_ = lax.fori_loop(
      0, plan.span_chunks, chunk, (C_kv, n_k, *self.gates(0))
    )
    writes.C_last_BHRKV.at[*state, self.values][...] = C_kv

    @pl.when(self.first)
    def _last():
      writes.n_last_BHRK.at[*state][...] = n_k

    plgpu.wait_smem_to_gmem(0)

  def gates(self, c):
    """What a chunk keeps of the state, and in how many parts that is kept."""
    place = self.b, self.h, self.place(c)
    return self.reads.keep_BHN[*place], self.reads.parts_BHN[*place]

  def save(self, worker, keys, c, C_kv, n_k, parts):
    """Writes the state that enters a chunk."""
    b, h, chunks = self.b, self.h, self.plan.chunks
    buffer_ref = self.shared.C.at[worker]
    C_ref, n_ref = self.writes.C_BHPKV, self.writes.n_BHNK
    store(
      buffer_ref,
      C_kv.astype(BF16),
      C_ref.at[b, h, self.place(c), keys, self.values],
    )

    @pl.when(parts > 1)
    def _rest():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      # 64 columns at a time, from what was rounded there: registers are full.
      for start in range(0, self.plan.width, 64):
        rounded_ref = self.shared.C.at[worker, :, pl.ds(start, 64)]
        rounded = plgpu.load(rounded_ref, layout=MATRIX).astype(F32)
        rest = C_kv[:, start : start + 64] - rounded
        rounded_ref[...] = rest.astype(BF16)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        buffer_ref, C_ref.at[b, h, chunks + self.place(c), keys, self.values]
      )

    @pl.when(self.first)
    def _vector():
      n_ref.at[b, h, self.place(c), keys][...] = n_k

  def add_chunk(self, keys, c, C_kv, n_k, *, operands: int):
    """The state with a chunk's tokens, their weighted keys in 1 or 2 parts."""
    shared, ring = self.shared, self.ring
    steps = [c * self.plan.tiles + tile for tile in range(self.plan.tiles)]

    def add(multiply, n_k):
      for tile, step in enumerate(steps):
        slot = ring.take(step)
        k_kl = plgpu.load(
          shared.k.at[slot, :, keys].transpose((1, 0)), layout=MATRIX
        ).astype(F32)
        write_l = plgpu.load(shared.write.at[slot], layout=COLUMN)
        write_n_l = plgpu.load(shared.write_n.at[slot], layout=COLUMN)
        n_k = n_k + (k_kl * over_rows(write_n_l, ROWS)).sum(axis=1)
        written_kl = k_kl * over_rows(write_l, ROWS)
        rounded_kl = written_kl.astype(BF16)
        if tile:  # its products ran while this operand was prepared
          plgpu.wgmma_wait(0)
          ring.release(steps[tile - 1])
        multiply(rounded_kl, shared.v.at[slot])
        if operands == 2:
          rest_kl = (written_kl - rounded_kl.astype(F32)).astype(BF16)
          multiply(rest_kl, shared.v.at[slot])
      return n_k

    C_kv, n_k = accumulate(C_kv, n_k, add, self.plan.interpret)
    ring.release(steps[-1])
    return C_kv, n_k
