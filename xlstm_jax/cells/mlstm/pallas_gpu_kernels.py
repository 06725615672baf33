"""The Hopper kernels of the mLSTM, in Pallas Mosaic GPU.

`scan_states` runs over chunks and keeps a tile of the matrix memory in
registers; `weigh` makes the weights of all pairs of tokens inside chunks;
`combine` sums values by these weights, and adds a read of the state between
chunks. The backward pass is the same three kernels with the operands
exchanged: `scan_states` backward in time gives the gradients of the states,
`weigh` also those of the scores, and every gradient of q, k, v is a `combine`.

Each block is two computing warpgroups of 64 rows and one that loads tiles
through TMA into rings of buffers, ahead of the computation. The kernels move
tiles of 64 tokens: a chunk is a multiple of 128.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32, BF16 = jnp.float32, jnp.bfloat16
ROWS = 64  # of a warpgroup's matrix product
TOKENS = 64  # of a tile
BLOCK = 128  # tokens of a block: two warpgroups of rows
SHARED_MEMORY = 227 * 1024  # bytes a block may have on a Hopper GPU
RESERVED = 4096  # of it, for vectors and barriers
MAX_COPY = 256  # numbers that TMA copies along a dimension
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
_COMPILER = plgpu.CompilerParams(approx_math=True)


def scan_states(
  k_BTHK: jax.Array,
  v_BTHV: jax.Array,
  write_BHT: jax.Array,
  write_n_BHT: jax.Array,
  keep_BHN: jax.Array,
  C_BHSKV: jax.Array,
  n_BHSK: jax.Array,
  *,
  chunk: int,
  reverse: bool = False,
  save: bool = True,
  buffers: int = 3,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """C -> keep C + sum of write k v^T, n -> keep n + sum of write_n k.

  S independent spans of chunks run side by side, each from its own first
  state; `reverse` runs from the last chunk to the first.

  Returns:
    With `save` the states that enter every chunk, C_BHNKV in bfloat16 and
    n_BHNK (else placeholders), and the states after every span, without
    `save` but the last.
  """
  batch, time, heads, key_dim = k_BTHK.shape
  value_dim = v_BTHV.shape[-1]
  spans = C_BHSKV.shape[2]
  chunks = time // chunk
  span = chunks // spans
  tiles = chunk // TOKENS
  key_blocks, value_blocks = scan_blocks(key_dim, value_dim)
  workers = key_dim // (ROWS * key_blocks)
  width = value_dim // value_blocks
  steps = span * tiles
  # Two blocks of keys are a cluster: each loads half of the values for both.
  # Interpret mode knows no such copy.
  paired = key_blocks % 2 == 0 and not interpret

  def mlstm_states(
    k_ref, v_ref, w_ref, wn_ref, keep_ref, C0_ref, n0_ref,
    C_ref, n_ref, C_last_ref, n_last_ref,
    k_smem, v_smem, w_smem, wn_smem, C_smem, full, free,
  ):  # fmt: skip
    worker = lax.axis_index("worker")
    b, h, s = (lax.axis_index(name) for name in ("batch", "head", "span"))
    key_block = lax.axis_index("key")
    if paired:
      key_block = 2 * key_block + lax.axis_index("pair")
    k0 = key_block * (ROWS * workers)
    values = pl.ds(lax.axis_index("value") * width, width)
    first = lax.axis_index("value") == 0
    ring = _Ring(full, free, buffers)

    def place(chunk_index):
      position = s * span + chunk_index
      return chunks - 1 - position if reverse else position

    @pl.when(worker == workers)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load(step, _):
        slot = ring.room(step)
        t0 = place(step // tiles) * chunk + lax.rem(step, tiles) * TOKENS
        tokens = pl.ds(t0, TOKENS)
        for source, target in (
          (k_ref.at[b, tokens, h, pl.ds(k0, ROWS * workers)], k_smem),
          (w_ref.at[b, h, tokens], w_smem),
          (wn_ref.at[b, h, tokens], wn_smem),
        ):
          ring.fill(slot, source, target.at[slot])
        ring.fill(
          slot,
          v_ref.at[b, tokens, h, values],
          v_smem.at[slot],
          together="pair" if paired else None,
        )

      lax.fori_loop(0, steps, load, None)
      if paired:
        # No block may end while the other still tells it what it has read.
        for step in range(max(steps - buffers, 0), steps):
          plgpu.barrier_wait(free.at[step % buffers])

    @pl.when(worker < workers)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      keys = pl.ds(k0 + worker * ROWS, ROWS)
      C_kv = plgpu.load(
        C0_ref.at[b, h, s, keys, values], layout=MATRIX, optimized=False
      )
      n_k = plgpu.load(n0_ref.at[b, h, s, keys], layout=ROW, optimized=False)

      def one_chunk(c, carry):
        C_kv, n_k = carry
        if save:
          _store(
            C_smem.at[worker],
            C_kv.astype(BF16),
            C_ref.at[b, h, place(c), keys, values],
          )

          @pl.when(first)
          def _save():
            n_ref.at[b, h, place(c), keys][...] = n_k

        keep = keep_ref[b, h, place(c)]

        counts = [c * tiles + tile for tile in range(tiles)]

        def add(multiply, n_k):
          for tile, count in enumerate(counts):
            slot = ring.take(count)
            k_kl = plgpu.load(
              k_smem.at[slot, :, pl.ds(worker * ROWS, ROWS)].transpose((1, 0)),
              layout=MATRIX,
            ).astype(F32)
            w_l = plgpu.load(w_smem.at[slot], layout=COLUMN)
            wn_l = plgpu.load(wn_smem.at[slot], layout=COLUMN)
            n_k = n_k + (k_kl * _over_rows(wn_l, ROWS)).sum(axis=1)
            wk_kl = (k_kl * _over_rows(w_l, ROWS)).astype(BF16)
            if tile:  # its product ran while this operand was prepared
              plgpu.wgmma_wait(0)
              ring.release(counts[tile - 1])
            multiply(wk_kl, v_smem.at[slot])
          return n_k

        C_kv, n_k = _accumulate(C_kv * keep, n_k * keep, add, interpret)
        ring.release(counts[-1])
        return C_kv, n_k

      C_kv, n_k = lax.fori_loop(0, span, one_chunk, (C_kv, n_k))
      C_last_ref.at[b, h, s, keys, values][...] = C_kv

      @pl.when(first)
      def _last():
        n_last_ref.at[b, h, s, keys][...] = n_k

      plgpu.wait_smem_to_gmem(0)

  if paired:
    key_blocks //= 2
    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("pair",)}
    freed = plgpu.ClusterBarrier(
      collective_axes=("pair",), num_arrivals=workers, num_barriers=buffers
    )
  else:
    cluster = {}
    freed = plgpu.Barrier(num_arrivals=workers, num_barriers=buffers)
  saved = chunks if save else 1
  return plgpu.kernel(
    mlstm_states,
    out_type=(
      jax.ShapeDtypeStruct((batch, heads, saved, key_dim, value_dim), BF16),
      jax.ShapeDtypeStruct((batch, heads, saved, key_dim), F32),
      jax.ShapeDtypeStruct(C_BHSKV.shape, F32),
      jax.ShapeDtypeStruct(n_BHSK.shape, F32),
    ),
    # Nothing starts from what the last span leaves.
    grid=(value_blocks, key_blocks, heads, batch, spans if save else spans - 1),
    grid_names=("value", "key", "head", "batch", "span"),
    **cluster,
    num_threads=workers + 1,
    thread_name="worker",
    scratch_types=(
      _smem(buffers, TOKENS, ROWS * workers),
      _smem(buffers, TOKENS, width),
      plgpu.SMEM((buffers, TOKENS), F32),
      plgpu.SMEM((buffers, TOKENS), F32),
      _smem(workers, ROWS, width if save else 64),
      plgpu.Barrier(num_arrivals=4, num_barriers=buffers),
      freed,
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )(k_BTHK, v_BTHV, write_BHT, write_n_BHT, keep_BHN, C_BHSKV, n_BHSK)


def scan_blocks(key_dim: int, value_dim: int) -> tuple[int, int]:
  """Into how many blocks `scan_states` splits the keys and values of a head.

  A block has one or two times 64 keys and at most 256 values.
  """
  width = next(w for w in range(256, 0, -64) if value_dim % w == 0)
  return key_dim // math.gcd(key_dim, 2 * ROWS), value_dim // width


def weigh(
  a_BTHK: jax.Array,
  b_BTHK: jax.Array,
  vector_BHNK: jax.Array,
  *,
  row_BH2T: jax.Array,
  column_BH2T: jax.Array,
  past_BHT: jax.Array,
  border_BT: jax.Array,
  floor_BHT: jax.Array | None = None,
  extra_BHT: jax.Array | None = None,
  cotangents: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  chunk: int,
  normalize: bool = True,
  blocks: int = 132,
  interpret: Any = None,
) -> tuple[jax.Array, ...]:
  """The weights of all pairs of tokens of a chunk, (a_x b_z) exp(row + column).

  x reads z, which comes before it or is itself, if not before `border_x`. With
  `cotangents` (v_BTHV, dy_BTHV, bias_BHT) it is the other way round: x writes,
  and z, after it up to `border_x` or itself, reads.

  Returns:
    The weights, in bfloat16, of x and the place of z in its chunk: where no z
    of a block of 128 is visible they are not written. Then u_x, the sum of the
    weights plus past_x a_x vector, and the inverse of max(|u|, floor) + extra.
    With `cotangents` the weights, the gradients (v_x dy_z + bias_z) exp(row +
    column) of the scores, and the sum of weights times bias_z plus past_x a_x
    vector.
  """
  batch, time, heads, key_dim = a_BTHK.shape
  chunks, tiles = time // chunk, chunk // BLOCK
  backward = cotangents is not None
  items = batch * heads * chunks * tiles
  blocks = min(blocks, items)
  rows, columns, bias_BHT = [a_BTHK], [b_BTHK], None
  if cotangents is not None:
    v_BTHV, dy_BTHV, bias_BHT = cotangents
    rows, columns = [*rows, v_BTHV], [*columns, dy_BTHV]
  outputs = 2 if backward else 1
  stages = 5
  unused = jnp.zeros((1, 1, BLOCK), F32)

  def mlstm_weights(
    x_refs, z_refs, vector_ref, row_ref, column_ref, past_ref, border_ref,
    floor_ref, extra_ref, bias_ref, w_refs, u_refs,
    x_smem, z_smem, vector_smem, column_smem, bias_smem, w_smem,
    full, free, column_full, column_free, item_full, item_free,
  ):  # fmt: skip
    worker, block = lax.axis_index("worker"), lax.axis_index("block")
    mine = (items - block + blocks - 1) // blocks
    decode = functools.partial(
      _item, per_chunk=tiles, blocks=blocks, heads=heads, chunks=chunks
    )
    ring = _Ring(full, free, stages)
    column_ring = _Ring(column_full, column_free, 2)
    item_ring = _Ring(item_full, item_free, 2)

    def others(r):
      """The first of the other tiles that a row tile sees, and how many."""
      return (r + 1, tiles - 1 - r) if backward else (0, r)

    @pl.when(worker == 2)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def item(k, counts):
        step, column = counts
        b, h, n, r = decode(block, k)
        t0 = n * chunk
        x_tokens = pl.ds(t0 + r * BLOCK, BLOCK)
        slot = item_ring.room(k)
        for start, size in _copies(key_dim):
          place = pl.ds(start, size)
          item_ring.fill(
            slot, vector_ref.at[b, h, n, place], vector_smem.at[slot, place]
          )

        def tile(c, counts):
          step, column = counts
          z_tokens = pl.ds(t0 + c * BLOCK, BLOCK)
          slot = column_ring.room(column)
          column_ring.fill(
            slot, column_ref.at[b, h, :, z_tokens], column_smem.at[slot]
          )
          if backward:
            column_ring.fill(
              slot, bias_ref.at[b, h, z_tokens], bias_smem.at[slot]
            )
          for x_ref, z_ref in zip(x_refs, z_refs, strict=True):
            for j in range(x_ref.shape[-1] // 64):
              place = pl.ds(j * 64, 64)
              slot = ring.room(step)
              ring.fill(slot, x_ref.at[b, x_tokens, h, place], x_smem.at[slot])
              ring.fill(slot, z_ref.at[b, z_tokens, h, place], z_smem.at[slot])
              step += 1
          return step, column + 1

        first, count = others(r)
        counts = tile(r, (step, column))
        return lax.fori_loop(first, first + count, tile, counts)

      lax.fori_loop(0, mine, item, (jnp.int32(0), jnp.int32(0)))

    @pl.when(worker < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      half = pl.ds(worker * ROWS, ROWS)

      def item(k, counts):
        b, h, n, r = decode(block, k)
        x_tokens = pl.ds(n * chunk + r * BLOCK + worker * ROWS, ROWS)

        def of_rows(ref, *place):
          return plgpu.load(
            ref.at[*place, x_tokens], layout=ROW, optimized=False
          )

        row_x = [of_rows(row_ref, b, h, part) for part in range(2)]
        border_x = of_rows(border_ref, b)
        past_x = of_rows(past_ref, b, h)
        # Counted from the first column of the row tile's own block.
        border_x = border_x - r * BLOCK
        vector_slot = item_ring.take(k)

        def scores(step, dim, dot_x=None):
          """a b^T over `dim` numbers, and with dot_x a times the vector."""

          def part(multiply, slot, j, dot_x):
            x_ref = x_smem.at[slot, half]
            multiply(x_ref, z_smem.at[slot].transpose((1, 0)))
            if dot_x is None:
              return None
            part_xk = plgpu.load(x_ref, layout=MATRIX).astype(F32)
            n_k = plgpu.load(
              vector_smem.at[vector_slot, pl.ds(j * 64, 64)], layout=COLUMN
            )
            return dot_x + (part_xk * _over_rows(n_k, ROWS)).sum(axis=1)

          zeros = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), F32), MATRIX)
          return _stream(ring, step, dim // 64, zeros, dot_x, part, interpret)

        def visit(c, carry, *, diagonal):
          step, column, u_x = carry
          if diagonal:
            s_xz, u_x, step = scores(step, key_dim, u_x)
            u_x = u_x * past_x
            item_ring.release(k)
          else:
            s_xz, _, step = scores(step, key_dim)
          slot = column_ring.take(column)
          last_x = border_x + (r - c) * BLOCK
          stored = 0

          def save(x, target_ref, start):
            nonlocal stored
            place = pl.ds(c * BLOCK + start, 64)
            buffer = w_smem.at[worker, stored % 2]
            target_ref = target_ref.at[b, h, x_tokens, place]
            _store(buffer, x.astype(BF16), target_ref, others=1)
            stored += 1

          def of_columns(ref, start):
            z_k = plgpu.load(ref.at[pl.ds(start, 64)], layout=COLUMN)
            return _over_rows(z_k, ROWS)

          parts = [(start, slice(start, start + 64)) for start in (0, 64)]
          factors = []
          for start, place in parts:
            log_w = [
              _over_columns(row_x[i], 64)
              + of_columns(column_smem.at[slot, i], start)
              for i in range(2)
            ]
            z = _iota(1, interpret) + start
            border = _over_columns(last_x, 64)
            visible = z <= border if backward else z >= border
            if diagonal:
              x = _iota(0, interpret) + worker * ROWS
              visible = visible & ((z >= x) if backward else (z <= x))
            w_xz = jnp.exp(jnp.where(visible, log_w[0] + log_w[1], -jnp.inf))
            s_w = s_xz[:, place] * w_xz
            save(s_w, w_refs[0], start)
            if backward:
              bias = of_columns(bias_smem.at[slot], start)
              u_x = u_x + (s_w * bias).sum(axis=1)
              factors.append(w_xz)
            else:
              u_x = u_x + s_w.sum(axis=1)
          if backward:
            g_xz, _, step = scores(step, columns[1].shape[-1])
            for (start, place), w_xz in zip(parts, factors, strict=True):
              bias = of_columns(bias_smem.at[slot], start)
              save((g_xz[:, place] + bias) * w_xz, w_refs[1], start)
          column_ring.release(column)
          return step, column + 1, u_x

        u_x = plgpu.layout_cast(jnp.zeros((ROWS,), F32), ROW)
        carry = visit(r, (*counts, u_x), diagonal=True)
        first, count = others(r)
        step, column, u_x = lax.fori_loop(
          first,
          first + count,
          functools.partial(visit, diagonal=False),
          carry,
        )
        u_refs[0].at[b, h, x_tokens][...] = u_x
        if not backward:
          size_x = of_rows(floor_ref, b, h)
          if normalize:
            size_x = jnp.where(jnp.abs(u_x) > size_x, jnp.abs(u_x), size_x)
            size_x = size_x + of_rows(extra_ref, b, h)
          u_refs[1].at[b, h, x_tokens][...] = 1 / size_x
        return step, column

      lax.fori_loop(0, mine, item, (jnp.int32(0), jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

  pairs_type = jax.ShapeDtypeStruct((batch, heads, time, chunk), BF16)
  sums_type = jax.ShapeDtypeStruct(past_BHT.shape, F32)
  vectors = len(_copies(key_dim))
  weights, sums_ = plgpu.kernel(
    mlstm_weights,
    out_type=((pairs_type,) * outputs, (sums_type,) * (3 - outputs)),
    grid=(blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="worker",
    scratch_types=(
      _smem(stages, BLOCK, 64),
      _smem(stages, BLOCK, 64),
      plgpu.SMEM((2, key_dim), F32),
      plgpu.SMEM((2, 2, BLOCK), F32),
      plgpu.SMEM((2, BLOCK), F32),
      _smem(2, 2, ROWS, 64),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=outputs, num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=vectors, num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )(
    rows,
    columns,
    vector_BHNK,
    row_BH2T,
    column_BH2T,
    past_BHT,
    border_BT,
    *(unused if x is None else x for x in (floor_BHT, extra_BHT, bias_BHT)),
  )
  return *weights, *sums_


@dataclasses.dataclass(frozen=True)
class Sum:
  """y_x = past_x a_x state + the sum over z of w_xz c_z.

  z runs over the tokens of the chunk that x sees: in "h" and "dq" those up to
  its block of 128, in "dk" and "dv" those from there on. The state is
  transposed in "dq" and "dk", and so are in "dq" the weights. "h" is multiplied
  by factor_x in the end; "dq" and "dk" have the vector added to a_x state, "dq"
  factor_x times it.

  Attributes:
    partner: in "dk" and "dv" y_x partner_x is wanted, too, from y before it is
      rounded, in "dk" of the part from the state alone.
    low: whether what rounding took from y is wanted, too.
  """

  mode: Literal["h", "dq", "dk", "dv"]
  a_BTHA: jax.Array
  state_BHN: jax.Array
  w_BHTZ: jax.Array
  c_BTHO: jax.Array
  past_BHT: jax.Array
  factor_BHT: jax.Array | None = None
  vector_BHNO: jax.Array | None = None
  partner_BTHO: jax.Array | None = None
  low: bool = False

  @property
  def later(self) -> bool:
    return self.mode in ("dk", "dv")

  @property
  def transposed(self) -> bool:
    return self.mode in ("dq", "dk")

  def arrays(self) -> dict[str, jax.Array]:
    """What the kernel reads."""
    values = {
      "a": self.a_BTHA,
      "state": self.state_BHN,
      "w": self.w_BHTZ,
      "c": self.c_BTHO,
      "past": self.past_BHT,
      "factor": self.factor_BHT,
      "vector": self.vector_BHNO,
      "partner": self.partner_BTHO,
    }
    return {name: x for name, x in values.items() if x is not None}

  def results(self, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What it writes, if a block computes `width` columns."""
    y = jax.ShapeDtypeStruct(self.c_BTHO.shape, BF16)
    results = {"y": y}
    if self.low:
      results["low"] = y
    if self.later:
      tiles = self.c_BTHO.shape[-1] // width
      results["dot"] = jax.ShapeDtypeStruct((tiles, *self.past_BHT.shape), F32)
    return results


def combine(
  sums: Sequence[Sum], *, chunk: int, blocks: int = 132, interpret: Any = None
) -> list[dict[str, jax.Array]]:
  """All sums in one kernel: what they read together comes from memory once.

  The blocks take them from chunk after chunk, so that those of a chunk run at
  about the same time.

  Returns:
    For every sum "y" in bfloat16, and what it wants of "dot" and "low".
  """
  batch, time, heads, _ = sums[0].a_BTHA.shape
  width = out_width(*(x.c_BTHO.shape[-1] for x in sums))
  chunks, row_tiles = time // chunk, chunk // BLOCK
  out_tiles = [x.c_BTHO.shape[-1] // width for x in sums]
  ends = list(itertools.accumulate(row_tiles * tiles for tiles in out_tiles))
  items = batch * heads * chunks * ends[-1]
  blocks = min(blocks, items)
  dims = [width, *(x.a_BTHA.shape[-1] for x in sums)]
  depth = BLOCK if all(dim % BLOCK == 0 for dim in dims) else 64
  per_block = BLOCK // depth
  stages, stores = combine_buffers(width, depth)

  def mlstm_sums(
    inputs, outputs, a_smem, c_smem, vector_smem, y_smem, full, free,
    item_full, item_free,
  ):  # fmt: skip
    a_smem, across_smem = a_smem
    c_smem, across_state_smem = c_smem
    worker, block = lax.axis_index("worker"), lax.axis_index("block")
    mine = (items - block + blocks - 1) // blocks
    ring = _Ring(full, free, stages)
    vector_ring = _Ring(item_full, item_free, 2)

    def each_item(run, counts):
      """Runs all items of this block, each as its sum wants it."""

      def item(k, counts):
        b, h, n, place = _item(
          block,
          k,
          per_chunk=ends[-1],
          blocks=blocks,
          heads=heads,
          chunks=chunks,
        )

        def branch(i):
          def of_sum(counts):
            first = ends[i - 1] if i else 0
            r = (place - first) // out_tiles[i]
            o = lax.rem(place - first, out_tiles[i])
            return run(i, (b, h, n, r, o), counts)

          return of_sum

        branches = [branch(i) for i in range(len(sums))]
        if len(sums) == 1:
          return branches[0](counts)
        which = sum((place >= end).astype(jnp.int32) for end in ends[:-1])
        return lax.switch(which, branches, counts)

      lax.fori_loop(0, mine, item, counts)

    def seen(x, r):
      """The first block of tokens that a row tile sees, and the end."""
      return (r, row_tiles) if x.later else (0, r + 1)

    @pl.when(worker == 2)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load(i, item, counts):
        x, refs = sums[i], inputs[i]
        b, h, n, r, o = item
        step, vectors = counts
        t0 = n * chunk
        rows = pl.ds(t0 + r * BLOCK, BLOCK)
        columns = pl.ds(o * width, width)
        if x.transposed:
          slot = vector_ring.room(vectors)
          vector_ring.fill(
            slot, refs["vector"].at[b, h, n, columns], vector_smem.at[slot]
          )
          vectors += 1
        for j in range(x.a_BTHA.shape[-1] // depth):
          slot = ring.room(step)
          part = pl.ds(j * depth, depth)
          place = (columns, part) if x.transposed else (part, columns)
          target = across_state_smem if x.transposed else c_smem
          ring.fill(slot, refs["a"].at[b, rows, h, part], a_smem.at[slot])
          ring.fill(slot, refs["state"].at[b, h, n, *place], target.at[slot])
          step += 1

        def partner(step):
          for part in range(per_block):
            slot = ring.room(step)
            tokens = pl.ds(t0 + r * BLOCK + part * depth, depth)
            ring.fill(
              slot, refs["partner"].at[b, tokens, h, columns], c_smem.at[slot]
            )
            plgpu.barrier_arrive(full.at[slot])
            step += 1
          return step

        def tile(z, step):
          slot = ring.room(step)
          tokens = pl.ds(t0 + z * depth, depth)
          if x.mode == "dq":
            place = (tokens, pl.ds(r * BLOCK, BLOCK))
            target = across_smem
          else:
            place = (rows, pl.ds(z * depth, depth))
            target = a_smem
          ring.fill(slot, refs["w"].at[b, h, *place], target.at[slot])
          ring.fill(slot, refs["c"].at[b, tokens, h, columns], c_smem.at[slot])
          return step + 1

        if x.mode == "dk":
          step = partner(step)
        first, end = seen(x, r)
        step = lax.fori_loop(per_block * first, per_block * end, tile, step)
        if x.mode == "dv":
          step = partner(step)
        return step, vectors

      each_item(load, (jnp.int32(0), jnp.int32(0)))

    @pl.when(worker < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      half = pl.ds(worker * ROWS, ROWS)

      def partner_product(y, step):
        """Every row of y times that of its partner."""
        slots = [ring.take(step + part) for part in range(per_block)]
        if depth == BLOCK:
          partner_ref = c_smem.at[slots[0], half]
        else:
          partner_ref = c_smem.at[jnp.where(worker == 0, *slots)]
        dot_x = plgpu.layout_cast(jnp.zeros((ROWS,), F32), ROW)
        for j in range(width // 64):
          place = slice(j * 64, (j + 1) * 64)
          other = plgpu.load(partner_ref.at[:, place], layout=MATRIX)
          dot_x = dot_x + (y[:, place] * other.astype(F32)).sum(axis=1)
        for part in range(per_block):
          ring.release(step + part)
        return dot_x, step + per_block

      def compute(i, item, counts):
        x, refs, out_refs = sums[i], inputs[i], outputs[i]
        b, h, n, r, o = item
        step, vectors = counts
        rows = pl.ds(n * chunk + r * BLOCK + worker * ROWS, ROWS)
        tiles = x.a_BTHA.shape[-1] // depth

        def of_rows(ref):
          return plgpu.load(ref.at[b, h, rows], layout=ROW, optimized=False)

        past_x = of_rows(refs["past"])
        factor_x = of_rows(refs["factor"]) if "factor" in refs else None

        def read_state(multiply, slot, j, none):
          if x.transposed:
            state = across_state_smem.at[slot].transpose((1, 0))
          else:
            state = c_smem.at[slot]
          multiply(a_smem.at[slot, half], state)

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), F32), MATRIX)
        y, _, step = _stream(
          ring, step, tiles, zeros, None, read_state, interpret
        )
        if x.transposed:
          slot = vector_ring.take(vectors)
          bias = _over_rows(
            plgpu.load(vector_smem.at[slot], layout=COLUMN), ROWS
          )
          if x.mode == "dq":
            bias = bias * _over_columns(factor_x, width)
          y = y + bias
          vector_ring.release(vectors)
          vectors += 1
        y = y * _over_columns(past_x, width)
        dot_x = None
        if x.mode == "dk":
          dot_x, step = partner_product(y, step)

        def weigh_values(multiply, slot, j, none):
          if x.mode == "dq":
            w_ref = across_smem.at[slot, :, half].transpose((1, 0))
          else:
            w_ref = a_smem.at[slot, half]
          multiply(w_ref, c_smem.at[slot])

        def block_of(_, carry):
          step, y = carry
          y, _, step = _stream(
            ring, step, per_block, y, None, weigh_values, interpret
          )
          return step, y

        first, end = seen(x, r)
        step, y = lax.fori_loop(first, end, block_of, (step, y))
        if x.mode == "h":
          y = y * _over_columns(factor_x, width)
        if x.mode == "dv":
          dot_x, step = partner_product(y, step)
        if x.later:
          out_refs["dot"].at[o, b, h, rows][...] = dot_x

        stored = 0

        def save(x, target_ref, start):
          nonlocal stored
          place = pl.ds(o * width + start, 64)
          _store(
            y_smem.at[worker, stored % stores],
            x,
            target_ref.at[b, rows, h, place],
            others=stores - 1,
          )
          stored += 1

        for j in range(width // 64):
          exact = y[:, j * 64 : (j + 1) * 64]
          rounded = exact.astype(BF16)
          save(rounded, out_refs["y"], j * 64)
          if x.low:
            rest = exact - rounded.astype(F32)
            save(rest.astype(BF16), out_refs["low"], j * 64)
        return step, vectors

      each_item(compute, (jnp.int32(0), jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

  (results,) = plgpu.kernel(
    mlstm_sums,
    out_type=([x.results(width) for x in sums],),
    grid=(blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="worker",
    scratch_types=(
      plgpu.RefUnion(_smem(stages, BLOCK, depth), _smem(stages, depth, BLOCK)),
      plgpu.RefUnion(_smem(stages, depth, width), _smem(stages, width, depth)),
      plgpu.SMEM((2, width), F32),
      _smem(2, stores, ROWS, 64),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )([x.arrays() for x in sums])
  for result in results:
    if "dot" in result:
      result["dot"] = jnp.sum(result["dot"], axis=0)
  return results


def out_width(*out_dims: int) -> int:
  """How many columns of the results a block of `combine` computes."""
  return next(
    w for w in range(256, 0, -64) if all(dim % w == 0 for dim in out_dims)
  )


def combine_buffers(width: int, depth: int) -> tuple[int, int]:
  """Buffers of the ring of `combine`, and those of a warpgroup's results."""
  stores = 2 if width <= 192 else 1
  left = SHARED_MEMORY - RESERVED - stores * 4 * ROWS * 64
  return min(left // (2 * depth * (BLOCK + width)), 8), stores


@dataclasses.dataclass(frozen=True)
class _Ring:
  """Buffers that one warpgroup fills by TMA and two read, in turn."""

  full: Any
  free: Any
  size: int

  def room(self, count):
    """The buffer for that count, once it is free."""
    slot = lax.rem(count, self.size)

    @pl.when(count >= self.size)
    def _wait():
      plgpu.barrier_wait(self.free.at[slot])

    return slot

  def fill(self, slot, source, target, together=None):
    """Starts a copy that will count for the buffer.

    Where `together` names an axis of the cluster, its blocks each copy a part
    for all of them.
    """
    plgpu.copy_gmem_to_smem(
      source, target, self.full.at[slot], collective_axes=together
    )

  def take(self, count):
    """The buffer of that count, once it is full."""
    slot = lax.rem(count, self.size)
    plgpu.barrier_wait(self.full.at[slot])
    return slot

  def release(self, count):
    plgpu.barrier_arrive(self.free.at[lax.rem(count, self.size)])


def _item(block, k, *, per_chunk: int, blocks: int, heads: int, chunks: int):
  """Row, head, chunk and place in it of the k-th item of a block.

  The items of a chunk follow each other, then those of the same tokens in other
  heads. They differ in work: a block must not meet the same place every time.
  """
  index = block + k * blocks
  index, place = index // per_chunk, lax.rem(index, per_chunk)
  lap = max(blocks // per_chunk, 1)
  place = lax.rem(place + index // lap, per_chunk)
  index, h = index // heads, lax.rem(index, heads)
  return index // chunks, h, lax.rem(index, chunks), place


def _copies(dim: int) -> list[tuple[int, int]]:
  """Starts and sizes of the copies of a vector of `dim` numbers."""
  return [
    (start, min(MAX_COPY, dim - start)) for start in range(0, dim, MAX_COPY)
  ]


def _smem(*shape: int):
  """Buffers of bfloat16 as wgmma and TMA want them: 128-byte swizzled."""
  transforms = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
  )
  return plgpu.SMEM(shape, BF16, transforms=transforms)


def _over_rows(x, rows):
  return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def _over_columns(x, columns):
  return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _iota(axis, interpret):
  shape = (ROWS, TOKENS)
  if interpret:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def _accumulate(y, x, add, interpret) -> Any:
  """y plus all products that `add` makes, and what `add` makes of x.

  Interpret mode knows no product into a given accumulator.
  """
  if interpret:
    products = [y]
    x = add(lambda a, b_ref: products.append(_multiply(a, b_ref)), x)
    return sum(products), x

  def run(refs):
    y_ref, x_ref = refs
    made = add(
      functools.partial(plgpu.wgmma, y_ref),
      None if x_ref is None else x_ref[...],
    )
    if x_ref is not None:
      x_ref[...] = made

  return pl.run_state(run)((plgpu.WGMMAAccumulatorRef.init(y), x))


def _stream(ring, step, steps, y, x, part, interpret) -> Any:
  """y plus the products of the next `steps` buffers of a ring.

  `part` makes one with the function it is given, of a buffer, its number and x,
  and returns the next x.

  Returns:
    y, x and the step after these.
  """

  def add(multiply, x):
    for j in range(steps):
      slot = ring.take(step + j)
      x = part(multiply, slot, j, x)
      if j:
        plgpu.wgmma_wait(1)
        ring.release(step + j - 1)
    return x

  y, x = _accumulate(y, x, add, interpret)
  ring.release(step + steps - 1)
  return y, x, step + steps


def _multiply(a, b_ref):
  a = a if isinstance(a, jax.Array) else a[...]
  return jnp.dot(a, b_ref[...], preferred_element_type=F32)


def _store(buffer_ref, x, target_ref, *, others=0):
  """Starts writing x, once all but `others` writes have left their buffers."""
  plgpu.wait_smem_to_gmem(others, wait_read_only=True)
  buffer_ref[...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer_ref, target_ref)
