"""Continues a prompt: `python -m xlstm_jax.generate --help`.

The prompt is read in sequence form; then every token is a step of constant
memory and time.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax import metrics, paths, sharding, trained
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.sharding import MeshConfig

# Prompts are read in pieces of this many tokens, the last padded to a power
# of two: any length needs at most 8 compilations and bounded memory.
PIECE = 1024
_SHORTEST_PIECE = 8
# Tokens drawn between two looks at them from outside.
BLOCK = 32
# What time is spent on.
COMPILE, READ, DRAW, OTHER = "compile", "read", "draw", "other"


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


_DESCRIPTION = """\
Continues a prompt with a trained model, as the start of a document, until the
model ends the text or a limit is reached. The text goes to stdout.
"""
_EXAMPLES = """\
examples:
  python -m xlstm_jax.generate --workdir=runs/quickstart --prompt="import "
  python -m xlstm_jax.generate --workdir=runs/a --prompt="" --temperature=0.8 \\
    --top-k=40 --top-p=0.95 --seed=3 --max-tokens=1000 --step=best
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  options = _parser().parse_args(arguments)
  sampling = Sampling(
    options.temperature, options.top_k, options.top_p, options.seed
  )
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
  model = trained.load(options.workdir, step=options.step, mesh=mesh)
  tokenizer = trained.find_tokenizer(model, options.workdir)
  prompt = tokenizer.encode(options.prompt).tolist()
  clock = metrics.Clock(OTHER)
  decoder = tokenizer.stream(prompt)
  drawn = 0
  # It is shown with the first tokens, after whatever XLA has to say while it
  # compiles: on a terminal, that would stand in the middle of the text.
  text = options.prompt
  with jax.set_mesh(mesh):
    for tokens_1T in stream(
      model.definition,
      model.params,
      [prompt],
      max_tokens=options.max_tokens,
      end_of_text=tokenizer.end_of_text,
      vocab_size=tokenizer.vocab_size,
      sampling=sampling,
      clock=clock,
    ):
      tokens = tokens_1T[0][tokens_1T[0] != tokenizer.end_of_text].tolist()
      drawn += len(tokens)
      text += "".join(map(decoder.feed, tokens))
      print(text, end="", flush=True)
      text = ""
  print(text + decoder.flush(), flush=True)
  spent = clock.spent()
  read = _speed(len(prompt), spent[READ])
  draw = _speed(drawn, spent.get(DRAW, 0.0))
  print(
    f"step {model.step}: {len(prompt)} tokens read in {read}, {drawn} drawn in "
    f"{draw}; compiled in {spent[COMPILE]:.1f} s",
    file=sys.stderr,
  )
  return 0


def _speed(tokens: int, seconds: float) -> str:
  """The time that tokens took, and how many a second that is."""
  rate = f" ({tokens / seconds:.3g} tokens/s)" if tokens else ""
  return f"{seconds:.3g} s{rate}"


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.generate",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--workdir",
    type=paths.argument(paths.reachable),
    required=True,
    metavar="DIR",
    help="folder of the run",
  )
  parser.add_argument(
    "--prompt", required=True, metavar="TEXT", help="may be empty"
  )
  parser.add_argument(
    "--max-tokens",
    type=int,
    default=256,
    metavar="N",
    help="longest continuation (default: %(default)s)",
  )
  parser.add_argument(
    "--temperature",
    type=float,
    default=1.0,
    metavar="X",
    help="below 1 likely tokens are preferred, 0 always takes the likeliest "
    "(default: %(default)s)",
  )
  parser.add_argument(
    "--top-k",
    type=int,
    metavar="K",
    help="draw from the K likeliest tokens (default: all)",
  )
  parser.add_argument(
    "--top-p",
    type=float,
    default=1.0,
    metavar="P",
    help="draw from the likeliest tokens of total probability P (default: 1)",
  )
  parser.add_argument(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="equal seeds give equal texts (default: %(default)s)",
  )
  parser.add_argument(
    "--step",
    default="latest",
    metavar="latest|best|N",
    help="checkpoint to use (default: %(default)s)",
  )
  return parser


if __name__ == "__main__":
  sys.exit(exit_code(main))
