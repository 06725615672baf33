"""The weights of all pairs of tokens of a chunk, divided by the normaliser.

    P_ts = (q_t k_s) exp(reader_t + writer_s) / g_t
    u_t  = past_t q_t n + the sum over s of P_ts g_t
    g_t  = max(|u_t|, floor_t) + extra_t

t reads s, which comes before it or is itself, and is of its document. The rows
of `pairs` are t. They stay in registers until u_t is known.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.lowered_once import lowered_once
from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  BLOCK,
  MULTIPROCESSORS,
  ROWS,
)
from xlstm_jax.cells.mlstm.hopper.pairs import Block, Plan, Rows, Shared
from xlstm_jax.cells.mlstm.hopper.tiles import (
  BF16,
  F32,
  indices,
  over_columns,
  zeros,
)


class Weights(NamedTuple):
  """What `weigh` makes.

  Attributes:
    inverse_BHT: 1 / g.
    pairs_BHTL: P of t and the place of s in its chunk, in bfloat16. Where no s
      of a block of 128 is visible it is not written.
    read_BHT: past / g.
    sign_BHT: The sign of u where u divides, otherwise 0.
  """

  inverse_BHT: Any
  pairs_BHTL: Any
  read_BHT: Any
  sign_BHT: Any


class _Reads(NamedTuple):
  """What the kernel reads from memory."""

  first_BT: Any
  extra_BHT: Any
  floor_BHT: Any
  past_BHT: Any
  n_BHNK: Any
  reader_BHT: list[Any]
  writer_BHT: list[Any]
  q_BTHK: Any
  k_BTHK: Any


@lowered_once("normalize", "chunk", "interpret", "blocks")
def weigh(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  n_BHNK: jax.Array,
  *,
  reader_BHT: list[jax.Array],
  writer_BHT: list[jax.Array],
  past_BHT: jax.Array,
  first_BT: jax.Array,
  floor_BHT: jax.Array,
  extra_BHT: jax.Array,
  normalize: bool,
  chunk: int,
  blocks: int = MULTIPROCESSORS,
  interpret: Any = None,
) -> Weights:
  """Weights of the pairs of tokens of every chunk.

  Args:
    q_BTHK: Queries, unscaled.
    k_BTHK: Keys.
    n_BHNK: n before every chunk.
    reader_BHT: Exponents of t, in two parts, with K^-0.5.
    writer_BHT: Exponents of s, in two parts.
    past_BHT: Weight with which t reads the state before its chunk.
    first_BT: First token that t sees, counted from the chunk's start.
    floor_BHT: What |u| is at least.
    extra_BHT: What is added to it.
    normalize: Whether u divides; without it the floor does, and nothing is
      added.
    chunk: Tokens of a chunk, 128 or 256.
    blocks: Blocks that run at once.
    interpret: See `pallas_gpu`.
  """
  batch, time, heads, key_dim = q_BTHK.shape
  chunks = time // chunk
  plan = Plan(batch, heads, chunks, chunk, key_dim, 2, blocks, interpret)

  def mlstm_weights(reads, writes, *shared):
    block = Block.here(plan, Shared(*shared))

    def compute(half, k, item, counts):
      rows = Rows.of(
        *(block, half, k, item),
        *(reads.reader_BHT, reads.first_BT, reads.past_BHT),
      )
      return _Readers(rows, reads, writes, normalize).weigh(counts)

    block.run(
      block.load(
        reads.n_BHNK,
        reads.writer_BHT,
        [(reads.q_BTHK, reads.k_BTHK)],
        others=lambda r: (0, r),
      ),
      compute,
    )

  tokens = jax.ShapeDtypeStruct(past_BHT.shape, F32)
  pairs = jax.ShapeDtypeStruct((batch, heads, time, chunk), BF16)
  return plan.run(
    mlstm_weights,
    _Reads(
      first_BT=first_BT,
      extra_BHT=extra_BHT,
      floor_BHT=floor_BHT,
      past_BHT=past_BHT,
      n_BHNK=n_BHNK,
      reader_BHT=reader_BHT,
      writer_BHT=writer_BHT,
      q_BTHK=q_BTHK,
      k_BTHK=k_BTHK,
    ),
    Weights(tokens, pairs, tokens, tokens),
  )


@dataclasses.dataclass(frozen=True)
class _Readers:
  """64 tokens t of a warpgroup, which read tokens s."""

  rows: Rows
  reads: _Reads
  writes: Weights
  normalize: bool

  def weigh(self, counts):
    """Weighs all pairs with these rows and writes them."""
    r = self.rows.r
    carry, own = self.visit(r, (*counts, None), diagonal=True)

    # A chunk has at most two tiles: registers hold no more weights.
    def with_first_tile():
      whole, earlier = self.visit(0, carry, diagonal=False)
      return self.divide(whole, [(r, own), (0, earlier)])

    def alone():
      return self.divide(carry, [(r, own)])

    if self.rows.block.plan.tiles == 1:
      return alone()
    return lax.cond(r > 0, with_first_tile, alone)

  def visit(self, c, carry, *, diagonal: bool):
    """The weights of all pairs with tile c, not yet divided, and u with them.

    On the diagonal, which comes first, u begins with what t reads of n.
    """
    rows, block = self.rows, self.rows.block
    interpret, key_dim = block.plan.interpret, block.plan.key_dim
    step, column, u_t = carry
    if diagonal:
      scores_ts, u_t, step = rows.products_with_state(step, key_dim)
    else:
      scores_ts, step = rows.products(step, key_dim)
    slot = block.vectors.take(column)
    first_t = rows.border + (rows.r - c) * BLOCK
    weights = []
    for start in (0, 64):
      coarse, rest = rows.log_weights(slot, start)
      s = indices(1, interpret) + start
      visible = s >= over_columns(first_t, 64)
      if diagonal:
        t = indices(0, interpret) + block.worker * ROWS
        visible = visible & (s <= t)
      w_ts = jnp.exp(jnp.where(visible, coarse + rest, -jnp.inf))
      weights_ts = scores_ts[:, start : start + 64] * w_ts
      weights.append(weights_ts)
      u_t = u_t + weights_ts.sum(axis=1)
    block.vectors.release(column)
    return (step, column + 1, u_t), weights

  def divide(self, carry, tiles):
    """Writes the weights of all tiles, now that u is whole."""
    rows, reads, writes = self.rows, self.reads, self.writes
    step, column, u_t = carry
    g_t, sign_t = rows.load(reads.floor_BHT), zeros(ROWS)
    if self.normalize:
      divides_t = jnp.abs(u_t) > g_t
      one_t = jnp.where(u_t > 0, jnp.ones_like(u_t), -jnp.ones_like(u_t))
      sign_t = jnp.where(divides_t, one_t, sign_t)
      g_t = jnp.where(divides_t, jnp.abs(u_t), g_t)
      g_t = g_t + rows.load(reads.extra_BHT)
    inverse_t = 1 / g_t
    for c, weights in tiles:
      for i, weights_ts in enumerate(weights):
        divided_ts = weights_ts * over_columns(inverse_t, 64)
        rows.save(writes.pairs_BHTL, divided_ts, c, i * 64, i)
    place = rows.b, rows.h, rows.tokens
    writes.sign_BHT.at[*place][...] = sign_t
    writes.inverse_BHT.at[*place][...] = inverse_t
    writes.read_BHT.at[*place][...] = rows.weight * inverse_t
    return step, column
