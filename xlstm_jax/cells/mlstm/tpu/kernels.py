"""The mLSTM's two Pallas kernels for TPUs.

    grid (B, H, N): rows and heads in parallel, the chunks of L tokens in turn

    HBM   gates, q, k, v of chunk n          h of chunk n     C_n, n_n
               | copied while n-1 runs           ^               ^ with `save`
    VMEM       v                                 |               |
          w = exp(reader + writer)    (L x L)    |               |
          s = (q k^T) w                          |               |
          u = sum of s + past q n                |               |
          h = (s v + past q C) / size(u) --------+               |
          C (K x V in float32), n  ------------------------------+
          C = keep C + (write k)^T v
          n = keep n + sum of write k

The backward kernel runs from the last chunk to the first with D, the gradient
of C, in C's place. It computes scores and weights again, so that no array of
pairs of tokens leaves VMEM.

Where few tokens rule a state, `two_BHN` is 1, and the products with C, D and
what is added to them are made of two parts of bfloat16
(docs/decisions/0006-states-in-two-parts.md). That is a branch of its own: the
other one is scheduled as if there were none.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.more_rows import more_rows
from xlstm_jax.cells.precision import rounded
from xlstm_jax.cells.tpu_internals import pl, pltpu

# Rows of the gates of a chunk, each of L numbers: the scales of
# `xlstm_jax.cells.mlstm.scales`, `first` as a float.
GATES = 8
READER, READER_REST, WRITER, WRITER_REST, PAST, WRITE, M, FIRST = range(GATES)
# Rows of what the backward kernel tells of a chunk's gates.
WRITTEN, READ, PASSED, THROUGH = range(4)

_SEQUENTIAL = ("parallel", "parallel", "arbitrary")
# Dimensions that a product contracts.
_ROWS_BY_COLUMNS, _ROWS_BY_ROWS, _COLUMNS_BY_COLUMNS = (
  (((1,), (0,)), ((), ())),
  (((1,), (1,)), ((), ())),
  (((0,), (0,)), ((), ())),
)


class Cell(NamedTuple):
  """What is static in both kernels."""

  chunk: int
  normalize: bool
  eps: float
  vmem: int  # bytes that a kernel may use
  interpret: Any = False


def _product(x, y, dims):
  """Of operands that may be in parts, with a float32 sum."""
  products = [
    lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    for a in (x if isinstance(x, list) else [x])
    for b in (y if isinstance(y, list) else [y])
  ]
  return sum(products[1:], products[0])


def _parts(x, count: int):
  """A float32 array as so many parts of bfloat16."""
  if count == 1:
    return [x.astype(jnp.bfloat16)]
  large = rounded(x, jnp.bfloat16)
  return [large.astype(jnp.bfloat16), (x - large).astype(jnp.bfloat16)]


def _floors(m_1L, cell: Cell):
  """What |u| is at least in the denominator, and what is added to it."""
  gauge = jnp.maximum(m_1L, 0)
  floor = jnp.maximum(jnp.exp(-gauge), jnp.finfo(jnp.float32).tiny)
  return floor, cell.eps * jnp.exp(m_1L - gauge)


def _inverse(m, u, floor, extra, cell: Cell):
  """What outputs in the scale exp(-max(m, 0)) are multiplied by."""
  if not cell.normalize:
    return jnp.exp(jnp.maximum(m, 0))
  return 1 / (jnp.maximum(jnp.abs(u), floor) + extra)


def _slopes(u_1L, floor_1L, extra_1L, inverse_1L, cell: Cell):
  """How u changes h.

  Returns:
    The sign of u where u itself divides, else 0. And by what part of itself h
    changes with all of a token's weights: where u divides, it is only by the
    eps in the denominator.
  """
  if not cell.normalize:
    return jnp.zeros_like(u_1L), jnp.ones_like(u_1L)
  divides = jnp.abs(u_1L) > floor_1L
  sign_1L = jnp.where(divides, jnp.sign(u_1L), 0.0)
  return sign_1L, jnp.where(divides, extra_1L * inverse_1L, 1.0)


def _columns(*rows_1L):
  """Eight rows of L numbers as columns (L, 1)."""
  table = jnp.concatenate(rows_1L, axis=0).T
  return [table[:, i : i + 1] for i in range(len(rows_1L))]


def _row(gates_ref, which: int):
  return gates_ref[0, 0, 0, which : which + 1, :]


def _weights(gates_ref, reader_L1, reader_rest_L1, first_L1):
  """exp(reader + writer) of visible pairs, like parts added first."""
  length = gates_ref.shape[-1]
  t = lax.broadcasted_iota(jnp.int32, (length, length), 0)
  s = lax.broadcasted_iota(jnp.int32, (length, length), 1)
  visible = (s <= t) & (s >= first_L1.astype(jnp.int32))
  log_w = reader_L1 + _row(gates_ref, WRITER)
  log_w += reader_rest_L1 + _row(gates_ref, WRITER_REST)
  return jnp.where(visible, jnp.exp(log_w), 0.0)


def _total(x, axis: int):
  return jnp.sum(x, axis=axis, keepdims=True)


def _forward_kernel(
  two_ref, keep_ref, gates_ref, q_ref, k_ref, v_ref, C_first_ref, n_first_ref,
  h_ref, C_ref, n_ref, *others, cell: Cell, save: bool,
):  # fmt: skip
  """One chunk; C_ref and n_ref hold the state that runs through."""
  at = tuple(pl.program_id(axis) for axis in range(3))

  @pl.when(at[2] == 0)
  def _first():
    C_ref[...] = C_first_ref[...]
    n_ref[...] = n_first_ref[...]

  def chunk(parts: int):
    q_lk, k_lk, v_lv = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
    reader, reader_rest, past, write, first, m, floor, extra = _columns(
      _row(gates_ref, READER),
      _row(gates_ref, READER_REST),
      _row(gates_ref, PAST),
      _row(gates_ref, WRITE),
      _row(gates_ref, FIRST),
      _row(gates_ref, M),
      *_floors(_row(gates_ref, M), cell),
    )
    state = _parts(C_ref[0, 0], parts)
    weights = _weights(gates_ref, reader, reader_rest, first)
    scores = _product(q_lk, k_lk, _ROWS_BY_ROWS) * weights
    u = _total(scores, 1)
    u += past * _total(q_lk.astype(jnp.float32) * n_ref[0, 0], 1)
    h = _product(scores.astype(jnp.bfloat16), v_lv, _ROWS_BY_COLUMNS)
    h += past * _product(q_lk, state, _ROWS_BY_COLUMNS)
    h *= _inverse(m, u, floor, extra, cell)
    h_ref[0, 0] = h.astype(jnp.bfloat16)
    if save:
      u_ref, C_before_ref, C_low_ref, n_before_ref, low_ref = others
      u_ref[0, 0, 0] = jnp.broadcast_to(u, (u.shape[0], 8)).T[:1]
      C_before_ref[0, 0, 0] = state[0]
      n_before_ref[0, 0, 0] = n_ref[0, 0]
      if parts == 2:
        low_ref[...] = state[1]
        pltpu.sync_copy(low_ref, C_low_ref.at[at])
    written = k_lk.astype(jnp.float32) * write
    keep = keep_ref[0, 0, 0, at[2]]
    added = _product(_parts(written, parts), v_lv, _COLUMNS_BY_COLUMNS)
    C_ref[0, 0] = keep * C_ref[0, 0] + added
    n_ref[0, 0] = keep * n_ref[0, 0] + _total(written, 0)

  _branch(two_ref, at[2], chunk, cell)


def _branch(two_ref, chunk_index, run, cell: Cell):
  """Runs a chunk in one part or in two."""
  if not cell.normalize:  # nothing divides, so that nothing is lost
    run(1)
    return
  two = two_ref[0, 0, 0, chunk_index] != 0
  pl.when(two)(lambda: run(2))
  pl.when(jnp.logical_not(two))(lambda: run(1))


def _backward_kernel(
  two_ref, keep_ref, gates_ref, u_ref, q_ref, k_ref, v_ref, dh_ref,
  C_before_ref, C_low_ref, n_before_ref, D_last_ref, dn_last_ref,
  dq_ref, dk_ref, dv_ref, rows_ref, D_ref, dn_ref, low_ref, *, cell: Cell,
):  # fmt: skip
  """One chunk; D_ref and dn_ref hold the gradient of the state after it."""
  b, h, step = (pl.program_id(axis) for axis in range(3))
  at = (b, h, pl.num_programs(2) - 1 - step)

  @pl.when(step == 0)
  def _last():
    D_ref[...] = D_last_ref[...]
    dn_ref[...] = dn_last_ref[...]

  def chunk(parts: int):
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    q_lk, k_lk, v_lv, dh_lv = (
      q_ref[0, 0],
      k_ref[0, 0],
      v_ref[0, 0],
      dh_ref[0, 0],
    )
    state = [C_before_ref[0, 0, 0]]
    if parts == 2:
      pltpu.sync_copy(C_low_ref.at[at], low_ref)
      state.append(low_ref[...])
    n_1k, dn_1k = n_before_ref[0, 0, 0], dn_ref[0, 0]
    keep = keep_ref[0, 0, 0, at[2]]
    m_1L, u_1L = _row(gates_ref, M), u_ref[0, 0, 0]
    floors_1L = _floors(m_1L, cell)
    inverse_1L = _inverse(m_1L, u_1L, *floors_1L, cell)
    reader, reader_rest, past, write, first, inverse, sign, share = _columns(
      _row(gates_ref, READER),
      _row(gates_ref, READER_REST),
      _row(gates_ref, PAST) * inverse_1L,
      _row(gates_ref, WRITE),
      _row(gates_ref, FIRST),
      inverse_1L,
      *_slopes(u_1L, *floors_1L, inverse_1L, cell),
    )
    weights = _weights(gates_ref, reader, reader_rest, first) * inverse
    scores = _product(q_lk, k_lk, _ROWS_BY_ROWS)
    pairs = scores * weights
    dpairs = _product(dh_lv, v_lv, _ROWS_BY_ROWS)
    dpast = _product(dh_lv, state, _ROWS_BY_ROWS)
    # dh h, of weights that are not rounded yet.
    dot = _total(pairs * dpairs, 1) + past * _total(wide(q_lk) * dpast, 1)
    bias = -sign * dot
    dpairs += bias
    dscores = dpairs * weights
    narrow = dscores.astype(jnp.bfloat16)
    dq = _product(narrow, k_lk, _ROWS_BY_COLUMNS)
    dq_ref[0, 0] = (dq + past * (dpast + bias * n_1k)).astype(jnp.bfloat16)

    D = _parts(D_ref[0, 0], parts)
    dwritten = _product(v_lv, D, _ROWS_BY_ROWS) + dn_1k
    dk = _product(narrow, q_lk, _COLUMNS_BY_COLUMNS)
    dk_ref[0, 0] = (dk + write * dwritten).astype(jnp.bfloat16)
    dv = _product(pairs.astype(jnp.bfloat16), dh_lv, _COLUMNS_BY_COLUMNS)
    dv += write * _product(k_lk, D, _ROWS_BY_COLUMNS)
    dv_ref[0, 0] = dv.astype(jnp.bfloat16)

    read = share * dot
    passed = write * _total(wide(k_lk) * dwritten, 1)
    place = lax.broadcasted_iota(jnp.int32, (cell.chunk, 8), 1)
    rows = jnp.where(place == 0, read, passed).T
    through = sum(
      jnp.sum(wide(part) * D_ref[0, 0], keepdims=True) for part in state
    )
    through = keep * (through + jnp.sum(n_1k * dn_1k, keepdims=True))
    rows_ref[0, 0, 0, WRITTEN : WRITTEN + 1] = _total(pairs * dpairs, 0)
    rows_ref[0, 0, 0, READ : PASSED + 1] = rows[:2]
    rows_ref[0, 0, 0, THROUGH : THROUGH + 1] = jnp.broadcast_to(
      through, (1, cell.chunk)
    )
    reading = wide(q_lk) * past
    added = _product(_parts(reading, parts), dh_lv, _COLUMNS_BY_COLUMNS)
    D_ref[0, 0] = keep * D_ref[0, 0] + added
    dn_ref[0, 0] = keep * dn_1k + _total(reading * bias, 0)

  _branch(two_ref, at[2], chunk, cell)


def _block(*shape: int, at):
  """A block of such a shape at the row, the head and what `at` tells."""

  def index(b, h, n):
    return (b, h, *at(n), *[0] * (len(shape) - len(at(n))))

  return pl.BlockSpec((1, 1, *shape), index)


def _specs(chunks: int, *, reverse: bool):
  """Makes blocks: of tokens, of a chunk's own array, of a head; in SMEM."""
  place = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)
  tokens = functools.partial(_block, at=lambda n: (place(n),))

  def of_chunk(*shape):
    return _block(1, *shape, at=lambda n: (place(n),))

  of_head = functools.partial(_block, at=lambda n: ())
  scalars = pl.BlockSpec(
    (1, 1, 1, chunks), lambda b, h, n: (b, h, 0, 0), memory_space=pltpu.SMEM
  )
  return tokens, of_chunk, of_head, scalars


def _call(kernel, name, grid, in_specs, outs, scratch, args, cell: Cell):
  varying = jax.typeof(args[-1]).mat
  out_specs, shapes = zip(*outs, strict=True)
  return pl.pallas_call(
    kernel,
    name=name,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
      for x in shapes
    ],
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=_SEQUENTIAL, vmem_limit_bytes=cell.vmem
    ),
    interpret=cell.interpret,
  )(*args)


def _as(dtype, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


_narrow = functools.partial(_as, jnp.bfloat16)
_wide = functools.partial(_as, jnp.float32)


@more_rows
def forward(
  q_BHTK: jax.Array,
  k_BHTK: jax.Array,
  v_BHTV: jax.Array,
  gates_BHNGL: jax.Array,
  keep_BHN: jax.Array,
  two_BHN: jax.Array,
  C_BHKV: jax.Array,
  n_BHK: jax.Array,
  *,
  cell: Cell,
  save: bool,
) -> tuple[jax.Array, ...]:
  """h and the state after the last chunk.

  Returns:
    h, C and n; with `save` also u, the state before every chunk as C in
    bfloat16, what rounding took from it, which is there only where `two_BHN`
    is 1, and n.
  """
  B, H, T, K = q_BHTK.shape
  V, L = v_BHTV.shape[-1], cell.chunk
  N = T // L
  tokens, of_chunk, of_head, scalars = _specs(N, reverse=False)
  outs = [
    (tokens(L, V), _narrow(B, H, T, V)),
    (of_head(K, V), _wide(B, H, K, V)),
    (of_head(1, K), _wide(B, H, 1, K)),
  ]
  scratch = []
  if save:
    outs += [
      (of_chunk(1, L), _wide(B, H, N, 1, L)),
      (of_chunk(K, V), _narrow(B, H, N, K, V)),
      (pl.BlockSpec(memory_space=pl.ANY), _narrow(B, H, N, K, V)),
      (of_chunk(1, K), _wide(B, H, N, 1, K)),
    ]
    scratch = [pltpu.VMEM((K, V), jnp.bfloat16)]
  return _call(
    functools.partial(_forward_kernel, cell=cell, save=save),
    "mlstm_forward",
    (B, H, N),
    [
      *(scalars, scalars, of_chunk(GATES, L)),
      *(tokens(L, K), tokens(L, K), tokens(L, V), of_head(K, V), of_head(1, K)),
    ],
    outs,
    scratch,
    (
      *(two_BHN[:, :, None], keep_BHN[:, :, None], gates_BHNGL),
      *(q_BHTK, k_BHTK, v_BHTV, C_BHKV, n_BHK[:, :, None]),
    ),
    cell,
  )


@more_rows
def backward(
  q_BHTK: jax.Array,
  k_BHTK: jax.Array,
  v_BHTV: jax.Array,
  dh_BHTV: jax.Array,
  gates_BHNGL: jax.Array,
  keep_BHN: jax.Array,
  two_BHN: jax.Array,
  saved: tuple[jax.Array, ...],
  D_BHKV: jax.Array,
  dn_BHK: jax.Array,
  *,
  cell: Cell,
) -> tuple[jax.Array, ...]:
  """Gradients of q, k and v; four rows of each chunk's gates; of the state.

  Args:
    q_BHTK, k_BHTK, v_BHTV, gates_BHNGL, keep_BHN, two_BHN: As `forward` got
      them.
    dh_BHTV: The cotangent of h.
    saved: What `forward` saved: u, C, what rounding took from it, n.
    D_BHKV, dn_BHK: The cotangents of the last state.
    cell: As `forward` got it.
  """
  B, H, T, K = q_BHTK.shape
  V, L = v_BHTV.shape[-1], cell.chunk
  N = T // L
  tokens, of_chunk, of_head, scalars = _specs(N, reverse=True)
  u, C, C_low, n = saved
  return _call(
    functools.partial(_backward_kernel, cell=cell),
    "mlstm_backward",
    (B, H, N),
    [
      *(scalars, scalars, of_chunk(GATES, L), of_chunk(1, L)),
      *(tokens(L, K), tokens(L, K), tokens(L, V), tokens(L, V)),
      *(of_chunk(K, V), pl.BlockSpec(memory_space=pl.ANY), of_chunk(1, K)),
      *(of_head(K, V), of_head(1, K)),
    ],
    [
      *((tokens(L, d), _narrow(B, H, T, d)) for d in (K, K, V)),
      (of_chunk(4, L), _wide(B, H, N, 4, L)),
      (of_head(K, V), _wide(B, H, K, V)),
      (of_head(1, K), _wide(B, H, 1, K)),
    ],
    [pltpu.VMEM((K, V), jnp.bfloat16)],
    (
      *(two_BHN[:, :, None], keep_BHN[:, :, None], gates_BHNGL, u),
      *(q_BHTK, k_BHTK, v_BHTV, dh_BHTV, C, C_low, n),
      *(D_BHKV, dn_BHK[:, :, None]),
    ),
    cell,
  )
