"""Gates as the kernels read them: exponents per token and per chunk.

Every platform's kernel starts from these. Everything here is float32 over
[B, H, T], plain XLA, and constant to autodiff but for `last_stabilizer`: the
kernels' gradient is written by hand, and there the stabiliser m is only a
choice of scale.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.documents import Documents

# Sums of log f are kept in two parts: multiples of 1/GRID, whose sums and
# differences are exact, and small rests. exp(LOWEST) is 0, and a chunk's sum
# of it still has all its bits.
GRID = 16
LOWEST = -4096.0
# A state is kept in two parts where less than FEW tokens rule it, and loudly:
# what they make of n^T q is LOUD times the 1 below which it does not divide.
FEW = 4.0
LOUD = 4.0


Parts = list[Float[Array, "B H T"]]


class Scales(NamedTuple):
  """The weight of token s in token t is exp(reader_t + writer_s).

  Both count log f from the start of the chunk and are the sum of two parts,
  which are to be added to those of the other before they are to each other. N
  is the number of chunks.
  """

  reader_BHT: Parts  # with K^-0.5 and the gauge of t
  writer_BHT: Parts
  past_BHT: Float[Array, "B H T"]  # weight of the state before the chunk
  write_BHT: Float[Array, "B H T"]  # weight in the state after the chunk
  keep_BHN: Float[Array, "B H N"]  # weight of the state before in that after
  gauge_BHT: Float[Array, "B H T"]  # max(m, 0)
  m_BHT: Float[Array, "B H T"]
  m_state_BHN: Float[Array, "B H _"]  # scale of the states between chunks
  first_BT: Int[Array, "B T"]  # first token of the document in the chunk
  final_BT: Int[Array, "B T"]  # its last, both counted from the chunk's start

  @property
  def m_last_BH(self) -> Float[Array, "B H"]:
    """Scale of the state after the last chunk."""
    return self.m_state_BHN[..., -1]


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
  f = jnp.maximum(f, LOWEST)
  id_ = id_BT.reshape(batch, 1, -1, chunk)
  start = start_BT.reshape(id_.shape)
  id_last = id_[..., -1]
  before = jnp.concatenate(
    [segment_B[:, None, None], id_last[..., :-1]], axis=-1
  )

  upto = _each(partial(jnp.cumsum, axis=-1), _parts(f))
  total = _each(lambda x: x[..., -1], upto)
  if stabilize:
    m, m_after = _stabilizers(i, f, sum(upto), id_, start, m_BH, segment_B)
  else:
    m, m_after = jnp.zeros_like(i), jnp.zeros_like(total[0])
  m_before = jnp.concatenate([m_BH[..., None], m_after[..., :-1]], axis=-1)
  gauge = jnp.maximum(m, 0)

  writer = _each(jnp.subtract, _parts(i), upto)
  reader = _each(jnp.subtract, upto, _parts(gauge))
  scale = key_dim**-0.5
  continues = id_ == before[..., None]
  past = sum(_each(jnp.add, reader, _parts(m_before[..., None])))
  past = jnp.where(continues, scale * jnp.exp(past), 0)
  reader[1] += math.log(scale)
  after = _each(_sums_after, _parts(f))
  write = _each(jnp.subtract, _parts(i), _parts(m_after[..., None]))
  write = sum(_each(jnp.add, after, write))
  write = jnp.where(id_ == id_last[..., None], jnp.exp(write), 0)
  keep = _each(jnp.subtract, _parts(m_before), _parts(m_after))
  keep = sum(_each(jnp.add, total, keep))
  keep = jnp.where(id_last == before, jnp.exp(keep), 0)
  flat = (batch, heads, time)
  return Scales(
    [x.reshape(flat) for x in reader],
    [x.reshape(flat) for x in writer],
    past.reshape(flat),
    write.reshape(flat),
    keep,
    gauge.reshape(flat),
    m.reshape(flat),
    jnp.concatenate([m_BH[..., None], m_after], axis=-1),
    *(x.reshape(batch, time) for x in _borders(id_[:, 0])),
  )


def _parts(x):
  """x as a multiple of 1/GRID and a rest."""
  coarse = jnp.round(x * GRID) / GRID
  return [coarse, jnp.where(jnp.isfinite(x), x - coarse, 0)]


def _each(function, *operands):
  """What it makes of the first parts, and of the second."""
  return [function(*parts) for parts in zip(*operands, strict=True)]


def _stabilizers(i, f, upto, id_, start, m_BH, segment_B):
  """m of every token, and the scale of the state after every chunk."""
  # The state before a document has m = 0, as if its first token had also
  # written with log i = log f.
  inside = _running_max(jnp.where(start, jnp.maximum(i, f), i), f, id_)
  # Otherwise the compiler makes it again for every result that follows.
  inside = jax.lax.optimization_barrier(inside)
  # The same between chunks: a chunk writes with the level it ends on.
  id_last, level = id_[..., -1], inside[..., -1]
  total = upto[..., -1]
  m_after = _running_max(level, total, id_last)
  given = m_BH[..., None] + jnp.cumsum(total, axis=-1)
  given = jnp.where(id_last == segment_B[:, None, None], given, -jnp.inf)
  m_after = jnp.maximum(m_after, given)

  m_before = jnp.concatenate([m_BH[..., None], m_after[..., :-1]], axis=-1)
  before = jnp.concatenate(
    [segment_B[:, None, None], id_last[..., :-1]], axis=-1
  )
  past = upto + m_before[..., None]
  past = jnp.where(id_ == before[..., None], past, -jnp.inf)
  # Powers of 2 apart from what it writes with, which is then as exact as in
  # its own scale: the keys of its loudest token stay what they are.
  steps = jnp.ceil((m_after - level) / math.log(2))
  scale = jnp.where(jnp.isfinite(level), level + steps * math.log(2), m_after)
  # What is scaled by it and what corrects for that read one number: made anew
  # by a fused multiply-add it would be another.
  scale = jax.lax.optimization_barrier(scale)
  return jnp.maximum(inside, past), scale


def parts_of_states(
  scales: Scales, first_BHKV: Float[Array, "B H K V"]
) -> Int[Array, "B H _"]:
  """In how many parts the states between chunks are kept: 1, or 2.

  In one part C is rounded to 8 bits, which changes C^T q by 1e-3 of its usual
  size; n is not rounded. If C is the sum of few tokens, C^T q and n^T q are far
  smaller for some q: for one q in a thousand by a factor of 1e-3 with one
  token, of 0.05 with two of equal weight, and of 0.15 with four. Where n^T q
  then still divides, h is what rounding left of C. It does not divide where it
  is below 1, so nothing is lost where it hardly ever exceeds that.

  How many tokens rule is (sum of w^2)^2 / (sum of w^4), over their weights w:
  N of N tokens of equal weight. For n^T q of queries and keys of unit variance
  the sum of w^2 is the variance.

  Args:
    scales: of the tokens.
    first_BHKV: the first state. Of one that was given, no more is known than
      how large it is, so it has two parts itself; later states count it as a
      single token.
  """
  keep_BHN = scales.keep_BHN
  w_BHNL = scales.write_BHT.reshape(*keep_BHN.shape, -1)
  first_BH = jnp.sqrt(jnp.mean(jnp.square(first_BHKV), axis=(2, 3)))
  largest_BH = jnp.maximum(first_BH, jnp.max(w_BHNL, axis=(2, 3)))
  unit_BH = jnp.where(largest_BH > 0, largest_BH, 1)

  def powers(x, power: int):
    return jnp.stack([x**power, x ** (2 * power)])

  # Sums of w^2 and of w^4 that enter and leave chunks, w in the unit.
  first = powers(first_BH / unit_BH, 2)[..., None]
  sums = powers(w_BHNL / unit_BH[..., None, None], 2).sum(-1)
  x = jnp.concatenate([first, sums], axis=-1)
  keep = jnp.concatenate([jnp.zeros_like(first), powers(keep_BHN, 2)], axis=-1)
  # x_n = keep_n x_{n-1} + x_n, by doubling the reach.
  reach = 1
  while reach < x.shape[-1]:
    x += keep * _shifted(x, reach, 0)
    keep *= _shifted(keep, reach, 0)
    reach *= 2
  square, fourth = x
  few = jnp.square(square) < FEW * fourth
  size = jnp.sqrt(square) * unit_BH[..., None] * jnp.exp(scales.m_state_BHN)
  two = few & (size > LOUD)
  two = two.at[..., 0].set(first_BH > 0)
  return jnp.where(two, 2, 1).astype(jnp.int32)


def _shifted(x, by: int, fill):
  """x of `by` places before, and before the first `fill`."""
  widths = [(0, 0)] * (x.ndim - 1) + [(by, 0)]
  return jnp.pad(x[..., :-by], widths, constant_values=fill)


def sums_from(x):
  """y[..., t] = x[..., t] + ... + x[..., T-1].

  Turned round twice: of a cumsum in reverse XLA makes one with T^2 sums on
  GPUs.
  """
  return jnp.cumsum(x[..., ::-1], axis=-1)[..., ::-1]


def _sums_after(x):
  """y[..., t] = x[..., t+1] + ... + x[..., T-1]."""
  later = jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)
  return sums_from(later)


def _running_max(x, f, id_):
  """m_t = max(m_{t-1} + f_t, x_t), from nothing where a document begins.

  By doubling the reach: XLA compiles a comparison of all pairs for minutes,
  and the sums between two tokens are not differences of long ones.
  """
  reach, length = 1, x.shape[-1]
  id_ = jnp.broadcast_to(id_, x.shape)
  while reach < length:
    before = _shifted(x, reach, -jnp.inf)
    same = _shifted(id_, reach, -1) == id_
    x = jnp.maximum(x, jnp.where(same, before + f, -jnp.inf))
    f += _shifted(f, reach, 0)
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
