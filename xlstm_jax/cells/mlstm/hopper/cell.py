"""The mLSTM backend `pallas_gpu`: what it takes, and what it pads."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from xlstm_jax.cells.backends import this_device
from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  CHUNKS,
  MAX_DIM,
  best,
  padded,
  padded_keys,
)
from xlstm_jax.cells.mlstm.scales import last_stabilizer
from xlstm_jax.cells.mlstm.state import State


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
  # Pallas takes seconds to import, and only Hopper GPUs need it.
  from xlstm_jax.cells.mlstm.hopper.vjp import Options, chunks_of_mlstm

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
  h_BTHV, C_BHKV, n_BHK, m_BH = chunks_of_mlstm(
    Options(blocks, key_dim, stabilize, normalize, eps, interpret),
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


def _rescaled(state: State, m_BH) -> State:
  """The same state with C and n scaled by exp(-m_BH).

  For the kernels the scale is a constant; outside, m is a variable.
  """
  factor_BH = jnp.exp(state.m_BH - m_BH)
  C_BHKV = factor_BH[..., None, None] * state.C_BHKV
  n_BHK = factor_BH[..., None] * state.n_BHK
  return State(C_BHKV, n_BHK, m_BH, state.segment_B)
