"""The document of every token, and what of the past it may see.

Segment ids are int32. They start at 1 and never decrease along the real tokens;
0 is padding. A cell's state carries the id of its last token. Token 0 continues
the state if and only if it has the same id.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Documents(NamedTuple):
  """Segment ids as the cells read them."""

  id_BT: Int[Array, "B T"]  # padding has the id of the token before it
  real_BT: Bool[Array, "B T"]  # not padding
  start_BT: Bool[Array, "B T"]  # the past of this token is empty
  last_B: Int[Array, "B"]  # the id for the next call's state


def documents(
  segments_BT: Int[Array, "B T"] | None,
  previous_B: Int[Array, "B"],
  time: int,
) -> Documents:
  """Reads the segment ids after a state whose last token had `previous_B`.

  Without ids every token is real and continues the state. The state that
  follows an empty past (id 0) then belongs to document 1.
  """
  if segments_BT is None:
    id_BT = jnp.broadcast_to(previous_B[:, None], (len(previous_B), time))
    real_BT = jnp.ones_like(id_BT, bool)
    return Documents(id_BT, real_BT, ~real_BT, jnp.maximum(previous_B, 1))
  id_BT = jax.lax.cummax(segments_BT, axis=1)
  id_BT = jnp.where(id_BT == 0, previous_B[:, None], id_BT)
  before_BT = jnp.concatenate([previous_B[:, None], id_BT[:, :-1]], axis=1)
  return Documents(id_BT, segments_BT != 0, id_BT != before_BT, id_BT[:, -1])
