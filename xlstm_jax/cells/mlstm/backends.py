"""One function for the mLSTM, whatever computes it."""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells.documents import documents
from xlstm_jax.cells.mlstm import sequence
from xlstm_jax.cells.mlstm.chunkwise import chunkwise
from xlstm_jax.cells.mlstm.gates import log_gates
from xlstm_jax.cells.mlstm.pallas_gpu import (
  device_refusal,
  pallas_gpu,
  refusal,
)
from xlstm_jax.cells.mlstm.pallas_gpu_blocks import CHUNKS
from xlstm_jax.cells.mlstm.parallel import Tokens, parallel, update
from xlstm_jax.cells.mlstm.recurrent import recurrent
from xlstm_jax.cells.mlstm.state import State, empty_state
from xlstm_jax.cells.precision import accumulator
from xlstm_jax.cells.varying import alike
from xlstm_jax.errors import UserError

# Every form takes what `mlstm` passes on; one without chunks ignores `chunk`.
BACKENDS = {
  "recurrent": recurrent,
  "parallel": parallel,
  "chunkwise": chunkwise,
}
# These run on one platform and refuse others. "auto" names them where they run.
KERNELS = {"pallas_gpu": pallas_gpu}

_log = logging.getLogger(__name__)


def mlstm(
  q_BTHK: Float[Array, "B T H K"],
  k_BTHK: Float[Array, "B T H K"],
  v_BTHV: Float[Array, "B T H V"],
  *,
  i_BTH: Float[Array, "B T H"],
  f_BTH: Float[Array, "B T H"],
  segments_BT: Int[Array, "B T"] | None = None,
  state: State | None = None,
  input_gate: Literal["exp", "sigmoid"] = "exp",
  normalize: bool = True,
  eps: float = 1e-6,
  chunk: int | None = None,
  backend: str = "auto",
  axis_name: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
  """Runs the mLSTM cell over T tokens; `recurrent` holds the equations.

  Args:
    q_BTHK: Queries, scaled by K^-0.5 inside.
    k_BTHK: Keys.
    v_BTHV: Values. All three have one dtype; so has the result, while gates
      and states are computed in the accumulator type (at least float32).
    i_BTH: Input gate before its exp or sigmoid.
    f_BTH: Forget gate before its sigmoid.
    segments_BT: Document of each token, see `xlstm_jax.cells.documents`;
      without it every token is real and continues the state.
    state: What the last call returned; None is the empty past.
    input_gate: The exponential gate is stabilised; the sigmoid gate is not,
      and its m stays 0.
    normalize: Divide by max(|n^T q|, 1). Without it an exponential gate
      overflows where the true value does.
    eps: Added to the denominator in the scale of the stabilised state.
    chunk: Tokens per chunk, in backends that have them; None chooses.
    backend: A name in `BACKENDS` or `KERNELS`, or "auto".
    axis_name: Mesh axis over which longer rows are split, this device having
      T tokens of each; see `xlstm_jax.cells.mlstm.sequence`. The state, given
      and returned, is that of the whole rows on every device.

  Returns:
    The outputs (0 at padding) and the state after the last token.

  Raises:
    UserError: If a name or the chunk is not a valid choice, or the backend
      cannot run on this device or these arrays.
  """
  if input_gate not in ("exp", "sigmoid"):
    raise UserError(
      f"input_gate is {input_gate!r}; it must be 'exp' or 'sigmoid'."
    )
  form = _form(backend, chunk, q_BTHK, v_BTHV)
  wide = accumulator(q_BTHK.dtype)
  if state is None:
    batch, _, heads, key_dim = q_BTHK.shape
    state = empty_state(batch, heads, key_dim, v_BTHV.shape[-1], wide)
  q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, segments_BT, state = alike(
    q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, segments_BT, state
  )
  C_BHKV, n_BHK, m_BH = (x.astype(wide) for x in state[:3])
  state = State(C_BHKV, n_BHK, m_BH, state.segment_B)
  if axis_name is not None:
    before_B = sequence.segment_before(segments_BT, state.segment_B, axis_name)
  else:
    before_B = state.segment_B
  tokens = documents(segments_BT, before_B, q_BTHK.shape[1])
  log_i_BTH, log_f_BTH = log_gates(
    i_BTH.astype(wide),
    f_BTH.astype(wide),
    tokens.real_BT,
    input_gate=input_gate,
  )
  stabilize = input_gate == "exp"
  if axis_name is not None:
    inputs = Tokens(q_BTHK, k_BTHK, v_BTHV, log_i_BTH, log_f_BTH, tokens.id_BT)
    own = update(inputs, before_B, stabilize=stabilize)
    state = sequence.entering(own, state, axis_name, q_BTHK.dtype)
  state = state._replace(segment_B=before_B)
  h_BTHV, state = form(
    q_BTHK,
    k_BTHK,
    v_BTHV,
    log_i_BTH,
    log_f_BTH,
    tokens,
    state,
    stabilize=stabilize,
    normalize=normalize,
    eps=eps,
    chunk=chunk,
  )
  h_BTHV = jnp.where(tokens.real_BT[..., None, None], h_BTHV, 0)
  state = state._replace(segment_B=tokens.last_B)
  if axis_name is not None:
    state = sequence.leaving(state, axis_name)
  return h_BTHV.astype(q_BTHK.dtype), state


def mlstm_step(
  q_BHK: Float[Array, "B H K"],
  k_BHK: Float[Array, "B H K"],
  v_BHV: Float[Array, "B H V"],
  *,
  i_BH: Float[Array, "B H"],
  f_BH: Float[Array, "B H"],
  segments_B: Int[Array, "B"] | None = None,
  state: State | None = None,
  input_gate: Literal["exp", "sigmoid"] = "exp",
  normalize: bool = True,
  eps: float = 1e-6,
) -> tuple[Float[Array, "B H V"], State]:
  """`mlstm` for a single token per row: the definition, once."""
  h_B1HV, state = mlstm(
    q_BHK[:, None],
    k_BHK[:, None],
    v_BHV[:, None],
    i_BTH=i_BH[:, None],
    f_BTH=f_BH[:, None],
    segments_BT=None if segments_B is None else segments_B[:, None],
    state=state,
    input_gate=input_gate,
    normalize=normalize,
    eps=eps,
    backend="recurrent",
  )
  return h_B1HV[:, 0], state


def choice(
  backend: str,
  time: int,
  *,
  dtype: DTypeLike,
  key_dim: int,
  value_dim: int,
  chunk: int | None = None,
) -> str:
  """The backend that computes such tokens where `backend` is named.

  Args:
    backend: as in `mlstm`.
    time: tokens of a row.
    dtype: of queries, keys and values.
    key_dim, value_dim: channels of a head.
    chunk: as in `mlstm`.
  """
  if backend != "auto":
    return backend
  if time == 1:
    return "recurrent"
  reason = left_out(
    time, dtype=dtype, key_dim=key_dim, value_dim=value_dim, chunk=chunk
  )
  backend = "chunkwise" if reason else "pallas_gpu"
  _announce(backend, jax.default_backend(), reason)
  return backend


def left_out(
  time: int,
  *,
  dtype: DTypeLike,
  key_dim: int,
  value_dim: int,
  chunk: int | None = None,
) -> str | None:
  """Why "auto" does not choose the kernel, or None; arguments of `choice`."""
  if time < CHUNKS[0]:
    return f"its chunks are longer than {time} tokens"
  return device_refusal() or refusal(
    dtype, key_dim, value_dim, CHUNKS[0] if chunk is None else chunk
  )


def _form(backend: str, chunk: int | None, q_BTHK, v_BTHV):
  """The function that computes the cell, chosen and checked."""
  backend = choice(
    backend,
    q_BTHK.shape[1],
    dtype=q_BTHK.dtype,
    key_dim=q_BTHK.shape[-1],
    value_dim=v_BTHV.shape[-1],
    chunk=chunk,
  )
  forms = BACKENDS | KERNELS
  if backend not in forms:
    names = ", ".join(forms)
    raise UserError(f"There is no mLSTM backend {backend!r}; choose {names}.")
  if chunk is not None and chunk < 1:
    raise UserError(f"The chunk is {chunk}; a chunk holds at least 1 token.")
  return forms[backend]


@functools.cache
def _announce(backend: str, platform: str, reason: str | None) -> None:
  if platform == "gpu" and reason:
    backend = f"{backend}, not pallas_gpu: {reason}"
  _log.info("mLSTM backend on %s: %s", platform, backend)
