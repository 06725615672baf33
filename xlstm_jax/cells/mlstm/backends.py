"""One function for the mLSTM, whatever computes it."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells import tpu_costs
from xlstm_jax.cells.backends import Backend, Registry, this_device
from xlstm_jax.cells.documents import documents
from xlstm_jax.cells.hopper_gpus import device_refusal
from xlstm_jax.cells.mlstm import sequence
from xlstm_jax.cells.mlstm.chunkwise import chunkwise
from xlstm_jax.cells.mlstm.gates import log_gates
from xlstm_jax.cells.mlstm.hopper import pallas_gpu, refusal
from xlstm_jax.cells.mlstm.hopper.block_sizes import CHUNKS
from xlstm_jax.cells.mlstm.parallel import Tokens, parallel, update
from xlstm_jax.cells.mlstm.recurrent import recurrent
from xlstm_jax.cells.mlstm.state import State, empty_state
from xlstm_jax.cells.mlstm.tpu import backend as tpu
from xlstm_jax.cells.precision import accumulator
from xlstm_jax.cells.varying import vary_together
from xlstm_jax.errors import UserError


class Shapes(NamedTuple):
  """What a device computes.

  Attributes:
    B: Rows.
    T: Tokens of a row.
    H: Heads.
    K: Channels of a head's keys.
    V: Channels of a head's values.
    dtype: Of queries, keys and values.
    chunk: As `mlstm` takes it.
  """

  B: int
  T: int
  H: int
  K: int
  V: int
  dtype: str
  chunk: int | None = None


def _one_after_another(shapes: Shapes) -> str | None:
  return "it computes one token after the other" if shapes.T > 1 else None


def _why_not_pallas_gpu(device: Any, shapes: Shapes) -> str | None:
  chunk = min(CHUNKS) if shapes.chunk is None else shapes.chunk
  return device_refusal(device) or refusal(
    shapes.dtype, shapes.K, shapes.V, chunk
  )


def _why_not_pallas_tpu(device: Any, shapes: Shapes) -> str | None:
  return tpu.device_refusal(device) or tpu.refusal(
    device, shapes.dtype, shapes.K, shapes.V, shapes.chunk
  )


def _shorter_than_a_chunk(shapes: Shapes) -> str | None:
  if min(CHUNKS) > shapes.T:
    return f"its chunks are longer than {shapes.T} tokens"
  return None


def _why_not_auto_tpu(shapes: Shapes) -> str | None:
  return _shorter_than_a_chunk(shapes) or tpu_costs.why_not(
    tpu.COSTS, this_device().device_kind, f"{shapes.K} x {shapes.V}"
  )


# Every form takes what `mlstm` passes on; one without chunks ignores `chunk`.
# A new one, in a file or a folder beside this one, has a row here.
BACKENDS = Registry(
  "mLSTM",
  "mlstm_backend",
  "chunkwise",
  (
    Backend("recurrent", recurrent, why_not_auto=_one_after_another),
    Backend(
      "pallas_gpu",
      pallas_gpu,
      why_not=_why_not_pallas_gpu,
      why_not_auto=_shorter_than_a_chunk,
      platform="gpu",
    ),
    Backend(
      "pallas_tpu",
      tpu.pallas_tpu,
      why_not=_why_not_pallas_tpu,
      why_not_auto=_why_not_auto_tpu,
      platform="tpu",
    ),
    Backend("chunkwise", chunkwise),
    Backend("parallel", parallel),
  ),
)


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
    backend: A name in `BACKENDS`, or "auto".
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
  if chunk is not None and chunk < 1:
    raise UserError(f"The chunk is {chunk}; a chunk holds at least 1 token.")
  B, T, H, K = q_BTHK.shape
  V = v_BTHV.shape[-1]
  shapes = Shapes(B, T, H, K, V, dtype=str(q_BTHK.dtype), chunk=chunk)
  form = BACKENDS.choose(backend, shapes)
  wide = accumulator(q_BTHK.dtype)
  if state is None:
    state = empty_state(B, H, K, V, wide)
  q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, segments_BT, state = vary_together(
    q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, segments_BT, state
  )
  C_BHKV, n_BHK, m_BH = (x.astype(wide) for x in state[:3])
  state = State(C_BHKV, n_BHK, m_BH, state.segment_B)
  if axis_name is not None:
    before_B = sequence.segment_before(segments_BT, state.segment_B, axis_name)
  else:
    before_B = state.segment_B
  tokens = documents(segments_BT, before_B, T)
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
  h_BTHV, last = form.run(
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
  last = last._replace(segment_B=tokens.last_B)
  if axis_name is not None:
    last = sequence.leaving(last, axis_name)
  return h_BTHV.astype(q_BTHK.dtype), last


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
