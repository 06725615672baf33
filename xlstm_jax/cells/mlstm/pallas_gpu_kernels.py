"""The Hopper kernels of the mLSTM, in Pallas Mosaic GPU.

`scan_states` runs over chunks and keeps a tile of the matrix memory in
registers; `weigh` makes the weights of all pairs of tokens inside chunks;
`combine` sums values by these weights, and adds a read of the state between
chunks. The backward pass is the same three kernels with the operands
exchanged: `scan_states` backward in time gives the gradients of the states,
`weigh` those of the scores, and every gradient of q, k, v is a `combine`.

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

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.mlstm.lowered_once import lowered_once

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


@lowered_once("chunk", "interpret", "columns", "reverse", "save", "buffers")
def scan_states(
  k_BTHK: jax.Array,
  v_BTHV: jax.Array,
  write_BHT: jax.Array,
  write_n_BHT: jax.Array,
  keep_BHN: jax.Array,
  parts_BHN: jax.Array,
  C_BHSKV: jax.Array,
  n_BHSK: jax.Array,
  *,
  chunk: int,
  columns: int = 256,
  reverse: bool = False,
  save: bool = True,
  buffers: int = 3,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """C -> keep C + sum of write k v^T, n -> keep n + sum of write_n k.

  S independent spans of chunks run side by side, each from its own first
  state; `reverse` runs from the last chunk to the first. A block computes at
  most so many columns of C.

  Returns:
    With `save` the states that enter every chunk (else placeholders), and the
    states after every span, without `save` but the last. The first are n_BHNK
    and in bfloat16 C_BHPKV: N times C, then N times what rounding took from it,
    which is written only where `parts_BHN` is 2.
  """
  batch, time, heads, key_dim = k_BTHK.shape
  value_dim = v_BTHV.shape[-1]
  spans = C_BHSKV.shape[2]
  chunks = time // chunk
  span = chunks // spans
  tiles = chunk // TOKENS
  key_blocks, value_blocks = scan_blocks(key_dim, value_dim, columns)
  block_keys = key_dim // key_blocks
  workers = -(-block_keys // ROWS)
  # Of 96 keys 32 belong to both workers, who write the same.
  second = block_keys - ROWS
  width = value_dim // value_blocks
  steps = span * tiles
  # Two blocks of keys are a cluster: each loads half of the values for both.
  # Interpret mode knows no such copy.
  paired = key_blocks % 2 == 0 and not interpret

  def mlstm_states(
    k_ref, v_ref, w_ref, wn_ref, keep_ref, parts_ref, C0_ref, n0_ref,
    C_ref, n_ref, C_last_ref, n_last_ref,
    k_smem, v_smem, w_smem, wn_smem, C_smem, full, free,
  ):  # fmt: skip
    worker = lax.axis_index("worker")
    b, h, s = (lax.axis_index(name) for name in ("batch", "head", "span"))
    key_block = lax.axis_index("key")
    if paired:
      key_block = 2 * key_block + lax.axis_index("pair")
    k0 = key_block * block_keys
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
          (k_ref.at[b, tokens, h, pl.ds(k0, block_keys)], k_smem),
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
      keys = pl.ds(k0 + worker * second, ROWS)
      C_kv = plgpu.load(
        C0_ref.at[b, h, s, keys, values], layout=MATRIX, optimized=False
      )
      n_k = plgpu.load(n0_ref.at[b, h, s, keys], layout=ROW, optimized=False)

      def of_chunk(c):
        return keep_ref[b, h, place(c)], parts_ref[b, h, place(c)]

      def save_state(c, C_kv, n_k, parts):
        _store(
          C_smem.at[worker],
          C_kv.astype(BF16),
          C_ref.at[b, h, place(c), keys, values],
        )

        @pl.when(parts > 1)
        def _rest():
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          # 64 columns at a time, from what was rounded there: registers are
          # full.
          for start in range(0, width, 64):
            rounded_ref = C_smem.at[worker, :, pl.ds(start, 64)]
            rounded = plgpu.load(rounded_ref, layout=MATRIX).astype(F32)
            rest = C_kv[:, start : start + 64] - rounded
            rounded_ref[...] = rest.astype(BF16)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(
            C_smem.at[worker], C_ref.at[b, h, chunks + place(c), keys, values]
          )

        @pl.when(first)
        def _vector():
          n_ref.at[b, h, place(c), keys][...] = n_k

      def written(c, C_kv, n_k, operands):
        """The state with the chunk's tokens, their keys in 1 or 2 operands."""
        counts = [c * tiles + tile for tile in range(tiles)]

        def add(multiply, n_k):
          for tile, count in enumerate(counts):
            slot = ring.take(count)
            k_kl = plgpu.load(
              k_smem.at[slot, :, pl.ds(worker * second, ROWS)].transpose(
                (1, 0)
              ),
              layout=MATRIX,
            ).astype(F32)
            w_l = plgpu.load(w_smem.at[slot], layout=COLUMN)
            wn_l = plgpu.load(wn_smem.at[slot], layout=COLUMN)
            n_k = n_k + (k_kl * _over_rows(wn_l, ROWS)).sum(axis=1)
            wk_kl = k_kl * _over_rows(w_l, ROWS)
            rounded_kl = wk_kl.astype(BF16)
            if tile:  # its products ran while this operand was prepared
              plgpu.wgmma_wait(0)
              ring.release(counts[tile - 1])
            multiply(rounded_kl, v_smem.at[slot])
            if operands == 2:
              rest_kl = (wk_kl - rounded_kl.astype(F32)).astype(BF16)
              multiply(rest_kl, v_smem.at[slot])
          return n_k

        C_kv, n_k = _accumulate(C_kv, n_k, add, interpret)
        ring.release(counts[-1])
        return C_kv, n_k

      def one_chunk(c, carry):
        C_kv, n_k, keep, parts = carry
        # Read a chunk ahead, for memory answers late.
        keep_next, parts_next = of_chunk(jnp.minimum(c + 1, span - 1))
        if save:
          save_state(c, C_kv, n_k, parts)
        # What the last chunk leaves may be read by whatever follows.
        exact = (parts_next > 1) | (c == span - 1)
        C_kv, n_k = lax.cond(
          exact,
          functools.partial(written, operands=2),
          functools.partial(written, operands=1),
          *(c, C_kv * keep, n_k * keep),
        )
        return C_kv, n_k, keep_next, parts_next

      C_kv, n_k, *_ = lax.fori_loop(
        0, span, one_chunk, (C_kv, n_k, *of_chunk(0))
      )
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
      jax.ShapeDtypeStruct((batch, heads, 2 * saved, key_dim, value_dim), BF16),
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
      _smem(buffers, TOKENS, block_keys, tile=_tile(key_dim)),
      _smem(buffers, TOKENS, width),
      plgpu.SMEM((buffers, TOKENS), F32),
      plgpu.SMEM((buffers, TOKENS), F32),
      _smem(workers, ROWS, width if save else 64),
      plgpu.Barrier(num_arrivals=4, num_barriers=buffers),
      freed,
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )(
    k_BTHK, v_BTHV, write_BHT, write_n_BHT, keep_BHN, parts_BHN, C_BHSKV, n_BHSK
  )  # fmt: skip


@lowered_once("interpret")
def inner_products(
  x_BHPKV: jax.Array,
  y_BHPKV: jax.Array,
  x_parts_BHN: jax.Array,
  y_parts_BHN: jax.Array,
  *,
  interpret: Any = None,
) -> jax.Array:
  """The sum of x y over K and V, of states as `scan_states` writes them.

  Second parts are read where there are any, but their product is left out. XLA
  would always read them.
  """
  batch, heads, chunks = x_parts_BHN.shape
  size = math.prod(x_BHPKV.shape[3:])
  # Whole lines of memory, 16 bytes a thread.
  step, loads = 1024, 2
  layout = plgpu.Layout.WG_STRIDED((step,), vec_size=8)

  def mlstm_products(x_ref, y_ref, x_parts_ref, y_parts_ref, sums_ref):
    b, h, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    x_parts, y_parts = x_parts_ref[b, h, n], y_parts_ref[b, h, n]

    def load(ref, part, place):
      at = part * chunks + n
      x = plgpu.load(ref.at[b, h, at, place], layout=layout, optimized=False)
      return x.astype(F32)

    def pair_of_parts(pair, sums):
      second = jnp.minimum(pair, 1)
      x_part = jnp.where(pair == 1, x_parts - 1, 0)
      y_part = second - x_part

      def several(i, sums):
        for j in range(loads):
          place = pl.ds((i * loads + j) * step, step)
          sums += load(x_ref, x_part, place) * load(y_ref, y_part, place)
        return sums

      return lax.fori_loop(0, size // (loads * step), several, sums)

    zeros = plgpu.layout_cast(jnp.zeros((step,), F32), layout)
    sums_ref.at[b, h, n][...] = lax.fori_loop(
      0, x_parts + y_parts - 1, pair_of_parts, zeros
    )

  sums = plgpu.kernel(
    mlstm_products,
    out_type=jax.ShapeDtypeStruct((batch, heads, chunks, step), F32),
    grid=(chunks, heads, batch),
    grid_names=("chunk", "head", "batch"),
    compiler_params=_COMPILER,
    interpret=interpret,
  )(
    x_BHPKV.reshape(*x_BHPKV.shape[:3], -1),
    y_BHPKV.reshape(*y_BHPKV.shape[:3], -1),
    x_parts_BHN,
    y_parts_BHN,
  )
  return jnp.sum(sums, axis=-1)


def scan_blocks(key_dim: int, value_dim: int, columns: int) -> tuple[int, int]:
  """Into how many blocks `scan_states` splits the keys and values of a head.

  A block has 64, 96 or 128 keys.
  """
  block_keys = key_dim if key_dim < BLOCK else math.gcd(key_dim, BLOCK)
  width = out_width(columns, value_dim)
  return key_dim // block_keys, value_dim // width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalizer:
  """Divides weights, by max(|u|, floor) + extra, before they are rounded.

  u_x is the sum of the weights of x. Without `normalize` the floor divides.
  """

  floor_BHT: jax.Array
  extra_BHT: jax.Array
  normalize: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cotangents:
  """Of h, and of u (bias_z inverse_z), if inverse_z multiplied for reader z."""

  v_BTHV: jax.Array
  dh_BTHV: jax.Array
  bias_BHT: jax.Array
  inverse_BHT: jax.Array


@lowered_once("chunk", "interpret", "blocks")
def weigh(
  a_BTHK: jax.Array,
  b_BTHK: jax.Array,
  vector_BHNK: jax.Array,
  *,
  row_BHT: Sequence[jax.Array],
  column_BHT: Sequence[jax.Array],
  past_BHT: jax.Array,
  border_BT: jax.Array,
  to: Normalizer | Cotangents,
  chunk: int,
  blocks: int = 132,
  interpret: Any = None,
) -> dict[str, jax.Array]:
  """The weights of all pairs of tokens of a chunk, (a_x b_z) exp(row + column).

  With a normaliser x reads z, which comes before it or is itself, if not before
  `border_x`. With cotangents it is the other way round: x writes, and z, after
  it up to `border_x` or itself, reads.

  Returns:
    "pairs" in bfloat16, of x and the place of z in its chunk: where no z of a
    block of 128 is visible they are not written. With a normaliser they are the
    weights of h: divided. With cotangents they are the gradients of the scores,
    (v_x dh_z + bias_z) inverse_z exp(row + column).
    With a normaliser also the "inverse" of what divides, "past" times it, and
    "sign", that of u where it divides, else 0; u_x is the sum of the weights
    and past_x (a_x vector). With cotangents "dot", the sum of the divided
    weights times bias_z, and past_x (a_x vector).
  """
  batch, time, heads, key_dim = a_BTHK.shape
  chunks, tiles = time // chunk, chunk // BLOCK
  backward = isinstance(to, Cotangents)
  normalize = isinstance(to, Normalizer) and to.normalize
  items = batch * heads * chunks * tiles
  blocks = min(blocks, items)
  stages = 5
  inputs = {
    "vector": vector_BHNK,
    "past": past_BHT,
    "border": border_BT,
  }
  rows, columns = [a_BTHK], [b_BTHK]
  if isinstance(to, Cotangents):
    inputs |= {"bias": to.bias_BHT, "inverse": to.inverse_BHT}
    rows, columns = [*rows, to.v_BTHV], [*columns, to.dh_BTHV]
    of_columns = ("bias", "inverse")
    of_tokens = ("dot",)
  else:
    inputs |= {"floor": to.floor_BHT, "extra": to.extra_BHT}
    of_columns = ()
    of_tokens = ("sign", "inverse", "past")

  def mlstm_weights(
    refs, row_refs, column_refs, x_refs, z_refs, out_refs,
    x_smem, z_smem, vector_smem, column_smem, pair_smem,
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
            slot, refs["vector"].at[b, h, n, place], vector_smem.at[slot, place]
          )

        def tile(c, counts):
          step, column = counts
          z_tokens = pl.ds(t0 + c * BLOCK, BLOCK)
          slot = column_ring.room(column)
          sources = [*column_refs, *(refs[name] for name in of_columns)]
          for i, source in enumerate(sources):
            column_ring.fill(
              slot, source.at[b, h, z_tokens], column_smem.at[slot, i]
            )
          for x_ref, z_ref in zip(x_refs, z_refs, strict=True):
            for start, _ in _parts(x_ref.shape[-1], 64):
              place = pl.ds(start, 64)
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
          place = place or (b, h)
          return plgpu.load(
            ref.at[*place, x_tokens], layout=ROW, optimized=False
          )

        row_x = [of_rows(ref) for ref in row_refs]
        # Counted from the first column of the row tile's own block.
        border_x = of_rows(refs["border"], b) - r * BLOCK
        past_x = of_rows(refs["past"])
        vector_slot = item_ring.take(k)

        def scores(step, dim, dot_x=None):
          """a b^T over `dim` numbers, and with dot_x a times the vector."""

          parts = _parts(dim, 64)

          def part(multiply, slot, j, dot_x):
            start, new = parts[j]
            x_ref = x_smem.at[slot, half, new]
            multiply(x_ref, z_smem.at[slot, :, new].transpose((1, 0)))
            if dot_x is None:
              return None
            part_xk = plgpu.load(x_ref, layout=MATRIX).astype(F32)
            place = pl.ds(start + new.start, new.size)
            n_k = plgpu.load(vector_smem.at[vector_slot, place], layout=COLUMN)
            return dot_x + (part_xk * _over_rows(n_k, ROWS)).sum(axis=1)

          zeros = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), F32), MATRIX)
          return _stream(ring, step, len(parts), zeros, dot_x, part, interpret)

        def save(pairs, c, start, stored):
          place = pl.ds(c * BLOCK + start, 64)
          _store(
            pair_smem.at[worker, stored % 2],
            pairs.astype(BF16),
            out_refs["pairs"].at[b, h, x_tokens, place],
            others=1,
          )

        def visit(c, carry, *, diagonal):
          """All pairs with a tile. With a normaliser it returns the weights."""
          step, column, sum_x = carry
          if diagonal:
            s_xz, sum_x, step = scores(step, key_dim, sum_x)
            sum_x = sum_x * past_x
            item_ring.release(k)
          else:
            s_xz, _, step = scores(step, key_dim)
          slot = column_ring.take(column)
          last_x = border_x + (r - c) * BLOCK

          def of_column(i, start):
            z_k = plgpu.load(
              column_smem.at[slot, i, pl.ds(start, 64)], layout=COLUMN
            )
            return _over_rows(z_k, ROWS)

          weights, factors = [], []
          for start in (0, 64):
            log_w = [
              _over_columns(row_x[i], 64) + of_column(i, start)
              for i in range(2)
            ]
            z = _iota(1, interpret) + start
            border = _over_columns(last_x, 64)
            visible = z <= border if backward else z >= border
            if diagonal:
              x = _iota(0, interpret) + worker * ROWS
              visible = visible & ((z >= x) if backward else (z <= x))
            w_xz = jnp.exp(jnp.where(visible, log_w[0] + log_w[1], -jnp.inf))
            if backward:
              w_xz = w_xz * of_column(3, start)
              factors.append(w_xz)
            s_w = s_xz[:, start : start + 64] * w_xz
            if backward:
              s_w = s_w * of_column(2, start)
            else:
              weights.append(s_w)
            sum_x = sum_x + s_w.sum(axis=1)
          if backward:
            g_xz, _, step = scores(step, columns[1].shape[-1])
            for i, start in enumerate((0, 64)):
              part_xz = g_xz[:, start : start + 64] + of_column(2, start)
              save(part_xz * factors[i], c, start, i)
          column_ring.release(column)
          return (step, column + 1, sum_x), weights

        zeros_x = plgpu.layout_cast(jnp.zeros((ROWS,), F32), ROW)
        carry, weights = visit(r, (*counts, zeros_x), diagonal=True)
        if isinstance(to, Cotangents):
          first, count = others(r)
          step, column, sum_x = lax.fori_loop(
            first,
            first + count,
            lambda c, carry: visit(c, carry, diagonal=False)[0],
            carry,
          )
          out_refs["dot"].at[b, h, x_tokens][...] = sum_x
          return step, column

        def normalized(carry, parts):
          """Writes the weights of a row tile, whose sums are whole only now."""
          step, column, u_x = carry
          size_x, sign_x = of_rows(refs["floor"]), zeros_x
          if normalize:
            free_x = jnp.abs(u_x) > size_x
            one_x = jnp.where(u_x > 0, jnp.ones_like(u_x), -jnp.ones_like(u_x))
            sign_x = jnp.where(free_x, one_x, sign_x)
            size_x = jnp.where(free_x, jnp.abs(u_x), size_x)
            size_x = size_x + of_rows(refs["extra"])
          inverse_x = 1 / size_x
          for c, weights in parts:
            for i, s_w in enumerate(weights):
              save(s_w * _over_columns(inverse_x, 64), c, i * 64, i)
          out_refs["sign"].at[b, h, x_tokens][...] = sign_x
          out_refs["inverse"].at[b, h, x_tokens][...] = inverse_x
          out_refs["past"].at[b, h, x_tokens][...] = past_x * inverse_x
          return step, column

        # A chunk has at most two tiles: registers hold no more weights.
        def with_first_tile():
          whole, before = visit(0, carry, diagonal=False)
          return normalized(whole, [(r, weights), (0, before)])

        def alone():
          return normalized(carry, [(r, weights)])

        return (
          alone() if tiles == 1 else lax.cond(r > 0, with_first_tile, alone)
        )

      lax.fori_loop(0, mine, item, (jnp.int32(0), jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

  tokens_type = jax.ShapeDtypeStruct(past_BHT.shape, F32)
  outputs = {
    "pairs": jax.ShapeDtypeStruct((batch, heads, time, chunk), BF16),
    **dict.fromkeys(of_tokens, tokens_type),
  }
  (results,) = plgpu.kernel(
    mlstm_weights,
    out_type=(outputs,),
    grid=(blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="worker",
    scratch_types=(
      _smem(stages, BLOCK, 64, tile=_tile(key_dim)),
      _smem(stages, BLOCK, 64, tile=_tile(key_dim)),
      plgpu.SMEM((2, key_dim), F32),
      plgpu.SMEM((2, 2 + len(of_columns), BLOCK), F32),
      _smem(2, 2, ROWS, 64),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2 + len(of_columns), num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=len(_copies(key_dim)), num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )(inputs, row_BHT, column_BHT, rows, columns)
  return results


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
  """y_x = past_x a_x state + the sum over z of w_xz c_z.

  The state is the sum of its parts, as `scan_states` writes them.

  z runs over the tokens of the chunk that x sees: in "h" and "dq" those up to
  its block of 128, in "dk" and "dv" those from there on. The state is
  transposed in "dq" and "dk", which have the vector added to a_x state, "dq"
  bias_x times it. In "dq" and "dv" w has z first.

  Attributes:
    partner: in "dk" and "dv" y_x partner_x is wanted, too, from y before it is
      rounded, in "dk" of the part from the state alone.
    low: whether what rounding took from y is wanted, too; see `exact`.
  """

  mode: Literal["h", "dq", "dk", "dv"] = dataclasses.field(
    metadata={"static": True}
  )
  a_BTHA: jax.Array
  state_BHPAO: jax.Array
  parts_BHN: jax.Array
  w_BHTZ: jax.Array
  c_BTHO: jax.Array
  past_BHT: jax.Array
  bias_BHT: jax.Array | None = None
  vector_BHNO: jax.Array | None = None
  partner_BTHO: jax.Array | None = None
  low: bool = dataclasses.field(default=False, metadata={"static": True})

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
      "state": self.state_BHPAO,
      "w": self.w_BHTZ,
      "c": self.c_BTHO,
      "past": self.past_BHT,
      "bias": self.bias_BHT,
      "vector": self.vector_BHNO,
      "partner": self.partner_BTHO,
    }
    return {name: x for name, x in values.items() if x is not None}

  def results(self, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What it writes, if a block computes `width` columns."""
    *rows, out_dim = self.c_BTHO.shape
    tiles = out_dim // width
    results = {"y": jax.ShapeDtypeStruct((*rows, out_dim), BF16)}
    if self.low:
      low_dim = tiles * -(-width // BLOCK) * 64
      results["low"] = jax.ShapeDtypeStruct((*rows, low_dim), BF16)
    if self.later:
      results["dot"] = jax.ShapeDtypeStruct((tiles, *self.past_BHT.shape), F32)
    return results


@lowered_once("chunk", "interpret", "columns", "blocks")
def combine(
  sums: Sequence[Sum],
  *,
  chunk: int,
  columns: int = 256,
  blocks: int = 132,
  interpret: Any = None,
) -> list[dict[str, jax.Array]]:
  """All sums in one kernel: what they read together comes from memory once.

  The blocks take them from chunk after chunk, at most so many columns of a
  result at a time, so that those of a chunk run at about the same time.

  Returns:
    For every sum "y" in bfloat16, and what it wants of "dot" and "low", which
    is packed (`exact`).
  """
  batch, time, heads, _ = sums[0].a_BTHA.shape
  width = out_width(columns, *(x.c_BTHO.shape[-1] for x in sums))
  chunks, row_tiles = time // chunk, chunk // BLOCK
  out_tiles = [x.c_BTHO.shape[-1] // width for x in sums]
  ends = list(itertools.accumulate(row_tiles * tiles for tiles in out_tiles))
  items = batch * heads * chunks * ends[-1]
  blocks = min(blocks, items)
  dims = [width, *(x.a_BTHA.shape[-1] for x in sums)]
  depth = BLOCK if all(dim % BLOCK == 0 for dim in dims) else 64
  per_block = BLOCK // depth
  tile = _tile(*dims)
  stages, stores = combine_buffers(width, depth)

  def mlstm_sums(
    inputs, parts_ref, outputs, a_smem, c_smem, vector_smem, y_smem, full,
    free, item_full, item_free,
  ):  # fmt: skip
    a_smem, across_smem = a_smem
    c_smem, across_state_smem = c_smem
    worker, block = lax.axis_index("worker"), lax.axis_index("block")
    mine = (items - block + blocks - 1) // blocks
    ring = _Ring(full, free, stages)
    vector_ring = _Ring(item_full, item_free, 2)

    def find(k):
      """Row, head, chunk, the number of the sum, and the place in its chunk."""
      b, h, n, place = _item(
        block,
        k,
        per_chunk=ends[-1],
        blocks=blocks,
        heads=heads,
        chunks=chunks,
      )
      which = sum((place >= end).astype(jnp.int32) for end in ends[:-1])
      return b, h, n, which, place

    def parts_of(k):
      b, h, n, which, _ = find(k)
      return parts_ref[b, h, n, which]

    def each_item(run, counts):
      """Runs all items of this block, each as its sum wants it."""

      def item(k, carry):
        parts, counts = carry
        # Read an item ahead, for memory answers late.
        parts_next = parts_of(jnp.minimum(k + 1, mine - 1))
        b, h, n, which, place = find(k)

        def branch(i):
          def of_sum(counts):
            first = ends[i - 1] if i else 0
            r = (place - first) // out_tiles[i]
            o = lax.rem(place - first, out_tiles[i])
            return run(i, (b, h, n, r, o), parts, counts)

          return of_sum

        branches = [branch(i) for i in range(len(sums))]
        if len(sums) == 1:
          return parts_next, branches[0](counts)
        return parts_next, lax.switch(which, branches, counts)

      lax.fori_loop(0, mine, item, (parts_of(0), counts))

    def seen(x, r):
      """The first block of tokens that a row tile sees, and the end."""
      return (r, row_tiles) if x.later else (0, r + 1)

    @pl.when(worker == 2)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load(i, item, parts, counts):
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

        def state(part, step):
          for start, _ in _parts(x.a_BTHA.shape[-1], depth):
            slot = ring.room(step)
            shared = pl.ds(start, depth)
            place = (columns, shared) if x.transposed else (shared, columns)
            target = across_state_smem if x.transposed else c_smem
            ring.fill(slot, refs["a"].at[b, rows, h, shared], a_smem.at[slot])
            ring.fill(
              slot,
              refs["state"].at[b, h, part * chunks + n, *place],
              target.at[slot],
            )
            step += 1
          return step

        step = lax.fori_loop(0, parts, state, step)

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

        def pairs(z, step):
          slot = ring.room(step)
          tokens = pl.ds(t0 + z * depth, depth)
          if x.mode in ("dq", "dv"):
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
        step = lax.fori_loop(per_block * first, per_block * end, pairs, step)
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
        for start, new in _parts(width, 64):
          place = slice(start + new.start, start + 64)
          other = plgpu.load(partner_ref.at[:, place], layout=MATRIX)
          dot_x = dot_x + (y[:, place] * other.astype(F32)).sum(axis=1)
        for part in range(per_block):
          ring.release(step + part)
        return dot_x, step + per_block

      def compute(i, item, state_parts, counts):
        x, refs, out_refs = sums[i], inputs[i], outputs[i]
        b, h, n, r, o = item
        step, vectors = counts
        rows = pl.ds(n * chunk + r * BLOCK + worker * ROWS, ROWS)
        parts = _parts(x.a_BTHA.shape[-1], depth)

        def of_rows(ref):
          return plgpu.load(ref.at[b, h, rows], layout=ROW, optimized=False)

        past_x = of_rows(refs["past"])
        bias_x = of_rows(refs["bias"]) if x.mode == "dq" else None

        def read_state(multiply, slot, j, none):
          _, new = parts[j]
          if x.transposed:
            state = across_state_smem.at[slot, :, new].transpose((1, 0))
          else:
            state = c_smem.at[slot, new]
          multiply(a_smem.at[slot, half, new], state)

        def part_of_state(_, carry):
          step, y = carry
          y, _, step = _stream(
            ring, step, len(parts), y, None, read_state, interpret
          )
          return step, y

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), F32), MATRIX)
        step, y = lax.fori_loop(0, state_parts, part_of_state, (step, zeros))
        if x.transposed:
          slot = vector_ring.take(vectors)
          vector = _over_rows(
            plgpu.load(vector_smem.at[slot], layout=COLUMN), ROWS
          )
          if bias_x is not None:
            vector = vector * _over_columns(bias_x, width)
          y = y + vector
          vector_ring.release(vectors)
          vectors += 1
        y = y * _over_columns(past_x, width)
        dot_x = None
        if x.mode == "dk":
          dot_x, step = partner_product(y, step)

        def weigh_values(multiply, slot, j, none):
          if x.mode in ("dq", "dv"):
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
        if x.mode == "dv":
          dot_x, step = partner_product(y, step)
        if x.later:
          out_refs["dot"].at[o, b, h, rows][...] = dot_x

        stored = 0

        def save(x, target_ref, start):
          nonlocal stored
          _store(
            y_smem.at[worker, stored % stores],
            x,
            target_ref.at[b, rows, h, pl.ds(start, 64)],
            others=stores - 1,
          )
          stored += 1

        for pair in range(0, width, BLOCK):
          rests = []
          for start, _ in _parts(min(BLOCK, width - pair), 64):
            start += pair
            part = y[:, start : start + 64]
            rounded = part.astype(BF16)
            save(rounded, out_refs["y"], o * width + start)
            if x.low:
              rests.append(_rest(part, rounded))
          if x.low:
            start = (o * -(-width // BLOCK) + pair // BLOCK) * 64
            save(_packed(rests), out_refs["low"], start)
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
      plgpu.RefUnion(
        _smem(stages, BLOCK, depth, tile=tile),
        _smem(stages, depth, BLOCK, tile=tile),
      ),
      plgpu.RefUnion(
        _smem(stages, depth, width, tile=tile),
        _smem(stages, width, depth, tile=tile),
      ),
      plgpu.SMEM((2, width), F32),
      _smem(2, stores, ROWS, 64, tile=tile),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )([x.arrays() for x in sums], jnp.stack([x.parts_BHN for x in sums], axis=-1))
  for result in results:
    if "dot" in result:
      result["dot"] = jnp.sum(result["dot"], axis=0)
    if "low" in result:
      # No number of bfloat16: nobody shall handle it as one.
      result["low"] = lax.bitcast_convert_type(result["low"], jnp.int16)
  return results


def exact(y: jax.Array, low: jax.Array, *, width: int) -> jax.Array:
  """What `combine` rounded to y, in float32 that ends in 8 bits of zeros.

  `width` is how many columns a block computed.
  """
  *rows, out_dim = y.shape
  packed = low.astype(jnp.int32)
  packed = packed.reshape(*rows, out_dim // width, -1, 1, 64)
  shift = jnp.array([24, 16], jnp.int32)[:, None]
  rests = lax.shift_right_arithmetic(packed << shift, 24)
  rests = rests.reshape(*rows, out_dim // width, -1)[..., :width]
  bits = lax.bitcast_convert_type(y, jnp.int16).astype(jnp.int32) << 16
  bits += rests.reshape(y.shape) << 8
  return lax.bitcast_convert_type(bits, F32)


def _rest(x, rounded):
  """The bits of float32 x less those of rounded x, in 256ths, 8 of them."""
  bits = [
    lax.bitcast_convert_type(y, jnp.int32) for y in (x, rounded.astype(F32))
  ]
  return jnp.minimum((bits[0] - bits[1] + 128) >> 8, 127)


def _packed(rests):
  """One or two integers of 8 bits, in bfloat16 of the same 16 bits."""
  low = rests[0] & 255
  if len(rests) == 2:
    low = low | (rests[1] << 8)
  return lax.bitcast_convert_type(low.astype(jnp.int16), BF16)


def out_width(columns: int, *out_dims: int) -> int:
  """How many of its result's columns a block computes, at most `columns`.

  Results of all these dimensions, multiples of 64 or else of 32, are cut into
  such parts.
  """
  widths = range(columns, 0, -_tile(*out_dims))
  return next(w for w in widths if all(dim % w == 0 for dim in out_dims))


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


def _parts(dim: int, size: int) -> list[tuple[int, pl.Slice]]:
  """Starts of parts of `size` of `dim` numbers, and what is new in each.

  The last part begins in the one before where `size` does not divide `dim`: a
  copy fills its buffer.
  """
  parts = []
  for end in range(0, dim, size):
    start = min(end, dim - size)
    parts.append((start, pl.ds(end - start, start + size - end)))
  return parts


def _tile(*dims: int) -> int:
  """Columns of the tiles in which TMA copies arrays with so many."""
  return 64 if all(dim % 64 == 0 for dim in dims) else 32


def _smem(*shape: int, tile: int = 64):
  """Buffers of bfloat16 as wgmma and TMA want them: in swizzled tiles."""
  transforms = (
    plgpu.TilingTransform((8, tile)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(2 * tile),  # pyright: ignore[reportAbstractUsage]
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
