"""The definition of the mLSTM: one token after the other."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.mlstm.gates import larger
from xlstm_jax.cells.mlstm.state import State, reading_scale, readout


class Token(NamedTuple):
  """The inputs of one step."""

  q_BHK: Float[Array, "B H K"]
  k_BHK: Float[Array, "B H K"]
  v_BHV: Float[Array, "B H V"]
  log_i_BH: Float[Array, "B H"]
  log_f_BH: Float[Array, "B H"]
  start_B: Bool[Array, "B"]


def step(
  state: State, token: Token, *, stabilize: bool, normalize: bool, eps: float
) -> tuple[State, Float[Array, "B H V"]]:
  """One token, as defined in `recurrent`."""
  q, k, v, log_i, log_f, start = token
  C, n, m = (
    jnp.where(start.reshape(-1, *(1,) * (x.ndim - 1)), 0, x) for x in state[:3]
  )
  carried = log_f + m
  m = larger(carried, log_i) if stabilize else m
  forget, write = jnp.exp(carried - m), jnp.exp(log_i - m)
  C = forget[..., None, None] * C + (
    write[..., None, None] * k[..., :, None] * v[..., None, :]
  )
  n = forget[..., None] * n + write[..., None] * k

  q *= (q.shape[-1] ** -0.5 * jnp.exp(m - reading_scale(m, m.dtype)))[..., None]
  h = readout(
    jnp.einsum("BHK,BHKV->BHV", q, C, precision="highest"),
    jnp.sum(q * n, axis=-1),
    m,
    normalize=normalize,
    eps=eps,
    dtype=m.dtype,
  )
  return State(C, n, m, state.segment_B), h


def recurrent(
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
) -> tuple[Float[Array, "B T H V"], State]:
  """The definition of the mLSTM; every other form is tested against it.

  For every head and token there are q and k of K numbers, v of V numbers and
  two gates:

      C_t = f_t C_{t-1} + i_t k_t v_t^T          f_t = sigmoid(f~_t)
      n_t = f_t n_{t-1} + i_t k_t                i_t = exp(i~_t) or sigmoid
      h_t = C_t^T q_t s / (max(|n_t^T q_t s|, 1) + eps exp(m_t)),  s = K^-0.5

  Without the normaliser, h_t = C_t^T q_t s. Where a document starts,
  C_0 = n_0 = m_0 = 0. C and n are kept scaled by exp(-m), so that the
  exponential gate cannot overflow:

      m_t = max(log f_t + m_{t-1}, log i_t)      (sigmoid gate: m_t = 0)
      f'_t = exp(log f_t + m_{t-1} - m_t),       i'_t = exp(log i_t - m_t)
      C'_t = f'_t C'_{t-1} + i'_t k_t v_t^T,     n'_t likewise
      h_t = C'_t^T q_t s / (max(|n'_t^T q_t s|, exp(-m_t)) + eps)

  (Beck et al., xLSTM: Extended Long Short-Term Memory, 2024, eq. 19-27).
  Everything is computed in the accumulator type; the gradient is plain
  autodiff.
  """
  del chunk
  wide = log_i_BTH.dtype
  tokens = Token(
    q_BTHK.astype(wide),
    k_BTHK.astype(wide),
    v_BTHV.astype(wide),
    log_i_BTH,
    log_f_BTH,
    documents.start_BT,
  )
  state, h_TBHV = jax.lax.scan(
    partial(step, stabilize=stabilize, normalize=normalize, eps=eps),
    state,
    jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens),
  )
  return jnp.moveaxis(h_TBHV, 0, 1), state
