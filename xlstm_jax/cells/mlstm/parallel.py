"""The mLSTM as masked attention: all pairs of tokens at once."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from xlstm_jax.cells.documents import Documents
from xlstm_jax.cells.mlstm.gates import (
  larger,
  largest,
  sums_after,
  sums_between,
)
from xlstm_jax.cells.mlstm.state import (
  State,
  constant,
  reading_scale,
  readout,
  with_constant_scale,
  with_own_scale,
)
from xlstm_jax.cells.precision import multiplied, product


class Tokens(NamedTuple):
  """The inputs of consecutive tokens."""

  q_BTHK: Float[Array, "B T H K"]
  k_BTHK: Float[Array, "B T H K"]
  v_BTHV: Float[Array, "B T H V"]
  log_i_BTH: Float[Array, "B T H"]
  log_f_BTH: Float[Array, "B T H"]
  id_BT: Int[Array, "B T"]


class Update(NamedTuple):
  """What consecutive tokens do to the state before them.

  They multiply it by exp(decay) and add C and n, which are scaled by exp(-m).
  """

  decay_BH: Float[Array, "B H"]
  C_BHKV: Float[Array, "B H K V"]
  n_BHK: Float[Array, "B H K"]
  m_BH: Float[Array, "B H"]


def outputs(
  tokens: Tokens, state: State, *, stabilize: bool, normalize: bool, eps: float
) -> Float[Array, "B T H V"]:
  """h of every token after a state (of constant scale).

  The weight of token s in token t is exp(F_t - F_s + log i_s - g_t) q_t k_s
  K^-0.5, with F the running sum of log f. Memory is quadratic in T.
  """
  q, k, v, log_i, log_f, id_BT = tokens
  dtype, wide = q.dtype, log_i.dtype
  q, k, v = (x.astype(wide) for x in (q, k, v))
  scale = q.shape[-1] ** -0.5
  time = jnp.arange(q.shape[1])
  visible_BTS = (id_BT[:, :, None] == id_BT[:, None]) & (time[:, None] >= time)
  continues_BT1 = (id_BT == state.segment_B[:, None])[..., None]

  log_w_BHTS = sums_between(log_f.mT) + log_i.mT[..., None, :]
  log_w_BHTS = jnp.where(visible_BTS[:, None], log_w_BHTS, -jnp.inf)
  # Sums of log f since the state, or since a document that started after it.
  since_BTH = jnp.einsum(
    "BTS,BSH->BTH", visible_BTS.astype(wide), log_f, precision="highest"
  )
  if stabilize:
    m_BTH = larger(
      since_BTH + jnp.where(continues_BT1, state.m_BH[:, None], 0),
      largest(log_w_BHTS).mT,
    )
  else:
    m_BTH = jnp.zeros_like(log_i)
  g_BTH = reading_scale(m_BTH, dtype)

  w_BHTS = jnp.exp(log_w_BHTS - g_BTH.mT[..., None])
  w_BHTS *= scale * product("BTHK,BSHK->BHTS", q, k, dtype)
  log_past_BTH = since_BTH + constant(state.m_BH, dtype)[:, None] - g_BTH
  log_past_BTH = jnp.where(continues_BT1, log_past_BTH, -jnp.inf)
  past_BTH = scale * jnp.exp(log_past_BTH)

  Cq_BTHV = read(past_BTH, q, state.C_BHKV, dtype)
  nq_BTH = past_BTH * jnp.sum(q * state.n_BHK[:, None], axis=-1)
  return readout(
    Cq_BTHV + product("BHTS,BSHV->BTHV", w_BHTS, v, dtype),
    nq_BTH + jnp.sum(w_BHTS, axis=-1).mT,
    m_BTH,
    normalize=normalize,
    eps=eps,
    dtype=dtype,
  )


def update(
  tokens: Tokens, segment_B: Int[Array, "B"], *, stabilize: bool
) -> Update:
  """What the tokens do to a state whose last token had `segment_B`."""
  _, k, v, log_i, log_f, id_BT = tokens
  wide = log_i.dtype
  last_BT1 = (id_BT == id_BT[:, -1:])[..., None]
  log_w_BTH = jnp.where(last_BT1, sums_after(log_f.mT).mT + log_i, -jnp.inf)
  since_BH = jnp.sum(jnp.where(last_BT1, log_f, 0), axis=1)
  continues_B1 = (id_BT[:, -1] == segment_B)[:, None]
  decay_BH = jnp.where(continues_B1, since_BH, -jnp.inf)
  if stabilize:
    start_BH = jnp.where(continues_B1, -jnp.inf, since_BH)
    m_BH = larger(start_BH, largest(log_w_BTH.mT))
  else:
    m_BH = jnp.zeros_like(since_BH)
  # Tokens that are all padding have m = -inf: they add 0 in any scale.
  scale_BH = jnp.where(m_BH == -jnp.inf, 0, constant(m_BH, v.dtype))
  w_BTH = jnp.exp(log_w_BTH - scale_BH[:, None])
  k, v, dtype = k.astype(wide), v.astype(wide), v.dtype
  n_BHK = jnp.sum(w_BTH[..., None] * k, axis=1)
  return Update(decay_BH, write(w_BTH, k, v, dtype), n_BHK, m_BH)


def updated(state: State, update: Update, dtype: DTypeLike) -> State:
  """The state (of constant scale) after an update; its segment is untouched.

  `dtype` is the type of the operands that made the update.
  """
  m_BH = larger(update.decay_BH + state.m_BH, update.m_BH)
  keep_BH = jnp.exp(update.decay_BH + constant(state.m_BH - m_BH, dtype))
  add_BH = jnp.exp(constant(update.m_BH - m_BH, dtype))
  return State(
    keep_BH[..., None, None] * state.C_BHKV
    + add_BH[..., None, None] * update.C_BHKV,
    keep_BH[..., None] * state.n_BHK + add_BH[..., None] * update.n_BHK,
    m_BH,
    state.segment_B,
  )


# Where few tokens dominate the memory, C^T q and n^T q cancel together, and so
# do their gradients. n is not rounded. If C were rounded to bfloat16, h would
# be what that takes from C where n^T q is small. So C is multiplied in two
# parts.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def read(
  scale_BTH: Float[Array, "B T H"],
  x_BTHK: Float[Array, "B T H K"],
  state_BHKV: Float[Array, "B H K V"],
  dtype: DTypeLike,
) -> Float[Array, "B T H V"]:
  """scale x^T state, for tokens x in `dtype` and a wide state."""
  product_BTHV = multiplied(
    "BTHK,BHKV->BTHV", x_BTHK, state_BHKV, dtype, parts=(1, 2)
  )
  return scale_BTH[..., None] * product_BTHV


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def write(
  scale_BTH: Float[Array, "B T H"],
  x_BTHK: Float[Array, "B T H K"],
  y_BTHV: Float[Array, "B T H V"],
  dtype: DTypeLike,
) -> Float[Array, "B H K V"]:
  """The sum of scale x y^T over tokens x and y in `dtype`."""
  scaled_BTHK = scale_BTH[..., None] * x_BTHK
  return multiplied("BTHK,BTHV->BHKV", scaled_BTHK, y_BTHV, dtype, parts=(2, 1))


def _read_backward(dtype, kept, dz_BTHV):
  scale_BTH, x_BTHK, state_BHKV = kept
  unscaled_BTHK = read(jnp.ones_like(scale_BTH), dz_BTHV, state_BHKV.mT, dtype)
  return (
    jnp.sum(x_BTHK * unscaled_BTHK, axis=-1),
    scale_BTH[..., None] * unscaled_BTHK,
    write(scale_BTH, x_BTHK, dz_BTHV, dtype),
  )


def _write_backward(dtype, kept, dstate_BHKV):
  scale_BTH, x_BTHK, y_BTHV = kept
  unscaled_BTHK = read(jnp.ones_like(scale_BTH), y_BTHV, dstate_BHKV.mT, dtype)
  return (
    jnp.sum(x_BTHK * unscaled_BTHK, axis=-1),
    scale_BTH[..., None] * unscaled_BTHK,
    read(scale_BTH, x_BTHK, dstate_BHKV, dtype),
  )


read.defvjp(lambda *args: (read(*args), args[:3]), _read_backward)
write.defvjp(lambda *args: (write(*args), args[:3]), _write_backward)


def composed(first: Update, second: Update, dtype: DTypeLike) -> Update:
  """What `first` and then `second` do to a state; this is associative."""
  state = State(*first[1:], segment_B=jnp.zeros(()))
  return Update(
    first.decay_BH + second.decay_BH, *updated(state, second, dtype)[:3]
  )


def parallel(
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
  """`recurrent` with all pairs of tokens at once."""
  del chunk
  tokens = Tokens(q_BTHK, k_BTHK, v_BTHV, log_i_BTH, log_f_BTH, documents.id_BT)
  state = with_constant_scale(state, q_BTHK.dtype)
  h_BTHV = outputs(
    tokens, state, stabilize=stabilize, normalize=normalize, eps=eps
  )
  change = update(tokens, state.segment_B, stabilize=stabilize)
  last = updated(state, change, q_BTHK.dtype)
  return h_BTHV, with_own_scale(last, q_BTHK.dtype)
