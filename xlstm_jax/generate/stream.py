"""Continues prompts, in blocks of tokens.

The prompt is read in sequence form; then every token is a step of constant
memory and time.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax import metrics
from xlstm_jax.errors import UserError
from xlstm_jax.generate.sampling import Sampling, draw
from xlstm_jax.models.language_model import Definition, Params

# Prompts are read in pieces of this many tokens, the last padded to a power
# of two: any length needs at most 8 compilations and bounded memory.
PIECE = 1024
_SHORTEST_PIECE = 8
# Tokens drawn between two looks at them from outside.
BLOCK = 32
# What time is spent on.
COMPILE, READ, DRAW, OTHER = "compile", "read", "draw", "other"


def generate(
  definition: Definition,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  end_of_text: int,
  vocab_size: int,
  sampling: Sampling,
) -> list[list[int]]:
  """Continues every prompt; arguments as in `stream`, which it collects."""
  blocks = stream(
    definition,
    params,
    prompts,
    max_tokens=max_tokens,
    end_of_text=end_of_text,
    vocab_size=vocab_size,
    sampling=sampling,
  )
  empty_B0 = np.empty((len(prompts), 0), np.int32)
  tokens_BT = np.concatenate([empty_B0, *blocks], axis=1)
  return [tokens[tokens != end_of_text].tolist() for tokens in tokens_BT]


def stream(
  definition: Definition,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  end_of_text: int,
  vocab_size: int,
  sampling: Sampling,
  clock: metrics.Clock | None = None,
) -> Iterator[np.ndarray]:
  """Continues every prompt, as the start of a document, in blocks of tokens.

  The rows are independent: each reads an end-of-text and its prompt, and goes
  on to the next end-of-text or for `max_tokens`. Memory does not grow with
  the text.

  Args:
    definition: the model.
    params: its parameters.
    prompts: token ids; empty prompts are fine.
    max_tokens: longest continuation.
    end_of_text: id of the token between documents.
    vocab_size: the tokenizer's; the model may have unused ids above it.
    sampling: how tokens are drawn.
    clock: counts the time spent on `COMPILE`, `READ` and `DRAW`.

  Yields:
    The next ids of every row [B, T], T at most `BLOCK`; a row that has ended
    repeats the end-of-text. All programs are compiled before the first.

  Raises:
    UserError: `max_tokens` is negative, or the model lacks tokens.
  """
  if max_tokens < 0:
    raise UserError(f"max_tokens is {max_tokens}; it must be at least 0.")
  if vocab_size > definition.cfg.vocab_size:
    raise UserError(
      f"The tokenizer has {vocab_size} ids, the model only "
      f"{definition.cfg.vocab_size}; use the model's tokenizer."
    )
  clock = clock or metrics.Clock(OTHER)
  state, x_BD = _prefill(definition, params, prompts, end_of_text, clock)
  done_B = jnp.zeros(len(prompts), bool)
  top_k = vocab_size if sampling.top_k is None else sampling.top_k
  for start in range(0, max_tokens, BLOCK):
    count = min(BLOCK, max_tokens - start)
    tokens_BT, done_B, state, x_BD = _timed(
      clock,
      DRAW,
      _steps,
      definition,
      params,
      state,
      x_BD,
      done_B,
      start,
      count,
      jax.random.key(sampling.seed),
      sampling.temperature,
      min(top_k, vocab_size),
      sampling.top_p,
      end_of_text=end_of_text,
      vocab_size=vocab_size,
      block=BLOCK,
    )
    yield np.asarray(tokens_BT)[:, :count]
    if np.asarray(done_B).all():
      return


def _timed(clock, activity, program, *arguments, **static):
  """Calls a jitted program; its compilation is counted apart, and done once."""
  with clock.spent_on(COMPILE):
    program.lower(*arguments, **static).compile()
  with clock.spent_on(activity):
    return jax.block_until_ready(program(*arguments, **static))


def _prefill(definition, params, prompts, end_of_text, clock):
  """The state behind every prompt, and the model's output at its last token."""
  rows = [[end_of_text, *prompt] for prompt in prompts]
  state, x_BD = _timed(clock, READ, _empty, definition, params, batch=len(rows))
  for tokens_BT, segments_BT in pieces(rows):
    state, x_BD = _timed(
      clock,
      READ,
      _read,
      definition,
      params,
      state,
      x_BD,
      tokens_BT,
      segments_BT,
    )
  return state, x_BD


def pieces(
  rows: Sequence[Sequence[int]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Cuts rows of tokens into arrays [B, T] of few lengths, with segments."""
  longest = max(map(len, rows))
  for start in range(0, longest, PIECE):
    length = _round_up(min(longest - start, PIECE))
    tokens_BT = np.zeros((len(rows), length), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for row, tokens in enumerate(rows):
      piece = tokens[start : start + PIECE]
      tokens_BT[row, : len(piece)] = piece
      segments_BT[row, : len(piece)] = 1
    yield tokens_BT, segments_BT


def _round_up(length: int) -> int:
  """The next power of two: few lengths are compiled."""
  return max(_SHORTEST_PIECE, 1 << max(length - 1, 0).bit_length())


@functools.partial(jax.jit, static_argnames=("definition", "batch"))
def _empty(definition, params, *, batch):
  lm = definition.bind(params)
  tokens_B1 = jnp.zeros((batch, 1), jnp.int32)
  x_B1D, _ = jax.eval_shape(lm, tokens_B1)
  return lm.empty_state(batch), jnp.zeros((batch, x_B1D.shape[-1]), x_B1D.dtype)


@functools.partial(jax.jit, static_argnames="definition")
def _read(definition, params, state, x_BD, tokens_BT, segments_BT):
  """Reads a piece; rows that are padding alone keep what they have."""
  lm = definition.bind(params)
  x_BTD, state = lm(tokens_BT, segments_BT=segments_BT, state=state)
  length_B = (segments_BT > 0).sum(1)
  last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
  last_BD = jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0]
  return state, jnp.where(length_B[:, None] > 0, last_BD, x_BD)


@functools.partial(
  jax.jit,
  static_argnames=("definition", "end_of_text", "vocab_size", "block"),
  donate_argnames=("state", "x_BD", "done_B"),
)
def _steps(
  definition,
  params,
  state,
  x_BD,
  done_B,
  start,
  count,
  key,
  temperature,
  top_k,
  top_p,
  *,
  end_of_text,
  vocab_size,
  block,
):
  """Draws the tokens numbered `start` up to `start + count` of every row."""
  lm = definition.bind(params)
  B = x_BD.shape[0]

  def unfinished(carry):
    n, _, done_B, _, _ = carry
    return (n < count) & ~done_B.all()

  def step(carry):
    n, tokens_BT, done_B, state, x_BD = carry
    logits_BZ = lm.logits(x_BD[:, None])[:, 0, :vocab_size]
    # A token depends on the seed, its number and its row, not on the block.
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.fold_in(key, start + n), jnp.arange(B)
    )
    drawn_B = jax.vmap(draw, in_axes=(0, 0, None, None, None))(
      logits_BZ, keys_B, temperature, top_k, top_p
    )
    done_B = done_B | (drawn_B == end_of_text)
    token_B = jnp.where(done_B, end_of_text, drawn_B)
    tokens_BT = tokens_BT.at[:, n].set(token_B)
    x_B1D, state = lm(token_B[:, None], state=state)
    return n + 1, tokens_BT, done_B, state, x_B1D[:, 0]

  tokens_BT = jnp.full((B, block), end_of_text, jnp.int32)
  carry = (jnp.int32(0), tokens_BT, done_B, state, x_BD)
  return jax.lax.while_loop(unfinished, step, carry)[1:]
