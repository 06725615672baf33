"""The mLSTM on Hopper GPUs: chunks in Pallas Mosaic GPU kernels.

Each step is parallel over batch rows and heads: gates in plain XLA
(`pallas_gpu_gates`), the states that enter every chunk (`scan_states`), the
weights of pairs of tokens inside chunks (`weigh`), and the sums by these
weights (`combine`). docs/kernels.md has the reasoning and the measurements.
"""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from xlstm_jax.cells.backends import this_device
from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.mlstm.pallas_gpu_blocks import (
  CHUNKS,
  Blocks,
  best,
  padded,
  padded_keys,
  values_apart,
)
from xlstm_jax.cells.mlstm.pallas_gpu_gates import (
  Scales,
  last_stabilizer,
  parts_of_states,
  scales,
  sums_from,
)
from xlstm_jax.cells.mlstm.state import State

MULTIPROCESSORS = 132
MAX_DIM = 1280
# Names of Hopper GPUs: a mesh of described devices tells no capability.
_HOPPER = re.compile(r"NVIDIA G?H\d")


@dataclasses.dataclass(frozen=True)
class _Options:
  """What is static in the kernels' forward and backward pass."""

  blocks: Blocks
  key_dim: int  # before padding: the queries are scaled by key_dim^-0.5
  stabilize: bool
  normalize: bool
  eps: float
  interpret: Any


def pallas_gpu(
  q_BTHK: Float[Array, "B T H K"],
  k_BTHK: Float[Array, "B T H K"],
  v_BTHV: Float[Array, "B T H V"],
  log_i_BTH: Float[Array, "B T H"],
  log_f_BTH: Float[Array, "B T H"],
  documents: Documents,
  state: State,
  *,
  stabilize: bool,
  normalize: bool,
  eps: float,
  chunk: int | None = None,
  interpret: Any = None,
) -> tuple[Float[Array, "B T H V"], State]:
  """`recurrent` on a Hopper GPU, in bfloat16 and chunks of 128 or 256 tokens.

  The gradient is the true one but for the stabiliser in `eps exp(m)`, which
  counts as a constant. With `interpret` (`InterpretGPUParams`) the kernels'
  logic runs on any device, slowly.
  """
  key_dim, value_dim = q_BTHK.shape[-1], v_BTHV.shape[-1]
  blocks = best(this_device().device_kind, key_dim, value_dim)
  if chunk is not None:
    blocks = blocks._replace(chunk=chunk)
  chunk = blocks.chunk
  time = q_BTHK.shape[1]
  past = _rescaled(state, jax.lax.stop_gradient(state.m_BH))

  def pad(x, *, time_fill=None, dim=None, to=padded):
    widths = [(0, 0)] * x.ndim
    if time_fill is not None:
      widths[1] = (0, -time % chunk)
    if dim is not None:
      widths[dim] = (0, to(x.shape[dim]) - x.shape[dim])
    if all(width == (0, 0) for width in widths):
      return x
    if time_fill == "edge":
      return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=time_fill or 0)

  starts_BT = documents.start_BT
  if -time % chunk:
    starts_BT = jnp.pad(starts_BT, ((0, 0), (0, -time % chunk)))
  h_BTHV, C_BHKV, n_BHK, m_BH = _mlstm(
    _Options(blocks, key_dim, stabilize, normalize, eps, interpret),
    pad(q_BTHK, time_fill=0, dim=3, to=padded_keys),
    pad(k_BTHK, time_fill=0, dim=3, to=padded_keys),
    pad(v_BTHV, time_fill=0, dim=3),
    pad(log_i_BTH, time_fill=-jnp.inf),
    pad(log_f_BTH, time_fill=0),
    pad(pad(past.C_BHKV, dim=2, to=padded_keys), dim=3),
    pad(past.n_BHK, dim=2, to=padded_keys),
    past.m_BH,
    past.segment_B,
    pad(documents.id_BT, time_fill="edge"),
    starts_BT,
  )
  last = State(
    C_BHKV[..., :key_dim, :value_dim],
    n_BHK[..., :key_dim],
    m_BH,
    documents.last_B,
  )
  if stabilize:
    m_BH = last_stabilizer(
      log_i_BTH, log_f_BTH, documents, state.m_BH, state.segment_B
    )
    last = _rescaled(last, m_BH)
  return h_BTHV[:, :time, :, :value_dim], last


def refusal(
  dtype: DTypeLike, key_dim: int, value_dim: int, chunk: int
) -> str | None:
  """Why the kernels do not take such arrays, or None."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f"it computes in bfloat16, and the tokens are {jnp.dtype(dtype)}"
  if max(key_dim, value_dim) > MAX_DIM:
    return (
      f"heads of {key_dim} keys and {value_dim} values exceed {MAX_DIM} numbers"
    )
  if chunk not in CHUNKS:
    return f"chunk is {chunk}, and it takes chunks of 128 or 256 tokens"
  return None


def device_refusal(device: Any = None) -> str | None:
  """Why the kernels do not run on a device, or None; by default on this one."""
  device = device or this_device()
  if isinstance(device, jax.Device):
    hopper = getattr(device, "compute_capability", None) == "9.0"
  else:
    hopper = _HOPPER.match(device.device_kind) is not None
  if device.platform != "gpu" or not hopper:
    return (
      "it needs a Hopper GPU (compute capability 9.0), and the device is "
      f"{device.device_kind}"
    )
  return None


def _kernels():
  # Pallas takes seconds to import, and only Hopper GPUs need it.
  from xlstm_jax.cells.mlstm import pallas_gpu_kernels

  return pallas_gpu_kernels


def _rescaled(state: State, m_BH) -> State:
  """The same state with C and n scaled by exp(-m_BH).

  For the kernels the scale is a constant; outside, m is a variable.
  """
  factor_BH = jnp.exp(state.m_BH - m_BH)
  C_BHKV = factor_BH[..., None, None] * state.C_BHKV
  n_BHK = factor_BH[..., None] * state.n_BHK
  return State(C_BHKV, n_BHK, m_BH, state.segment_B)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlstm(opt, q, k, v, log_i, log_f, C, n, m, segment, id_, start):
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
  parts = parts_of_states(s, C)
  if not opt.normalize:
    parts = jnp.ones_like(parts)
  C_BHPKV, n_BHNK, C_last, n_last = _states(
    k, v, s.write_BHT, s.write_BHT, s.keep_BHN, parts[..., :-1], C, n, opt=opt
  )
  floor_BHT, extra_BHT = _floor(s, opt)
  read = _kernels().weigh(
    q,
    k,
    n_BHNK,
    row_BHT=s.reader_BHT,
    column_BHT=s.writer_BHT,
    past_BHT=s.past_BHT,
    border_BT=s.first_BT,
    to=_kernels().Normalizer(floor_BHT, extra_BHT, opt.normalize),
    chunk=opt.blocks.chunk,
    interpret=opt.interpret,
  )
  state = (C_BHPKV, parts[..., :-1])
  (results,) = _kernels().combine(
    [_kernels().Sum("h", q, *state, read["pairs"], v, read["past"], low=keep)],
    chunk=opt.blocks.chunk,
    columns=opt.blocks.sum_columns,
    interpret=opt.interpret,
  )
  h, low = results["y"], results.get("low")
  kept = (q, k, v, h, low, read, s, C, C_BHPKV, n_BHNK, parts)
  return (h, C_last, n_last, s.m_last_BH), kept


def _backward(opt, kept, cotangents):
  q, k, v, h, low, read, s, C, C_BHPKV, n_BHNK, parts = kept
  dh, dC_last, dn_last, _ = cotangents
  # Else the compiler makes dh anew for each of the results that follow.
  dh = jax.lax.optimization_barrier(dh)
  width = _kernels().out_width(opt.blocks.sum_columns, h.shape[-1])
  h = _kernels().exact(h, low, width=width)
  bias_BHT, reading_BHT = _readout_backward(opt, s, read, h, dh)
  # The gradient of a state has as many parts as the state: they cancel in the
  # gradients of the tokens that rule it.
  C_parts, D_parts = parts[..., :-1], parts[..., 1:]
  D_BHPKV, dn_BHNK, dC, dn = _states(
    q,
    dh,
    read["past"],
    read["past"] * bias_BHT,
    s.keep_BHN,
    D_parts,
    dC_last,
    dn_last,
    opt=opt,
    reverse=True,
  )
  sum_ = _kernels().Sum
  combine = partial(
    _kernels().combine,
    chunk=opt.blocks.chunk,
    columns=opt.blocks.gradient_columns,
    interpret=opt.interpret,
  )
  sums = [
    sum_(
      "dv",
      k,
      D_BHPKV,
      D_parts,
      read["pairs"],
      dh,
      s.write_BHT,
      partner_BTHO=v,
    )
  ]
  early = []
  if values_apart(q.shape[-1]):
    early, sums = combine(sums), []
    # `weigh` comes after it, and may write where the weights were.
    early, dn_BHNK = jax.lax.optimization_barrier((early, dn_BHNK))
  written = _kernels().weigh(
    k,
    q,
    dn_BHNK,
    row_BHT=s.writer_BHT,
    column_BHT=s.reader_BHT,
    past_BHT=s.write_BHT,
    border_BT=s.final_BT,
    to=_kernels().Cotangents(v, dh, bias_BHT, read["inverse"]),
    chunk=opt.blocks.chunk,
    interpret=opt.interpret,
  )
  dscores_BHTZ = written["pairs"]
  sum_q = sum_(
    "dq",
    dh,
    C_BHPKV,
    C_parts,
    dscores_BHTZ,
    k,
    read["past"],
    bias_BHT=bias_BHT,
    vector_BHNO=n_BHNK,
  )
  sum_k = sum_(
    "dk",
    v,
    D_BHPKV,
    D_parts,
    dscores_BHTZ,
    q,
    s.write_BHT,
    vector_BHNO=dn_BHNK,
    partner_BTHO=k,
  )
  of_q, of_k, of_v = [*combine([sum_q, sum_k, *sums]), *early]
  di_BHT = written["dot"] + of_v["dot"]
  passed_BHT = of_k["dot"]

  through_BHN = _through(
    *(C_BHPKV, C_parts, D_BHPKV, D_parts, C, dC_last), interpret=opt.interpret
  )
  through_BHN += _total(n_BHNK, dn_BHNK, of=1)
  df_BHT = _forget_gradient(
    s.keep_BHN * through_BHN, passed_BHT, reading_BHT - di_BHT
  )
  gates = (x.swapaxes(1, 2) for x in (di_BHT, df_BHT))
  return of_q["y"], of_k["y"], of_v["y"], *gates, dC, dn, None, None, None, None


_mlstm.defvjp(_forward, _backward)


def _readout_backward(opt, s: Scales, read, h, dh):
  """The cotangent of u times what divides, and all that a token reads.

  That is the sum of its weights times their cotangents, which in df has to
  cancel what tokens write to each other: both sides are made of the same
  rounded weights.
  """
  dot_BHT = jnp.sum(dh.astype(jnp.float32) * h, axis=-1).swapaxes(1, 2)
  _, extra_BHT = _floor(s, opt)
  # Where u itself divides, all weights of a reader together change h by
  # `extra` alone.
  share_BHT = jnp.where(read["sign"] == 0, 1, extra_BHT * read["inverse"])
  return -read["sign"] * dot_BHT, share_BHT * dot_BHT


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
  through_BHN = _kernels().inner_products(
    C_BHPKV, D_BHPKV, C_parts, D_parts, interpret=interpret
  )
  first_BH = _total(C_BHKV - kept(*C, 0), kept(*D, 0), of=2)
  last_BH = _total(kept(*C, last), D_BHKV - kept(*D, last), of=2)
  return through_BHN.at[..., 0].add(first_BH).at[..., last].add(last_BH)


def _floor(s: Scales, opt: _Options):
  """What the normaliser is at least, and what is added to it."""
  floor_BHT = jnp.maximum(jnp.exp(-s.gauge_BHT), jnp.finfo(jnp.float32).tiny)
  return floor_BHT, opt.eps * jnp.exp(s.m_BHT - s.gauge_BHT)


def _total(x, y, *, of: int):
  """The sum of x y over the last `of` axes."""
  return jnp.sum(x * y, axis=tuple(range(-of, 0)))


def _states(k, v, write, write_n, keep, parts, C, n, *, opt, reverse=False):
  """`scan_states`, in spans where rows and heads alone leave the GPU idle.

  Spans start from what all spans before them leave, which takes a first pass
  that keeps only their ends.
  """
  scan = partial(
    _kernels().scan_states,
    k,
    v,
    write,
    write_n,
    keep,
    parts,
    chunk=opt.blocks.chunk,
    columns=opt.blocks.state_columns,
    reverse=reverse,
    interpret=opt.interpret,
  )
  batch, heads, chunks = keep.shape
  blocks = _kernels().scan_blocks(
    k.shape[-1], v.shape[-1], opt.blocks.state_columns
  )
  spans = _spans(chunks, batch * heads * math.prod(blocks))
  if spans > 1:
    zeros = jnp.zeros_like(C)[:, :, None].repeat(spans, axis=2)
    zeros_n = jnp.zeros_like(n)[:, :, None].repeat(spans, axis=2)
    _, _, ends, ends_n = scan(zeros, zeros_n, save=False)
    kept = keep[..., ::-1] if reverse else keep
    kept = jnp.prod(kept.reshape(batch, heads, spans, -1), axis=-1)
    C, n = (_firsts(kept, x, x_ends) for x, x_ends in ((C, ends), (n, ends_n)))
  else:
    C, n = C[:, :, None], n[:, :, None]
  states, vectors, ends, ends_n = scan(C, n)
  return states, vectors, ends[:, :, -1], ends_n[:, :, -1]


def _firsts(kept_BHS, first, ends_BHS):
  """The states that enter the spans, given what each leaves of nothing."""
  spans = kept_BHS.shape[-1]
  s, r, u = np.ogrid[:spans, :spans, :spans]
  factor_BHSR = jnp.prod(
    jnp.where((r <= u) & (u < s), kept_BHS[..., None, None, :], 1), axis=-1
  )
  factor_BHSR = jnp.where(r[..., 0] <= s[..., 0], factor_BHSR, 0)
  sources = jnp.concatenate([first[:, :, None], ends_BHS[:, :, :-1]], axis=2)
  return jnp.einsum(
    "bhsr,bhr...->bhs...", factor_BHSR, sources, precision="highest"
  )


def _spans(chunks: int, blocks: int) -> int:
  """Into how many spans the chunks are cut, given the blocks of one span.

  It is the power of 2 with the shortest way of chunks, counting a first pass,
  and no more than fill the GPU.
  """

  def way(spans):
    waves = -(-spans * blocks // MULTIPROCESSORS)
    return (1 if spans == 1 else 2) * waves / spans

  choices = [1]
  while choices[-1] * blocks < MULTIPROCESSORS and (
    chunks % (2 * choices[-1]) == 0
  ):
    choices.append(2 * choices[-1])
  return min(choices, key=way)
