"""Gates as the Hopper kernels read them: exponents per token and per chunk.

Everything here is float32 over [B, H, T], plain XLA, and constant to autodiff
but for `last_stabilizer`: the kernels' gradient is written by hand, and there
the stabiliser m is only a choice of scale.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.documents import Documents

LOG2_E = math.log2(math.e)


class Scales(NamedTuple):
  """The weight of token s in token t is 2^(reader_t + writer_s).

  Both count log f from the start of the chunk. N is the number of chunks.
  """

  reader_BHT: Float[Array, "B H T"]  # with K^-0.5 and the gauge of t
  writer_BHT: Float[Array, "B H T"]
  past_BHT: Float[Array, "B H T"]  # weight of the state before the chunk
  write_BHT: Float[Array, "B H T"]  # weight in the state after the chunk
  keep_BHN: Float[Array, "B H N"]  # weight of the state before in that after
  gauge_BHT: Float[Array, "B H T"]  # max(m, 0)
  m_BHT: Float[Array, "B H T"]
  m_last_BH: Float[Array, "B H"]  # scale of the state after the last chunk
  first_BT: Int[Array, "B T"]  # first token of the document in the chunk
  final_BT: Int[Array, "B T"]  # its last, both counted from the chunk's start


def scales(
  log_i_BTH: Float[Array, "B T H"],
  log_f_BTH: Float[Array, "B T H"],
  id_BT: Int[Array, "B T"],
  start_BT: Array,
  m_BH: Float[Array, "B H"],
  segment_B: Int[Array, "B"],
  *,
  chunk: int,
  key_dim: int,
  stabilize: bool,
) -> Scales:
  """Scales for chunks of `chunk` tokens, which divides T."""
  batch, time, heads = log_i_BTH.shape
  split = (batch, heads, time // chunk, chunk)
  i, f = (x.swapaxes(1, 2).reshape(split) for x in (log_i_BTH, log_f_BTH))
  id_ = id_BT.reshape(batch, 1, -1, chunk)
  start = start_BT.reshape(id_.shape)
  id_last = id_[..., -1]
  before = jnp.concatenate(
    [segment_B[:, None, None], id_last[..., :-1]], axis=-1
  )

  upto = jnp.cumsum(f, axis=-1)
  total = upto[..., -1]
  after = _sums_after(f)
  if stabilize:
    m, m_after = _stabilizers(i, f, upto, id_, start, m_BH, segment_B)
  else:
    m, m_after = jnp.zeros_like(i), jnp.zeros_like(total)
  m_before = jnp.concatenate([m_BH[..., None], m_after[..., :-1]], axis=-1)
  gauge = jnp.maximum(m, 0)

  continues = id_ == before[..., None]
  scale = key_dim**-0.5
  past = jnp.where(
    continues, scale * jnp.exp(upto + m_before[..., None] - gauge), 0
  )
  write = jnp.where(
    id_ == id_last[..., None], jnp.exp(after + i - m_after[..., None]), 0
  )
  keep = jnp.where(id_last == before, jnp.exp(total + m_before - m_after), 0)
  flat = (batch, heads, time)
  return Scales(
    ((upto - gauge) * LOG2_E + math.log2(scale)).reshape(flat),
    ((i - upto) * LOG2_E).reshape(flat),
    past.reshape(flat),
    write.reshape(flat),
    keep,
    gauge.reshape(flat),
    m.reshape(flat),
    m_after[..., -1],
    *(x.reshape(batch, time) for x in _borders(id_[:, 0])),
  )


def _stabilizers(i, f, upto, id_, start, m_BH, segment_B):
  """m of every token, and m after every chunk."""
  # The state before a document has m = 0, as if its first token had also
  # written with log i = log f.
  level = jnp.where(start, jnp.maximum(i, f), i) - upto
  inside = upto + _running_max(level, id_)

  # The same between chunks: a chunk writes with the level it ends on.
  id_last = id_[..., -1]
  total = jnp.cumsum(upto[..., -1], axis=-1)
  level = _running_max(inside[..., -1] - total, id_last)
  first = id_last == segment_B[:, None, None]
  level = jnp.maximum(level, jnp.where(first, m_BH[..., None], -jnp.inf))
  m_after = total + level

  m_before = jnp.concatenate([m_BH[..., None], m_after[..., :-1]], axis=-1)
  before = jnp.concatenate(
    [segment_B[:, None, None], id_last[..., :-1]], axis=-1
  )
  past = upto + m_before[..., None]
  past = jnp.where(id_ == before[..., None], past, -jnp.inf)
  return jnp.maximum(inside, past), m_after


def _sums_after(x):
  """y[..., t] = x[..., t+1] + ... + x[..., T-1]."""
  later = jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)
  return jax.lax.cumsum(later, axis=x.ndim - 1, reverse=True)


def _running_max(x, id_):
  """The largest x so far among those of the same document.

  By doubling the reach: XLA compiles a comparison of all pairs for minutes.
  """
  reach, length = 1, x.shape[-1]
  id_ = jnp.broadcast_to(id_, x.shape)
  while reach < length:
    shift = [(0, 0)] * (x.ndim - 1) + [(reach, 0)]
    before = jnp.pad(x[..., :-reach], shift, constant_values=-jnp.inf)
    same = jnp.pad(id_[..., :-reach], shift, constant_values=-1) == id_
    x = jnp.maximum(x, jnp.where(same, before, -jnp.inf))
    reach *= 2
  return x


def _borders(id_):
  """First and last token of every token's document in its chunk."""
  last = id_.shape[-1] - 1
  place = jnp.arange(last + 1, dtype=jnp.int32)
  change = id_[..., 1:] != id_[..., :-1]
  one = jnp.ones_like(change[..., :1])
  starts = jnp.concatenate([one, change], axis=-1)
  ends = jnp.concatenate([change, one], axis=-1)
  axis = id_.ndim - 1
  return (
    jax.lax.cummax(jnp.where(starts, place, 0), axis=axis),
    jax.lax.cummin(jnp.where(ends, place, last), axis=axis, reverse=True),
  )


def last_stabilizer(
  log_i_BTH: Float[Array, "B T H"],
  log_f_BTH: Float[Array, "B T H"],
  documents: Documents,
  m_BH: Float[Array, "B H"],
  segment_B: Int[Array, "B"],
) -> Float[Array, "B H"]:
  """m after the last token, with its gradient; of equals the earliest."""
  id_BT = documents.id_BT
  i, f = log_i_BTH.swapaxes(1, 2), log_f_BTH.swapaxes(1, 2)
  after = _sums_after(f)
  last_B1T = (id_BT == id_BT[:, -1:])[:, None]
  start_B1T = documents.start_BT[:, None]
  # A start's m = 0 comes before its token, the given state before them all.
  written = jnp.where(last_B1T, after + i, -jnp.inf)
  started = jnp.where(last_B1T & start_B1T, after + f, -jnp.inf)
  given_BH = jnp.where(
    (id_BT[:, -1] == segment_B)[:, None], m_BH + jnp.sum(f, axis=-1), -jnp.inf
  )
  candidates = jnp.concatenate(
    [
      given_BH[..., None],
      jnp.stack([started, written], axis=-1).reshape(*given_BH.shape, -1),
    ],
    axis=-1,
  )
  choice = jax.lax.stop_gradient(jnp.argmax(candidates, axis=-1))
  return jnp.take_along_axis(candidates, choice[..., None], axis=-1)[..., 0]
