"""Forward and backward over whole chunks, and the gradients of the gates.

Which kernel makes what from what is drawn in `hopper/__init__`. What is here
besides is small and plain XLA.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.mlstm.hopper import sums
from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  Blocks,
  out_width,
  values_apart,
)
from xlstm_jax.cells.mlstm.hopper.combine import combine
from xlstm_jax.cells.mlstm.hopper.low_bits import unpacked
from xlstm_jax.cells.mlstm.hopper.products import inner_products
from xlstm_jax.cells.mlstm.hopper.score_gradients import score_gradients
from xlstm_jax.cells.mlstm.hopper.spans import state_gradients, states
from xlstm_jax.cells.mlstm.hopper.weigh import Weights, weigh
from xlstm_jax.cells.mlstm.scales import (
  Scales,
  parts_of_states,
  scales,
  sums_from,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What is static in the forward and the backward pass."""

  blocks: Blocks
  key_dim: int  # before padding: the queries are scaled by key_dim^-0.5
  stabilize: bool
  normalize: bool
  eps: float
  interpret: Any


class _Kept(NamedTuple):
  """What the backward pass needs of the forward pass.

  Attributes:
    C_first_BHKV: The first state.
    C_BHPKV: The states before every chunk, with their parts.
    n_BHNK: Their n.
    parts_BHM: In how many parts the N + 1 states before and after chunks are.
  """

  q_BTHK: Any
  k_BTHK: Any
  v_BTHV: Any
  h_BTHV: Any
  low_BTHV: Any
  weights: Weights
  scales: Scales
  C_first_BHKV: Any
  C_BHPKV: Any
  n_BHNK: Any
  parts_BHM: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunks_of_mlstm(opt, q, k, v, log_i, log_f, C, n, m, segment, id_, start):
  """h, and C, n and their scale m after the last chunk."""
  args = (q, k, v, log_i, log_f, C, n, m, segment, id_, start)
  return _forward(opt, *args, keep=False)[0]


def _forward(
  opt, q, k, v, log_i, log_f, C, n, m, segment, id_, start, keep=True
):
  s = scales(
    log_i,
    log_f,
    id_,
    start,
    m,
    segment,
    chunk=opt.blocks.chunk,
    key_dim=opt.key_dim,
    stabilize=opt.stabilize,
  )
  parts_BHM = parts_of_states(s, C)
  if not opt.normalize:
    parts_BHM = jnp.ones_like(parts_BHM)
  parts_BHN = parts_BHM[..., :-1]
  C_BHPKV, n_BHNK, C_last, n_last = states(
    *(k, v, s, parts_BHN, C, n), blocks=opt.blocks, interpret=opt.interpret
  )
  floor_BHT, extra_BHT = _floor(s, opt)
  weights = weigh(
    q,
    k,
    n_BHNK,
    reader_BHT=s.reader_BHT,
    writer_BHT=s.writer_BHT,
    past_BHT=s.past_BHT,
    first_BT=s.first_BT,
    floor_BHT=floor_BHT,
    extra_BHT=extra_BHT,
    normalize=opt.normalize,
    chunk=opt.blocks.chunk,
    interpret=opt.interpret,
  )
  (result,) = combine(
    [
      sums.output(
        *(q, C_BHPKV, parts_BHN, weights.pairs_BHTL, v),
        read_BHT=weights.read_BHT,
        low=keep,
      )
    ],
    chunk=opt.blocks.chunk,
    columns=opt.blocks.sum_columns,
    interpret=opt.interpret,
  )
  h, low = result.y_BTHO, result.low_BTHO
  kept = _Kept(q, k, v, h, low, weights, s, C, C_BHPKV, n_BHNK, parts_BHM)
  return (h, C_last, n_last, s.m_last_BH), kept


def _backward(opt, kept: _Kept, cotangents):
  q, k, v, s, weights = (
    *(kept.q_BTHK, kept.k_BTHK, kept.v_BTHV),
    *(kept.scales, kept.weights),
  )
  dh, dC_last, dn_last, _ = cotangents
  # Otherwise the compiler makes dh again for each of the results that follow.
  dh = jax.lax.optimization_barrier(dh)
  width = out_width(opt.blocks.sum_columns, kept.h_BTHV.shape[-1])
  h = unpacked(kept.h_BTHV, kept.low_BTHV, width=width)
  bias_BHT, reading_BHT = _readout_backward(opt, s, weights, h, dh)
  # The gradient of a state has as many parts as the state: they cancel in the
  # gradients of the tokens that rule it.
  C_parts, D_parts = kept.parts_BHM[..., :-1], kept.parts_BHM[..., 1:]
  D_BHPKV, dn_BHNK, dC, dn = state_gradients(
    *(q, dh, weights.read_BHT, bias_BHT, s.keep_BHN, D_parts),
    *(dC_last, dn_last),
    blocks=opt.blocks,
    interpret=opt.interpret,
  )
  together = partial(
    combine,
    chunk=opt.blocks.chunk,
    columns=opt.blocks.gradient_columns,
    interpret=opt.interpret,
  )
  late = [
    sums.value_gradient(
      *(k, D_BHPKV, D_parts, weights.pairs_BHTL, dh, v), write_BHT=s.write_BHT
    )
  ]
  early = []
  if values_apart(q.shape[-1]):
    early, late = together(late), []
    # `score_gradients` comes after it, and may write where the weights were.
    early, dn_BHNK = jax.lax.optimization_barrier((early, dn_BHNK))
  scores = score_gradients(
    *(q, k, v, dh, dn_BHNK),
    reader_BHT=s.reader_BHT,
    writer_BHT=s.writer_BHT,
    write_BHT=s.write_BHT,
    final_BT=s.final_BT,
    bias_BHT=bias_BHT,
    inverse_BHT=weights.inverse_BHT,
    chunk=opt.blocks.chunk,
    interpret=opt.interpret,
  )
  dq_sum = sums.query_gradient(
    *(dh, kept.C_BHPKV, C_parts, kept.n_BHNK, scores.pairs_BHTL, k),
    read_BHT=weights.read_BHT,
    bias_BHT=bias_BHT,
  )
  dk_sum = sums.key_gradient(
    *(v, D_BHPKV, D_parts, dn_BHNK, scores.pairs_BHTL, q, k),
    write_BHT=s.write_BHT,
  )
  dq, dk, dv = [*together([dq_sum, dk_sum, *late]), *early]
  di_BHT = scores.di_BHT + dv.dot_BHT
  through_BHN = _through(
    *(kept.C_BHPKV, C_parts, D_BHPKV, D_parts, kept.C_first_BHKV, dC_last),
    interpret=opt.interpret,
  )
  through_BHN += _total(kept.n_BHNK, dn_BHNK, axes=1)
  df_BHT = _forget_gradient(
    s.keep_BHN * through_BHN, dk.dot_BHT, reading_BHT - di_BHT
  )
  gates = (x.swapaxes(1, 2) for x in (di_BHT, df_BHT))
  of_tokens = dq.y_BTHO, dk.y_BTHO, dv.y_BTHO
  return *of_tokens, *gates, dC, dn, None, None, None, None


chunks_of_mlstm.defvjp(_forward, _backward)


def _readout_backward(opt: Options, s: Scales, weights: Weights, h, dh):
  """The gradient of u times g, and all that a token reads.

  That is the sum of its weights times their gradients, which in df has to
  cancel what tokens write to each other: both sides are made of the same
  rounded weights.
  """
  dot_BHT = jnp.sum(dh.astype(jnp.float32) * h, axis=-1).swapaxes(1, 2)
  _, extra_BHT = _floor(s, opt)
  # Where u itself divides, all weights of a reader together change h by
  # `extra` alone.
  share_BHT = jnp.where(
    weights.sign_BHT == 0, 1, extra_BHT * weights.inverse_BHT
  )
  return -weights.sign_BHT * dot_BHT, share_BHT * dot_BHT


def _forget_gradient(through_BHN, passed_BHT, net_BHT):
  """The gradient of log f at t, which is what crosses t.

  That is what goes through the whole chunk; what its tokens before t pass on
  to later chunks; and what its tokens from t on read, less what they write to
  each other (`net` has all that they write).
  """
  passed = passed_BHT.reshape(*through_BHN.shape, -1)
  net = net_BHT.reshape(passed.shape) + passed
  crossing = (
    through_BHN[..., None]
    + jnp.cumsum(passed, axis=3)
    - passed
    + sums_from(net)
  )
  return crossing.reshape(net_BHT.shape)


def _through(C_BHPKV, C_parts, D_BHPKV, D_parts, C_BHKV, D_BHKV, *, interpret):
  """States before chunks times gradients of those after.

  The kernels keep them rounded, some in two parts. The first state and the last
  gradient are there as they are.
  """
  chunks = C_parts.shape[-1]

  def kept(x_BHPKV, parts_BHN, at):
    rest = x_BHPKV[:, :, chunks + at].astype(jnp.float32)
    ruled = parts_BHN[..., at, None, None] > 1
    return x_BHPKV[:, :, at] + jnp.where(ruled, rest, 0)

  C, D, last = (C_BHPKV, C_parts), (D_BHPKV, D_parts), chunks - 1
  through_BHN = inner_products(
    C_BHPKV, D_BHPKV, C_parts, D_parts, interpret=interpret
  )
  first_BH = _total(C_BHKV - kept(*C, 0), kept(*D, 0), axes=2)
  last_BH = _total(kept(*C, last), D_BHKV - kept(*D, last), axes=2)
  return through_BHN.at[..., 0].add(first_BH).at[..., last].add(last_BH)


def _floor(s: Scales, opt: Options):
  """What the normaliser is at least, and what is added to it."""
  floor_BHT = jnp.maximum(jnp.exp(-s.gauge_BHT), jnp.finfo(jnp.float32).tiny)
  return floor_BHT, opt.eps * jnp.exp(s.m_BHT - s.gauge_BHT)


def _total(x, y, *, axes: int):
  """The sum of x y over so many of the last axes."""
  return jnp.sum(x * y, axis=tuple(range(-axes, 0)))
