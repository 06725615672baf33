"""The mLSTM on TPUs: gates in plain XLA, chunks in two Pallas kernels.

docs/kernels_tpu.md has the design.
"""

import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from xlstm_jax.cells.backends import this_device
from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.mlstm.scales import (
  last_stabilizer,
  parts_of_states,
  scales,
  sums_from,
)
from xlstm_jax.cells.mlstm.state import State, rescale

# By which "auto" decides (`xlstm_jax.cells.tpu_costs`).
COSTS = pathlib.Path(__file__).with_name("compiled.json")
# Tokens of a chunk; None takes the longest that fits.
CHUNKS = (256, 128)
# Heads are padded to multiples of it.
LANES = 64
# What the kernels may have of a core's VMEM, by the kind of the device: the
# rest is the compiler's.
_MIB = 2**20
VMEM = {
  **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 100 * _MIB),
  **dict.fromkeys(("TPU v5", "TPU v5p"), 58 * _MIB),
  **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 100 * _MIB),
  "TPU7x": 58 * _MIB,
}


class _Options(NamedTuple):
  """What is static in the forward and the backward pass."""

  key_dim: int  # before padding: the queries are scaled by key_dim^-0.5
  stabilize: bool
  cell: Any  # `kernels.Cell`


def pallas_tpu(
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
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], State]:
  """`recurrent` on a TPU, in bfloat16 and chunks of 128 or 256 tokens.

  The gradient is the true one but for the stabiliser in `eps exp(m)`, which
  counts as a constant. With `interpret` (`pltpu.InterpretParams`) the kernels'
  logic runs on any device, slowly.
  """
  T, K, V = q_BTHK.shape[1], q_BTHK.shape[-1], v_BTHV.shape[-1]
  # Interpret mode runs elsewhere, and knows no limit.
  device_kind = this_device().device_kind
  vmem = VMEM.get(device_kind, max(VMEM.values()))
  if chunk is None:
    chunk = best_chunk(device_kind, K, V)
  cell = _kernels().Cell(chunk, normalize, eps, vmem, interpret)

  def pad(x, axis: int, to: int, **options):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % to)
    return jnp.pad(x, widths, **options) if widths[axis][1] else x

  def tokens(x_BTHD):
    return pad(pad(x_BTHD.swapaxes(1, 2), 2, chunk), 3, LANES)

  past = rescale(state, jax.lax.stop_gradient(state.m_BH))
  h_BHTV, C_BHKV, n_BHK, m_BH = _mlstm(
    _Options(K, stabilize, cell),
    tokens(q_BTHK),
    tokens(k_BTHK),
    tokens(v_BTHV),
    pad(log_i_BTH, 1, chunk, constant_values=-jnp.inf),
    pad(log_f_BTH, 1, chunk),
    pad(pad(past.C_BHKV, 2, LANES), 3, LANES),
    pad(past.n_BHK, 2, LANES),
    past.m_BH,
    past.segment_B,
    pad(documents.id_BT, 1, chunk, mode="edge"),
    pad(documents.start_BT, 1, chunk),
  )
  last = State(C_BHKV[..., :K, :V], n_BHK[..., :K], m_BH, documents.last_B)
  if stabilize:
    m_BH = last_stabilizer(
      log_i_BTH, log_f_BTH, documents, state.m_BH, state.segment_B
    )
    last = rescale(last, m_BH)
  return h_BHTV[:, :, :T, :V].swapaxes(1, 2), last


def refusal(
  device: Any, dtype: DTypeLike, key_dim: int, value_dim: int, chunk: int | None
) -> str | None:
  """Why the kernels do not take such arrays on a TPU, or None."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f"it computes in bfloat16, and the tokens are {jnp.dtype(dtype)}"
  if chunk not in (None, *CHUNKS):
    return f"chunk is {chunk}, and it takes chunks of 128 or 256 tokens"
  shortest, vmem = chunk or min(CHUNKS), VMEM[device.device_kind]
  needed = needed_vmem(shortest, key_dim, value_dim)
  if needed > vmem:
    return (
      f"heads of {key_dim} keys and {value_dim} values in chunks of {shortest} "
      f"tokens need {needed / _MIB:.0f} MiB of VMEM, and kernels may use "
      f"{vmem / _MIB:.0f} MiB of a {device.device_kind}"
    )
  return None


def device_refusal(device: Any = None) -> str | None:
  """Why the kernels do not run on a device, or None; by default on this one."""
  device = device or this_device()
  if device.platform != "tpu" or device.device_kind not in VMEM:
    return (
      "it needs a TPU v5e, v5p, v6e or 7x, and the device is "
      f"{device.device_kind}"
    )
  return None


def best_chunk(device_kind: str, key_dim: int, value_dim: int) -> int:
  """Tokens of a chunk: the longest that fits, or the shortest."""
  vmem = VMEM.get(device_kind, max(VMEM.values()))
  fit = [L for L in CHUNKS if needed_vmem(L, key_dim, value_dim) <= vmem]
  return max(fit, default=min(CHUNKS))


def needed_vmem(chunk: int, key_dim: int, value_dim: int) -> int:
  """Bytes of VMEM of the backward kernel, which needs more than the forward.

  Blocks of arrays are there twice, one being copied while the other is used.
  """
  K, V = (dim + -dim % 128 for dim in (key_dim, value_dim))
  tokens = 2 * 2 * chunk * (4 * K + 3 * V)
  # C; what rounding took from it; D before the first chunk and as it runs.
  states = K * V * (2 * 2 + 2 + 2 * 4 + 2 * 4)
  # D in two parts; pairs of tokens and sums that do not fit into registers.
  inside = K * V * 8 + 4 * chunk * (6 * chunk + 3 * K + 2 * V)
  return tokens + states + inside


def _kernels():
  # Pallas takes seconds to import, and only TPUs need it.
  from xlstm_jax.cells.mlstm.tpu import kernels

  return kernels


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlstm(opt, q, k, v, log_i, log_f, C, n, m, segment, id_, start):
  args = (q, k, v, log_i, log_f, C, n, m, segment, id_, start)
  return _forward(opt, *args, save=False)[0]


def _forward(
  opt, q, k, v, log_i, log_f, C, n, m, segment, id_, start, save=True
):
  found = scales(
    *(log_i, log_f, id_, start, m, segment),
    chunk=opt.cell.chunk,
    key_dim=opt.key_dim,
    stabilize=opt.stabilize,
  )
  parts = parts_of_states(found, C)
  two_BHN = (jnp.maximum(parts[..., :-1], parts[..., 1:]) == 2).astype(
    jnp.int32
  )
  tokens = (q, k, v, _rows(found, opt), found.keep_BHN, two_BHN)
  h, C, n, *saved = _kernels().forward(*tokens, C, n, cell=opt.cell, save=save)
  return (h, C, n[:, :, 0], found.m_last_BH), (*tokens, tuple(saved))


def _rows(found, opt: _Options) -> Float[Array, "B H N G L"]:
  """The gates of every chunk, a row each, in the kernels' order."""
  first_BHT = jnp.broadcast_to(
    found.first_BT[:, None].astype(jnp.float32), found.m_BHT.shape
  )
  rows = [
    *found.reader_BHT,
    *found.writer_BHT,
    found.past_BHT,
    found.write_BHT,
    found.m_BHT,
    first_BHT,
  ]
  chunks = (*found.keep_BHN.shape, opt.cell.chunk)
  return jnp.stack([x.reshape(chunks) for x in rows], axis=3)


def _backward(opt, kept, cotangents):
  q, k, v, gates, keep_BHN, two_BHN, saved = kept
  dh, D, dn, _ = cotangents
  dq, dk, dv, rows, dC, dn = _kernels().backward(
    q, k, v, dh, gates, keep_BHN, two_BHN, saved, D, dn, cell=opt.cell
  )
  written, read, passed, through = jnp.unstack(rows, axis=3)
  # The gradient of log f at t is what crosses t: what goes through the whole
  # chunk, what tokens before t pass on to later chunks, and what tokens from t
  # on read, less what they write to each other.
  crossing = through + (jnp.cumsum(passed, axis=3) - passed)
  crossing += sums_from(read - written)

  def of_tokens(x_BHNL):
    return x_BHNL.reshape(*x_BHNL.shape[:2], -1).swapaxes(1, 2)

  gates = (of_tokens(written + passed), of_tokens(crossing))
  return dq, dk, dv, *gates, dC, dn[:, :, 0], None, None, None, None


_mlstm.defvjp(_forward, _backward)
