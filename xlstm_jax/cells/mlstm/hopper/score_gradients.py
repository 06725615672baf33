"""The gradients of the scores of all pairs of tokens of a chunk.

    dS_ts = (dh_t v_s + bias_t) exp(reader_t + writer_s) / g_t
    di_s  = write_s k_s dn + the sum over t of P_ts bias_t   (through u alone)

s writes, and t, after it or itself and of its document, reads. The rows of
`pairs` are s, and their columns t: they hold the transpose of dS.
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
)

# Where a column's numbers lie, after its exponents in two parts.
BIAS, INVERSE = 2, 3


class ScoreGradients(NamedTuple):
  """What `score_gradients` makes.

  Attributes:
    di_BHT: The part of the gradient of log i that comes through u.
    pairs_BHTL: dS^T of s and the place of t in its chunk, in bfloat16. Where no
      t of a block of 128 is visible it is not written.
  """

  di_BHT: Any
  pairs_BHTL: Any


class _Reads(NamedTuple):
  """What the kernel reads from memory."""

  bias_BHT: Any
  final_BT: Any
  inverse_BHT: Any
  write_BHT: Any
  dn_BHNK: Any
  writer_BHT: list[Any]
  reader_BHT: list[Any]
  k_BTHK: Any
  v_BTHV: Any
  q_BTHK: Any
  dh_BTHV: Any


@lowered_once("chunk", "interpret", "blocks")
def score_gradients(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTHV: jax.Array,
  dh_BTHV: jax.Array,
  dn_BHNK: jax.Array,
  *,
  reader_BHT: list[jax.Array],
  writer_BHT: list[jax.Array],
  write_BHT: jax.Array,
  final_BT: jax.Array,
  bias_BHT: jax.Array,
  inverse_BHT: jax.Array,
  chunk: int,
  blocks: int = MULTIPROCESSORS,
  interpret: Any = None,
) -> ScoreGradients:
  """Gradients of the scores of the pairs of tokens of every chunk.

  Args:
    q_BTHK: Queries, unscaled.
    k_BTHK: Keys.
    v_BTHV: Values.
    dh_BTHV: Gradients of h.
    dn_BHNK: Gradients of n after every chunk.
    reader_BHT: Exponents of t, in two parts, with K^-0.5.
    writer_BHT: Exponents of s, in two parts.
    write_BHT: Weight with which s writes into the state after its chunk.
    final_BT: Last token that sees s, counted from the chunk's start.
    bias_BHT: Gradients of u, times g.
    inverse_BHT: 1 / g.
    chunk: Tokens of a chunk, 128 or 256.
    blocks: Blocks that run at once.
    interpret: See `pallas_gpu`.
  """
  batch, time, heads, key_dim = q_BTHK.shape
  chunks = time // chunk
  plan = Plan(batch, heads, chunks, chunk, key_dim, 4, blocks, interpret)

  def mlstm_score_gradients(reads, writes, *shared):
    block = Block.here(plan, Shared(*shared))

    def compute(half, k, item, counts):
      rows = Rows.of(
        *(block, half, k, item),
        *(reads.writer_BHT, reads.final_BT, reads.write_BHT),
      )
      return _Writers(rows, reads, writes).differentiate(counts)

    block.run(
      block.load(
        reads.dn_BHNK,
        [*reads.reader_BHT, reads.bias_BHT, reads.inverse_BHT],
        [(reads.k_BTHK, reads.q_BTHK), (reads.v_BTHV, reads.dh_BTHV)],
        others=lambda r: (r + 1, plan.tiles),
      ),
      compute,
    )

  tokens = jax.ShapeDtypeStruct(write_BHT.shape, F32)
  pairs = jax.ShapeDtypeStruct((batch, heads, time, chunk), BF16)
  return plan.run(
    mlstm_score_gradients,
    _Reads(
      bias_BHT=bias_BHT,
      final_BT=final_BT,
      inverse_BHT=inverse_BHT,
      write_BHT=write_BHT,
      dn_BHNK=dn_BHNK,
      writer_BHT=writer_BHT,
      reader_BHT=reader_BHT,
      k_BTHK=k_BTHK,
      v_BTHV=v_BTHV,
      q_BTHK=q_BTHK,
      dh_BTHV=dh_BTHV,
    ),
    ScoreGradients(tokens, pairs),
  )


@dataclasses.dataclass(frozen=True)
class _Writers:
  """64 tokens s of a warpgroup, which tokens t read."""

  rows: Rows
  reads: _Reads
  writes: ScoreGradients

  def differentiate(self, counts):
    """Writes the gradients of all pairs with these rows."""
    r, tiles = self.rows.r, self.rows.block.plan.tiles
    step, column, di_s = lax.fori_loop(
      r + 1,
      tiles,
      lambda c, carry: self.visit(c, carry, diagonal=False),
      self.visit(r, (*counts, None), diagonal=True),
    )
    place = self.rows.b, self.rows.h, self.rows.tokens
    self.writes.di_BHT.at[*place][...] = di_s
    return step, column

  def visit(self, c, carry, *, diagonal: bool):
    """Writes the gradients of all pairs with tile c, and adds to di.

    On the diagonal, which comes first, di begins with what s has written to n.
    """
    rows, block = self.rows, self.rows.block
    interpret, key_dim = block.plan.interpret, block.plan.key_dim
    step, column, di_s = carry
    if diagonal:
      scores_st, di_s, step = rows.products_with_state(step, key_dim)
    else:
      scores_st, step = rows.products(step, key_dim)
    slot = block.vectors.take(column)
    final_s = rows.border + (rows.r - c) * BLOCK
    weights = []
    for start in (0, 64):
      coarse, rest = rows.log_weights(slot, start)
      t = indices(1, interpret) + start
      visible = t <= over_columns(final_s, 64)
      if diagonal:
        s = indices(0, interpret) + block.worker * ROWS
        visible = visible & (t >= s)
      w_st = jnp.exp(jnp.where(visible, coarse + rest, -jnp.inf))
      w_st = w_st * rows.column_vector(slot, INVERSE, start)
      weights.append(w_st)
      du_st = scores_st[:, start : start + 64] * w_st
      du_st = du_st * rows.column_vector(slot, BIAS, start)
      di_s = di_s + du_st.sum(axis=1)
    dweights_st, step = rows.products(step, self.reads.dh_BTHV.shape[-1])
    for i, start in enumerate((0, 64)):
      part_st = dweights_st[:, start : start + 64]
      part_st = part_st + rows.column_vector(slot, BIAS, start)
      rows.save(self.writes.pairs_BHTL, part_st * weights[i], c, start, i)
    block.vectors.release(column)
    return step, column + 1, di_s
