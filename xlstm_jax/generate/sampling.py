"""How the next token is drawn."""

import dataclasses

import jax
import jax.numpy as jnp

from xlstm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; None for all.
    top_p: of those, only the most likely ones that reach this probability
      together, at the temperature; 1 for all.
    seed: equal seeds draw equal tokens.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    """Refuses what cannot be drawn from.

    Raises:
      UserError: a value is out of range.
    """
    if not 0 <= self.temperature < float("inf"):
      raise UserError(
        f"The temperature is {self.temperature}; it must be at least 0 "
        "(0 always takes the most likely token)."
      )
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f"top_k is {self.top_k}; it must be at least 1.")
    if not 0 < self.top_p <= 1:
      raise UserError(
        f"top_p is {self.top_p}; it must be above 0 and at most 1."
      )
    if not 0 <= self.seed < 2**32:
      raise UserError(f"The seed is {self.seed}; it must be in [0, 2^32).")


def draw(
  logits_Z: jax.Array,
  key: jax.Array,
  temperature: jax.Array | float,
  top_k: jax.Array | int,
  top_p: jax.Array | float,
) -> jax.Array:
  """Draws one id; arguments as in `Sampling`, with `top_k` at least 1."""
  ids_Z = jnp.argsort(logits_Z, descending=True)
  greedy = temperature == 0
  logits_Z = logits_Z[ids_Z]
  # Relative to the largest, no temperature overflows.
  logits_Z = (logits_Z - logits_Z[0]) / jnp.where(greedy, 1, temperature)
  ranks_Z = jnp.arange(len(logits_Z))
  logits_Z = jnp.where(ranks_Z < top_k, logits_Z, -jnp.inf)
  p_Z = jax.nn.softmax(logits_Z)
  before_Z = jnp.cumsum(p_Z) - p_Z
  # The most likely token always stays; the sum may round to 1 too early.
  keep_Z = (ranks_Z == 0) | (before_Z < top_p) | (top_p >= 1)
  logits_Z = jnp.where(keep_Z, logits_Z, -jnp.inf)
  rank = jnp.where(greedy, 0, jax.random.categorical(key, logits_Z))
  return ids_Z[rank].astype(jnp.int32)
