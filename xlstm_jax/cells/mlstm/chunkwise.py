"""The mLSTM in chunks: parallel inside a chunk, recurrent between chunks."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.mlstm.parallel import Tokens, outputs, update, updated
from xlstm_jax.cells.mlstm.state import (
  State,
  with_constant_scale,
  with_own_scale,
)


def chunkwise(
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
  """`recurrent` in chunks of `chunk` tokens; memory is linear in T.

  First, the updates that chunks make to the state are computed for all chunks
  at once. Then a scan over chunks yields the states between them. Last, all
  chunks are read at once, as if they were sequences of their own. The backward
  pass keeps the inputs and the states between chunks.
  """
  batch, time = log_i_BTH.shape[:2]
  dtype = q_BTHK.dtype
  if chunk is None:
    chunk = default_chunk(time, k_BTHK.shape[-1], v_BTHV.shape[-1])
  split = partial(_split, chunk=chunk)
  # Chunks become rows of the batch: first all rows of the first chunk.
  tokens = Tokens(
    split(q_BTHK),
    split(k_BTHK),
    split(v_BTHV),
    split(log_i_BTH, fill=-jnp.inf),
    split(log_f_BTH),
    split(documents.id_BT, fill=None),
  )
  id_before = jnp.concatenate([state.segment_B, tokens.id_BT[:-batch, -1]])
  updates = update(tokens, id_before, stabilize=stabilize)
  last, between = jax.lax.scan(
    lambda state, update: (updated(state, update, dtype), state),
    with_constant_scale(state, dtype),
    jax.tree.map(lambda x: x.reshape(-1, batch, *x.shape[1:]), updates),
  )
  between = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), between)
  between = between._replace(segment_B=id_before)

  read = partial(outputs, stabilize=stabilize, normalize=normalize, eps=eps)
  h = jax.checkpoint(read)(tokens, between)
  h_BTHV = _join(h, batch)[:, :time]
  return h_BTHV, with_own_scale(last, dtype)


def default_chunk(time: int, key_dim: int, value_dim: int) -> int:
  """A chunk length for `time` tokens that needs little padding.

  A token costs L (K + V) multiplications inside a chunk of L tokens, and 2 K V
  with the states between chunks. The longest L makes both equal, rounded down
  to a power of two from 16 to 256.
  """
  balanced = 2 * key_dim * value_dim // (key_dim + value_dim)
  longest = min(max(1 << (balanced.bit_length() - 1), 16), 256)
  chunks = -(-time // longest)
  length = -(-time // chunks)
  return length if length <= 16 else length + -length % 16


def _split(x_BT, *, chunk: int, fill: float | None = 0.0):
  """[B, T, ...] to [N B, L, ...]; `fill` None pads with the last token."""
  pad = (
    partial(jnp.pad, mode="edge")
    if fill is None
    else partial(jnp.pad, constant_values=fill)
  )
  batch, time, *rest = x_BT.shape
  x_BT = pad(x_BT, [(0, 0), (0, -time % chunk)] + [(0, 0)] * len(rest))
  x_BNL = x_BT.reshape(batch, -1, chunk, *rest)
  return x_BNL.swapaxes(0, 1).reshape(-1, chunk, *rest)


def _join(x, batch: int):
  """[N B, L, ...] to [B, T, ...]."""
  x_NBL = x.reshape(-1, batch, *x.shape[1:])
  return x_NBL.swapaxes(0, 1).reshape(batch, -1, *x.shape[2:])
