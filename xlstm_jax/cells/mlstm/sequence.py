"""The mLSTM over rows that are split over devices along time.

Each device holds a stretch of consecutive tokens. What a stretch does to the
state before it is one `Update`, the same for every state, and updates compose.
So every device reduces its own tokens to an update. In log2(devices) exchanges
it learns the composition of all updates before it. Then it runs any form of the
cell from the state that enters its stretch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from xlstm_jax.cells.mlstm.parallel import Update, composed, updated
from xlstm_jax.cells.mlstm.state import (
  State,
  with_constant_scale,
  with_own_scale,
)
from xlstm_jax.sharding import from_before, of_holder

# The m of an update that adds nothing: below any other, and finite, because
# inf - inf is NaN.
_NOTHING = -1e30


def segment_before(
  segments_BT: Int[Array, "B T"] | None,
  segment_B: Int[Array, "B"],
  axis_name: str,
) -> Int[Array, "B"]:
  """The document of the last token before this device's first.

  Args:
    segments_BT: documents of this device's tokens.
    segment_B: document of the last token before the row.
    axis_name: the mesh axis over which time is split.
  """
  if segments_BT is None:
    return segment_B
  # Ids never decrease along the tokens, and padding is 0.
  last_NB = jax.lax.all_gather(segments_BT.max(axis=1), axis_name)
  earlier_N = jnp.arange(len(last_NB)) < jax.lax.axis_index(axis_name)
  last_B = jnp.max(jnp.where(earlier_N[:, None], last_NB, 0), axis=0)
  return jnp.where(last_B > 0, last_B, segment_B)


def entering(
  own: Update, state: State, axis_name: str, dtype: DTypeLike
) -> State:
  """The state before this device's tokens.

  Args:
    own: what its tokens do to that state.
    state: the state before the row, the same on every device.
    axis_name: the mesh axis over which time is split.
    dtype: type of the tokens.
  """
  at = jax.lax.axis_index(axis_name)

  def before(update: Update, distance: int) -> Update:
    update = from_before(update, axis_name, distance)
    m_BH = jnp.where(at < distance, _NOTHING, update.m_BH)
    return update._replace(m_BH=m_BH)

  own = own._replace(m_BH=jnp.maximum(own.m_BH, _NOTHING))
  past, reach = before(own, 1), 1
  while reach < jax.lax.axis_size(axis_name) - 1:
    past = composed(before(past, reach), past, dtype)
    reach *= 2
  state = updated(with_constant_scale(state, dtype), past, dtype)
  return with_own_scale(state, dtype)


def leaving(state: State, axis_name: str) -> State:
  """The last device's state, on every device."""
  last = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
  rows = jnp.broadcast_to(last, state.segment_B.shape)
  return of_holder(state, rows, axis_name)
