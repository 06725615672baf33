"""`python -m xlstm_jax.prepare`: turns text into token shards."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xlstm_jax import paths
from xlstm_jax.data import documents, tokenizer
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.prepare import folder, refusals
from xlstm_jax.prepare.preparation import TRAINING_MIB, Options, Preparation
from xlstm_jax.prepare.report import say

_DESCRIPTION = """\
Turns text into token shards that training, evaluation and generation read.

Inputs are files or folders, and are read by what they hold. JSON lines hold a
document a line, as SlimPajama does:
  {"text": "...", "meta": {"redpajama_set_name": "RedPajamaWikipedia"}}
Every other file is one document of plain text, except that .json files are JSON
lines or skipped. Both may be packed: gzip, zstd, xz, bzip2. Parquet, archives
and the like are skipped, with what to do. All text is UTF-8. Folders are read
recursively in sorted order, without hidden files and symbolic links.

An interrupted preparation is continued by the same command, and gives the same
files as one that never stopped.
"""
_EXAMPLES = """\
examples:
  python -m xlstm_jax.prepare --input=corpus.jsonl.zst --output=data/corpus \\
    --tokenizer=byte
  python -m xlstm_jax.prepare --input=code=src/ --input=prose=books/ \\
    --output=data/mixed --train-tokenizer=8192 --heldout-fraction=0.02
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  options = _parser().parse_args(arguments)
  try:
    return _prepare(options)
  except KeyboardInterrupt:
    print("interrupted; run the same command to continue", file=sys.stderr)
    return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.prepare",
    usage="%(prog)s --input=[SOURCE=]PATH... --output=DIR\n"
    "    (--tokenizer=byte|FILE | --train-tokenizer=N) [options]",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--input",
    action="append",
    required=True,
    metavar="[SOURCE=]PATH",
    help="a file or folder to read, may be given several times; documents "
    f"that name no source get SOURCE, or else {documents.DEFAULT_SOURCE!r}",
  )
  parser.add_argument(
    "--output",
    type=paths.argument(paths.reachable),
    required=True,
    metavar="DIR",
    help="folder to write; new, empty, or of the same command before",
  )
  kind = parser.add_mutually_exclusive_group(required=True)
  kind.add_argument(
    "--tokenizer",
    type=paths.argument(paths.reachable),
    metavar="byte|FILE",
    help="byte (257 ids), or a Hugging Face tokenizer.json",
  )
  kind.add_argument(
    "--train-tokenizer",
    type=_number(int, 257, 2**20),
    metavar="N",
    help="train a byte-level BPE with a vocabulary of N on the input",
  )
  parser.add_argument(
    "--end-of-text",
    metavar="TOKEN",
    help="the end-of-text token of the tokenizer.json, where it is not one of "
    f"{', '.join(tokenizer.END_OF_TEXT_NAMES[:4])} and the like",
  )
  parser.add_argument(
    "--heldout-fraction",
    type=_number(float, 0, 1),
    default=0.01,
    metavar="F",
    help="share of the documents held out for evaluation, chosen by a hash of "
    "their text; 0 and 1 put all into one split (default: %(default)s)",
  )
  parser.add_argument(
    "--max-bad-lines",
    type=_number(int, 0, 2**62),
    default=100,
    metavar="N",
    help="give up when more lines or files than this cannot be read; a rerun "
    "with a higher number continues (default: %(default)s)",
  )
  parser.add_argument(
    "--max-document-size",
    type=_number(int, 1, 2048),
    default=256,
    metavar="MIB",
    help="longer lines and text files count as bad (default: %(default)s)",
  )
  parser.add_argument(
    "--shard-size",
    type=_number(int, 1, 4096),
    default=512,
    metavar="MIB",
    help="size at which a new shard is begun (default: %(default)s)",
  )
  parser.add_argument(
    "--train-tokenizer-size",
    type=_number(int, 1, 2**20),
    metavar="MIB",
    help="text to train the tokenizer on, in equal parts from the beginning "
    f"of every --input (default: {TRAINING_MIB})",
  )
  parser.add_argument(
    "--workers",
    type=_number(int, 1, 4096),
    default=_cores(),
    metavar="N",
    help="processes that parse and encode; does not change the result "
    "(default: one per core, %(default)s)",
  )
  return parser


def _cores() -> int:
  """The cores this process may use, where the system tells."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _number[N: (int, float)](
  kind: Callable[[str], N], low: N, high: N
) -> Callable[[str], N]:
  def parse(text: str) -> N:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not low <= value <= high:
      raise argparse.ArgumentTypeError(
        f"{text!r} is not a number from {low} to {high}"
      )
    return kind(text)

  return parse


def _prepare(options: argparse.Namespace) -> int:
  _refuse_ignored(options)
  inputs = documents.find(options.input)
  output = Path(options.output)
  refusals.refuse_nesting(output, options.input)
  if inputs.hidden or inputs.links:
    say(
      f"passing over {inputs.hidden} hidden entries and {inputs.links} "
      "symbolic links"
    )
  chosen = Options(
    inputs=options.input,
    tokenizer=_tokenizer(options),
    train_tokenizer_size=options.train_tokenizer_size or TRAINING_MIB,
    heldout_fraction=options.heldout_fraction,
    max_bad_lines=options.max_bad_lines,
    max_document_size=options.max_document_size,
    shard_size=options.shard_size,
    workers=options.workers,
  )
  with folder.exclusive(output), folder.explained(output):
    stopped_by = Preparation(chosen, inputs.files, output).run()
  return 128 + stopped_by if stopped_by else 0


def _tokenizer(options: argparse.Namespace) -> tokenizer.Tokenizer | int:
  if options.tokenizer is None:
    return options.train_tokenizer
  return tokenizer.load(options.tokenizer, end_of_text=options.end_of_text)


def _refuse_ignored(options: argparse.Namespace) -> None:
  """Refuses what the chosen tokenizer would not heed."""
  size, end = options.train_tokenizer_size, options.end_of_text
  if options.train_tokenizer is None and size is not None:
    raise UserError(
      f"--train-tokenizer-size={size} is for --train-tokenizer=N, but "
      f"--tokenizer={options.tokenizer} is trained already: give one of them."
    )
  if end is None:
    return
  if options.train_tokenizer is not None:
    chosen = f"--train-tokenizer={options.train_tokenizer}"
  elif options.tokenizer == tokenizer.ByteTokenizer.kind or (
    (Path(options.tokenizer) / tokenizer.SPEC_FILE).exists()
  ):
    chosen = f"--tokenizer={options.tokenizer}"
  else:
    return
  raise UserError(
    f"--end-of-text={end} is for a tokenizer.json, but {chosen} has an end of "
    "text of its own: leave --end-of-text out."
  )


if __name__ == "__main__":
  sys.exit(exit_code(main))
