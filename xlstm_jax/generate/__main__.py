"""`python -m xlstm_jax.generate`: continues a prompt."""

import argparse
import sys
from collections.abc import Sequence

import jax

from xlstm_jax import metrics, paths, sharding, trained
from xlstm_jax.errors import exit_code
from xlstm_jax.generate.sampling import Sampling
from xlstm_jax.generate.stream import COMPILE, DRAW, OTHER, READ, stream
from xlstm_jax.sharding import MeshConfig

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
