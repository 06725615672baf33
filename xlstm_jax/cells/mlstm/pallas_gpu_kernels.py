"""The two Hopper kernels of the mLSTM, in Pallas Mosaic GPU.

`scan_states` runs over chunks and keeps a tile of the matrix memory in
registers; `attend` is masked attention inside chunks plus a read of the state
between them. The backward pass is the same two kernels with the operands
exchanged: `scan_states` backward in time gives the gradients of the states,
and every gradient of q, k, v is an `attend`.

Each block is two computing warpgroups of 64 rows and one that loads tiles
through TMA into rings of buffers, ahead of the computation. The kernels move
tiles of 64 tokens: a chunk is a multiple of 128.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32, BF16 = jnp.float32, jnp.bfloat16
ROWS = 64  # of a warpgroup's matrix product
TOKENS = 64  # of a tile
MAX_COPY = 256  # numbers that TMA copies along a dimension
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
_COMPILER = plgpu.CompilerParams(approx_math=True)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Block sizes of `attend`; smaller ones need less shared memory.

  Attributes:
    keys: columns of a buffer for the operand that scores are made with.
    values: columns of a buffer for the operand that is summed, and of a state.
    outputs: columns of the result that one block computes.
    key_buffers: how many of the first.
    value_buffers: how many of the second.
    stages: buffers through which results leave; 0 writes from registers.
  """

  keys: int
  values: int
  outputs: int
  key_buffers: int
  value_buffers: int
  stages: int


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
    n_BHNK (else placeholders), and the states after every span.
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

  def body(
    k_ref, v_ref, w_ref, wn_ref, keep_ref, C0_ref, n0_ref,
    C_ref, n_ref, C_last_ref, n_last_ref,
    k_smem, v_smem, w_smem, wn_smem, C_smem, full, free,
  ):  # fmt: skip
    worker = lax.axis_index("worker")
    b, h, s = (lax.axis_index(name) for name in ("batch", "head", "span"))
    k0 = lax.axis_index("key") * (ROWS * workers)
    values = pl.ds(lax.axis_index("value") * width, width)
    first = lax.axis_index("value") == 0

    def place(chunk_index):
      position = s * span + chunk_index
      return chunks - 1 - position if reverse else position

    @pl.when(worker == workers)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load(step, _):
        slot = lax.rem(step, buffers)

        @pl.when(step >= buffers)
        def _wait():
          plgpu.barrier_wait(free.at[slot])

        t0 = place(step // tiles) * chunk + lax.rem(step, tiles) * TOKENS
        tokens = pl.ds(t0, TOKENS)
        for source, target in (
          (k_ref.at[b, tokens, h, pl.ds(k0, ROWS * workers)], k_smem),
          (v_ref.at[b, tokens, h, values], v_smem),
          (w_ref.at[b, h, tokens], w_smem),
          (wn_ref.at[b, h, tokens], wn_smem),
        ):
          plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

      lax.fori_loop(0, span * tiles, load, None)

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
            slot = lax.rem(count, buffers)
            plgpu.barrier_wait(full.at[slot])
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
              plgpu.barrier_arrive(free.at[lax.rem(counts[tile - 1], buffers)])
            multiply(wk_kl, v_smem.at[slot])
          return n_k

        C_kv, n_k = _accumulate_with(C_kv * keep, n_k * keep, add, interpret)
        plgpu.barrier_arrive(free.at[lax.rem(counts[-1], buffers)])
        return C_kv, n_k

      C_kv, n_k = lax.fori_loop(0, span, one_chunk, (C_kv, n_k))
      C_last_ref.at[b, h, s, keys, values][...] = C_kv

      @pl.when(first)
      def _last():
        n_last_ref.at[b, h, s, keys][...] = n_k

      plgpu.wait_smem_to_gmem(0)

  saved = chunks if save else 1
  return plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((batch, heads, saved, key_dim, value_dim), BF16),
      jax.ShapeDtypeStruct((batch, heads, saved, key_dim), F32),
      jax.ShapeDtypeStruct(C_BHSKV.shape, F32),
      jax.ShapeDtypeStruct(n_BHSK.shape, F32),
    ),
    grid=(value_blocks, key_blocks, heads, batch, spans),
    grid_names=("value", "key", "head", "batch", "span"),
    num_threads=workers + 1,
    thread_name="worker",
    scratch_types=(
      _smem(buffers, TOKENS, ROWS * workers),
      _smem(buffers, TOKENS, width),
      plgpu.SMEM((buffers, TOKENS), F32),
      plgpu.SMEM((buffers, TOKENS), F32),
      _smem(workers, ROWS, width if save else 64),
      plgpu.Barrier(num_arrivals=4, num_barriers=buffers),
      plgpu.Barrier(num_arrivals=workers, num_barriers=buffers),
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


def attend(
  mode: Literal["h", "dq", "dk", "dv"],
  a_BTHA: jax.Array,
  b_BTHA: jax.Array,
  c_BTHO: jax.Array,
  state_BHN: jax.Array,
  vector_BHNK: jax.Array,
  *,
  row_BH2T: jax.Array,
  column_BH2T: jax.Array,
  past_BHT: jax.Array,
  border_BT: jax.Array,
  bias_BHT: jax.Array | None = None,
  floor_BHT: jax.Array | None = None,
  extra_BHT: jax.Array | None = None,
  partner_BTHO: jax.Array | None = None,
  chunk: int,
  tiles: Tiles,
  normalize: bool = True,
  low: bool = False,
  blocks: int = 132,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """y_x = sum over z of (a_x b_z + bias) exp(row_x + column_z) c_z + past.

  z runs over the tokens of the chunk that x sees: in "h" and "dq" those
  before it, in "dk" and "dv" those after it, up to `border`, and itself. The
  past is past_x a_x state; in "dq" and "dk", where the state is transposed
  and the bias (of the reader, so x in "dq" and z in "dk") belongs to the
  normaliser, also past_x bias_x vector and past_x vector.

  In "h" the result is divided by max(|u|, floor) + extra with u the sum of
  the weights.

  Returns:
    y in bfloat16. In "h" u; in "dv" y_x partner_x, from y before it is
    rounded, plus the sum of (a_x b_z) exp(row_x + column_z) bias_z and past_x
    a_x vector, which is the gradient of the input gate; in "dk" the past's
    part of that, which is the past of y times partner_x. With `low` what
    rounding took from y.
  """
  batch, time, heads, dim = a_BTHA.shape
  out_dim = c_BTHO.shape[-1]
  reverse = mode in ("dk", "dv")
  transposed = mode in ("dq", "dk")
  chunks, row_tiles, col_tiles = time // chunk, chunk // 128, chunk // TOKENS
  key_parts = dim // tiles.keys
  parts = tiles.outputs // tiles.values
  out_tiles = out_dim // tiles.outputs
  items = batch * heads * chunks * row_tiles * out_tiles
  blocks = min(blocks, items)
  lap = max(blocks // (row_tiles * out_tiles), 1)
  has_bias, has_sums = mode != "h", not transposed
  has_partner = mode in ("dk", "dv")
  ahead = tiles.key_buffers >= key_parts  # a first key tile fits in the ring
  vector_dim = tiles.outputs if transposed else dim
  vector_parts = [
    (start, min(MAX_COPY, vector_dim - start))
    for start in range(0, vector_dim, MAX_COPY)
  ]

  def decode(index):
    o, index = lax.rem(index, out_tiles), index // out_tiles
    r, index = lax.rem(index, row_tiles), index // row_tiles
    # Row tiles differ in work: a block must not meet the same one every time.
    r = lax.rem(r + index // lap, row_tiles)
    n, index = lax.rem(index, chunks), index // chunks
    return index // heads, lax.rem(index, heads), n, r, o

  def columns(r):
    """How many column tiles a row tile sees, and which one the i-th is.

    Those on the diagonal come last.
    """
    if reverse:
      return col_tiles - 2 * r, lambda i: col_tiles - 1 - i
    return 2 * r + 2, lambda i: i

  def body(
    a_ref, b_ref, c_ref, state_ref, vector_ref,
    row_ref, column_ref, past_ref, border_ref, bias_ref, floor_ref, extra_ref,
    partner_ref, y_ref, u_ref, low_ref,
    a_smem, b_smem, c_smem, y_smem, vector_smem,
    row_smem, column_smem, past_smem, border_smem, bias_smem, floor_smem,
    extra_smem, a_full, a_free, b_full, b_free, c_full, c_free,
  ):  # fmt: skip
    c_smem, state_smem = c_smem if transposed else (c_smem, c_smem)
    worker = lax.axis_index("worker")
    block = lax.axis_index("block")
    mine = (items - block + blocks - 1) // blocks

    def output_columns(o, part):
      return pl.ds(o * tiles.outputs + part * tiles.values, tiles.values)

    @pl.when(worker == 2)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def put(source, ring, count, full, free, size):
        slot = lax.rem(count, size)

        @pl.when(count >= size)
        def _wait():
          plgpu.barrier_wait(free.at[slot])

        plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])
        return count + 1

      def put_key(source, count):
        return put(source, b_smem, count, b_full, b_free, tiles.key_buffers)

      def put_value(source, count, ring):
        return put(source, ring, count, c_full, c_free, tiles.value_buffers)

      def item(k, counts):
        nb, nc = counts
        b, h, n, r, o = decode(block + k * blocks)
        t0 = n * chunk

        rows, every = pl.ds(t0 + r * 128, 128), pl.ds(t0, chunk)
        halves = [pl.ds(t0 + r * 128 + w * ROWS, ROWS) for w in range(2)]
        count, column = columns(r)

        def put_keys(i, nb):
          tokens = pl.ds(t0 + column(i) * TOKENS, TOKENS)
          for part in range(key_parts):
            place = pl.ds(part * tiles.keys, tiles.keys)
            nb = put_key(b_ref.at[b, tokens, h, place], nb)
          return nb

        if ahead:
          nb = put_keys(0, nb)

        @pl.when(k > 0)
        def _wait():
          plgpu.barrier_wait(a_free)

        for half in range(2):
          plgpu.copy_gmem_to_smem(
            a_ref.at[b, halves[half], h], a_smem.at[half], a_full
          )
        plgpu.copy_gmem_to_smem(border_ref.at[b, rows], border_smem, a_full)
        plgpu.copy_gmem_to_smem(row_ref.at[b, h, :, rows], row_smem, a_full)
        plgpu.copy_gmem_to_smem(
          column_ref.at[b, h, :, every], column_smem, a_full
        )
        vectors = [(past_ref, past_smem, rows)]
        if has_bias:
          vectors.append((bias_ref, bias_smem, rows if mode == "dq" else every))
        if mode == "h":
          vectors += [
            (floor_ref, floor_smem, rows),
            (extra_ref, extra_smem, rows),
          ]
        for source, target, tokens in vectors:
          plgpu.copy_gmem_to_smem(source.at[b, h, tokens], target, a_full)
        first = o * tiles.outputs if transposed else 0
        for start, size in vector_parts:
          plgpu.copy_gmem_to_smem(
            vector_ref.at[b, h, n, pl.ds(first + start, size)],
            vector_smem.at[pl.ds(start, size)],
            a_full,
          )
        for j in range(dim // 64):
          for part in range(parts):
            place = (pl.ds(j * 64, 64), output_columns(o, part))
            place = place[::-1] if transposed else place
            nc = put_value(state_ref.at[b, h, n, *place], nc, state_smem)

        def tile(i, counts):
          nb, nc = counts
          if ahead:
            nb = lax.cond(i + 1 < count, put_keys, lambda _, nb: nb, i + 1, nb)
          else:
            nb = put_keys(i, nb)
          tokens = pl.ds(t0 + column(i) * TOKENS, TOKENS)
          for part in range(parts):
            place = output_columns(o, part)
            nc = put_value(c_ref.at[b, tokens, h, place], nc, c_smem)
          return nb, nc

        def partner(nc):
          for half in range(2):
            for part in range(parts):
              place = output_columns(o, part)
              nc = put_value(
                partner_ref.at[b, halves[half], h, place], nc, c_smem
              )
          return nc

        if mode == "dk":
          nc = partner(nc)
        nb, nc = lax.fori_loop(0, count, tile, (nb, nc))
        if mode == "dv":
          nc = partner(nc)
        return nb, nc

      lax.fori_loop(0, mine, item, (jnp.int32(0), jnp.int32(0)))

    @pl.when(worker < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      a_xa = a_smem.at[worker]

      def take(count, full, size):
        slot = lax.rem(count, size)
        plgpu.barrier_wait(full.at[slot])
        return slot

      def take_value(count):
        return take(count, c_full, tiles.value_buffers)

      def release(count, free, size):
        plgpu.barrier_arrive(free.at[lax.rem(count, size)])

      def release_key(count):
        release(count, b_free, tiles.key_buffers)

      def release_value(count):
        release(count, c_free, tiles.value_buffers)

      def scores(nb):
        """a b^T, and the count of key buffers after it."""

        def add(multiply):
          for part in range(key_parts):
            slot = take(nb + part, b_full, tiles.key_buffers)
            place = pl.ds(part * tiles.keys, tiles.keys)
            multiply(a_xa.at[:, place], b_smem.at[slot].transpose((1, 0)))
            if part:
              plgpu.wgmma_wait(1)
              release_key(nb + part - 1)

        s_xz = _accumulate(add, (ROWS, TOKENS), interpret)
        release_key(nb + key_parts - 1)
        return s_xz, nb + key_parts

      def partner_product(y, nc):
        """Every row of y times that of its partner."""
        dot_x = plgpu.layout_cast(jnp.zeros((ROWS,), F32), ROW)
        for half in range(2):
          for part in range(parts):
            slot = take_value(nc)
            weight = (worker == half).astype(F32)
            for j in range(tiles.values // 64):
              place = slice(j * 64, (j + 1) * 64)
              other = plgpu.load(c_smem.at[slot, :, place], layout=MATRIX)
              product = (y[part][:, place] * other.astype(F32)).sum(axis=1)
              dot_x = dot_x + weight * product
            release_value(nc)
            nc = nc + 1
        return dot_x, nc

      def item(k, counts):
        nb, nc = counts
        b, h, n, r, o = decode(block + k * blocks)
        t0 = n * chunk
        rows = pl.ds(t0 + r * 128 + worker * ROWS, ROWS)

        half = pl.ds(worker * ROWS, ROWS)

        def of_rows(ref):
          return plgpu.load(ref.at[half], layout=ROW)

        def of_columns(ref, start, width=TOKENS):
          return plgpu.load(ref.at[pl.ds(start, width)], layout=COLUMN)

        plgpu.barrier_wait(a_full)
        row_x = [of_rows(row_smem.at[part]) for part in range(2)]
        past_x = of_rows(past_smem)
        border_x = of_rows(border_smem)
        bias_x = of_rows(bias_smem) if mode == "dq" else None

        u_x = jnp.float32(0)
        if has_sums:
          u_x = plgpu.layout_cast(jnp.zeros((ROWS,), F32), ROW)
          for j in range(dim // 64):
            place = pl.ds(j * 64, 64)
            part_xk = plgpu.load(a_xa.at[:, place], layout=MATRIX).astype(F32)
            n_k = of_columns(vector_smem, j * 64)
            u_x = u_x + (part_xk * _over_rows(n_k, ROWS)).sum(axis=1)
          u_x = u_x * past_x

        def read_state(multiply):
          for index in range(reads):
            j, part = divmod(index, parts)
            state = state_smem.at[take_value(nc + index)]
            state = state.transpose((1, 0)) if transposed else state
            multiply(part, a_xa.at[:, pl.ds(j * 64, 64)], state)
            if index:
              plgpu.wgmma_wait(1)
              release_value(nc + index - 1)

        reads = dim // 64 * parts
        zeros = jnp.zeros((ROWS, tiles.values), F32)
        y = [plgpu.layout_cast(zeros, MATRIX)] * parts
        y = _accumulate_onto(y, read_state, interpret)
        release_value(nc + reads - 1)
        nc = nc + reads
        for part in range(parts):
          if transposed:
            n_k = of_columns(vector_smem, part * tiles.values, tiles.values)
            bias = _over_rows(n_k, ROWS)
            if mode == "dq":
              bias = bias * _over_columns(bias_x, tiles.values)
            y[part] = y[part] + bias
          y[part] = y[part] * _over_columns(past_x, tiles.values)
        if mode == "dk":
          u_ref.at[o, b, h, rows][...], nc = partner_product(y, nc)

        def visit(i, carry, *, diagonal):
          nb, nc, u_x, *y = carry
          j = column(i)
          s_xz, nb = scores(nb)

          def exponent(part):
            column_z = of_columns(column_smem.at[part], j * TOKENS)
            return _over_columns(row_x[part], TOKENS) + _over_rows(
              column_z, ROWS
            )

          log_w = exponent(0) + exponent(1)
          z = _iota(1, interpret)
          border = _over_columns(border_x, TOKENS) - j * TOKENS
          visible = z <= border if reverse else z >= border
          if diagonal:
            x = _iota(0, interpret)
            visible = visible & ((z >= x) if reverse else (z <= x))
          log_w = jnp.where(visible, log_w, -jnp.inf)
          if mode == "dq":
            s_xz = s_xz + _over_columns(bias_x, TOKENS)

          def bias_of_columns():
            return _over_rows(of_columns(bias_smem, j * TOKENS), ROWS)

          if mode == "dk":
            s_xz = s_xz + bias_of_columns()
          w_xz = s_xz * jnp.exp(log_w)
          if mode == "h":
            u_x = u_x + w_xz.sum(axis=1)
          elif mode == "dv":
            u_x = u_x + (w_xz * bias_of_columns()).sum(axis=1)
          w_xz = w_xz.astype(BF16)
          if diagonal:
            # The last use of what was loaded for the item as a whole.
            if mode == "h":
              edges.extend(of_rows(ref) for ref in (floor_smem, extra_smem))
            plgpu.barrier_arrive(a_free)

          def add_values(multiply):
            for part in range(parts):
              multiply(part, w_xz, c_smem.at[take_value(nc + part)])
              if part:
                plgpu.wgmma_wait(1)
                release_value(nc + part - 1)

          y = _accumulate_onto(y, add_values, interpret)
          release_value(nc + parts - 1)
          return nb, nc + parts, u_x, *y

        def skip(_, counts):
          nb, nc = counts
          for part in range(key_parts):
            take(nb + part, b_full, tiles.key_buffers)
            release_key(nb + part)
          for part in range(parts):
            take_value(nc + part)
            release_value(nc + part)
          return nb + key_parts, nc + parts

        edges = []
        count, column = columns(r)
        own = count - 1 - worker if reverse else count - 2 + worker
        inner = functools.partial(visit, diagonal=False)
        carry = lax.fori_loop(0, own, inner, (nb, nc, u_x, *y))
        nb, nc, u_x, *y = visit(own, carry, diagonal=True)
        nb, nc = lax.fori_loop(own + 1, count, skip, (nb, nc))
        if mode == "h":
          size_x, extra_x = edges
          if normalize:
            size_x = jnp.where(jnp.abs(u_x) > size_x, jnp.abs(u_x), size_x)
            size_x = size_x + extra_x
          y = [x * _over_columns(1 / size_x, tiles.values) for x in y]

          @pl.when(o == 0)
          def _save():
            u_ref.at[b, h, rows][...] = u_x

        if mode == "dv":
          dot_x, nc = partner_product(y, nc)
          u_ref.at[o, b, h, rows][...] = dot_x + u_x * (o == 0).astype(F32)

        stored = 0

        def save(x, target_ref, start):
          nonlocal stored
          place = pl.ds(o * tiles.outputs + start, 64)
          target_ref = target_ref.at[b, rows, h, place]
          if not tiles.stages:
            _write(target_ref, x)
            return
          buffer = y_smem.at[worker, stored % tiles.stages]
          _store(buffer, x, target_ref, others=tiles.stages - 1)
          stored += 1

        for part in range(parts):
          for j in range(tiles.values // 64):
            exact = y[part][:, j * 64 : (j + 1) * 64]
            rounded = exact.astype(BF16)
            save(rounded, y_ref, part * tiles.values + j * 64)
            if low:
              rest = (exact - rounded.astype(F32)).astype(BF16)
              save(rest, low_ref, part * tiles.values + j * 64)
        return nb, nc

      lax.fori_loop(0, mine, item, (jnp.int32(0), jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

  unused = jnp.zeros((1, 1, TOKENS), F32)
  value_ring = _smem(tiles.value_buffers, TOKENS, tiles.values)
  if transposed:
    value_ring = plgpu.RefUnion(
      value_ring, _smem(tiles.value_buffers, tiles.values, 64)
    )
  u_shape = (out_tiles, *past_BHT.shape)
  if not has_partner:
    u_shape = past_BHT.shape if mode == "h" else unused.shape
  bias_width = {"h": 16, "dq": 128}.get(mode, chunk)
  edge_width = 128 if mode == "h" else 16
  a_arrivals = 6 + len(vector_parts) + has_bias + 2 * (mode == "h")
  y_type = jax.ShapeDtypeStruct((batch, time, heads, out_dim), BF16)
  y, u, y_low = plgpu.kernel(
    body,
    out_type=(
      y_type,
      jax.ShapeDtypeStruct(u_shape, F32),
      y_type if low else jax.ShapeDtypeStruct((16,), BF16),
    ),
    grid=(blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="worker",
    scratch_types=(
      _smem(2, ROWS, dim),
      _smem(tiles.key_buffers, TOKENS, tiles.keys),
      value_ring,
      _smem(2, tiles.stages, ROWS, 64)
      if tiles.stages
      else plgpu.SMEM((16,), F32),
      plgpu.SMEM((vector_dim,), F32),
      plgpu.SMEM((2, 128), F32),
      plgpu.SMEM((2, chunk), F32),
      plgpu.SMEM((128,), F32),
      plgpu.SMEM((128,), jnp.int32),
      plgpu.SMEM((bias_width,), F32),
      plgpu.SMEM((edge_width,), F32),
      plgpu.SMEM((edge_width,), F32),
      plgpu.Barrier(num_arrivals=a_arrivals),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_barriers=tiles.key_buffers),
      plgpu.Barrier(num_arrivals=2, num_barriers=tiles.key_buffers),
      plgpu.Barrier(num_barriers=tiles.value_buffers),
      plgpu.Barrier(num_arrivals=2, num_barriers=tiles.value_buffers),
    ),
    compiler_params=_COMPILER,
    interpret=interpret,
  )(
    a_BTHA,
    b_BTHA,
    c_BTHO,
    state_BHN,
    vector_BHNK,
    row_BH2T,
    column_BH2T,
    past_BHT,
    border_BT,
    *(
      unused if x is None else x
      for x in (bias_BHT, floor_BHT, extra_BHT, partner_BTHO)
    ),
  )
  return y, (jnp.sum(u, axis=0) if has_partner else u), y_low if low else None


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


def _accumulate(add, shape, interpret):
  """The sum of all products that `add` makes with the function it is given."""
  if interpret:
    products = []
    add(lambda a_ref, b_ref: products.append(_multiply(a_ref, b_ref)))
    return sum(products)

  def run(y_ref):
    add(functools.partial(plgpu.wgmma, y_ref))
    return y_ref[...]

  return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, F32))


def _accumulate_onto(ys, add, interpret) -> list[Any]:
  """Each y plus all products that `add` makes for its index.

  Interpret mode knows no product into a given accumulator.
  """
  if interpret:
    sums = list(ys)

    def multiply(index, a, b_ref):
      sums[index] = sums[index] + _multiply(a, b_ref)

    add(multiply)
    return sums

  def run(refs):
    add(lambda index, a, b_ref: plgpu.wgmma(refs[index], a, b_ref))

  accumulators = tuple(plgpu.WGMMAAccumulatorRef.init(y) for y in ys)
  return list(pl.run_state(run)(accumulators))


def _accumulate_with(y, x, add, interpret) -> Any:
  """y plus all products that `add` makes, and what `add` makes of x."""
  if interpret:
    products = [y]
    x = add(lambda a, b_ref: products.append(_multiply(a, b_ref)), x)
    return sum(products), x

  def run(refs):
    y_ref, x_ref = refs
    x_ref[...] = add(functools.partial(plgpu.wgmma, y_ref), x_ref[...])

  return pl.run_state(run)((plgpu.WGMMAAccumulatorRef.init(y), x))


def _multiply(a, b_ref):
  a = a if isinstance(a, jax.Array) else a[...]
  return jnp.dot(a, b_ref[...], preferred_element_type=F32)


def _write(target_ref, x):
  """Writes x from registers, 16 bytes of every row at a time.

  From 0.12 on jax wants to be told that whole sectors are not asked for.
  """
  if hasattr(plgpu, "store"):
    plgpu.store(target_ref, x, optimized=False)
  else:
    target_ref[...] = x


def _store(buffer_ref, x, target_ref, *, others=0):
  """Starts writing x, once all but `others` writes have left their buffers."""
  plgpu.wait_smem_to_gmem(others, wait_read_only=True)
  buffer_ref[...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer_ref, target_ref)
