"""One function for the sLSTM, whatever computes it."""

from functools import partial

from jaxtyping import Array, Float, Int

from xlstm_jax.cells import recurrence
from xlstm_jax.cells.backends import Backend, Registry
from xlstm_jax.cells.precision import accumulator
from xlstm_jax.cells.recurrence_gpu import backend as recurrence_gpu
from xlstm_jax.cells.slstm.recurrent import State, cell, empty_state

# Every form takes what `recurrence.run` passes on. A new one, in a file or a
# folder beside this one, has a row here.
BACKENDS = Registry(
  "sLSTM",
  "slstm_backend",
  "recurrent",
  (
    Backend(
      "pallas_gpu",
      recurrence_gpu.slstm,
      why_not=recurrence_gpu.why_not,
      why_not_auto=recurrence_gpu.why_not_auto,
      platform="gpu",
    ),
    Backend("recurrent", partial(recurrence.scan, cell)),
  ),
)


def slstm(
  x_BTGHD: Float[Array, "B T 4 H D"],
  R_GHDE: Float[Array, "4 H D D"],
  b_GHD: Float[Array, "4 H D"],
  *,
  segments_BT: Int[Array, "B T"] | None = None,
  state: State | None = None,
  backend: str = "auto",
) -> tuple[Float[Array, "B T H D"], State]:
  """Runs the sLSTM cell over T tokens.

  Args:
    x_BTGHD: The inputs' part of the gates.
    R_GHDE: One matrix per gate and head, from D units y to D units. Its type
      is that of the operands of the product y R.
    b_GHD: Biases.
    segments_BT: Document of each token, see `xlstm_jax.cells.documents`;
      without it every token is real and continues the state.
    state: What the last call returned; None is the empty past.
    backend: A name in `BACKENDS`, or "auto".

  Returns:
    y in the type of x (0 at padding) and the state after the last token.
  """
  if state is None:
    batch, _, _, heads, head_dim = x_BTGHD.shape
    state = empty_state(batch, heads, head_dim, accumulator(x_BTGHD.dtype))
  y_BTHD, units, segment_B = recurrence.run(
    BACKENDS,
    backend,
    x_BTGHD,
    R_GHDE,
    b_GHD,
    segments_BT,
    state[:-1],
    state.segment_B,
  )
  return y_BTHD, State(*units, segment_B=segment_B)


def slstm_step(
  x_BGHD: Float[Array, "B 4 H D"],
  R_GHDE: Float[Array, "4 H D D"],
  b_GHD: Float[Array, "4 H D"],
  *,
  segments_B: Int[Array, "B"] | None = None,
  state: State | None = None,
) -> tuple[Float[Array, "B H D"], State]:
  """`slstm` for a single token per row."""
  y_B1HD, state = slstm(
    x_BGHD[:, None],
    R_GHDE,
    b_GHD,
    segments_BT=None if segments_B is None else segments_B[:, None],
    state=state,
    backend="recurrent",
  )
  return y_B1HD[:, 0], state
