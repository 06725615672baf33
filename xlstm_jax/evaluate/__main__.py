"""`python -m xlstm_jax.evaluate`: perplexity of held-out text, and more."""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlstm_jax import files, ngrams, paths, sharding, trained
from xlstm_jax.config import RunConfig
from xlstm_jax.data.layout import SPLITS
from xlstm_jax.data.shards import Split, open_split
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.evaluators import table as evaluators
from xlstm_jax.evaluators.evaluator import Context, Subject
from xlstm_jax.evaluators.perplexity import (
  Result,
  Score,
  by_source,
  evaluate_split,
)
from xlstm_jax.sharding import MeshConfig

_DESCRIPTION = """\
Scores a trained model on held-out text, in total and per source: perplexity
per token, and bits per UTF-8 byte of text (nats / ln 2 / bytes), which compares
across tokenizers. Every token of every document and its end counts once. Other
evaluators of the run (config.evaluators.names) give their figures after that.
"""
_EXAMPLES = """\
examples:
  python -m xlstm_jax.evaluate --workdir=runs/quickstart --ngrams
  python -m xlstm_jax.evaluate --workdir=runs/a --context=document \\
    --data=data/books --data=data/code --json=runs/a/heldout.json
"""
# Tokens of a batch on every share of the mesh where no batch size is given.
_BATCH_TOKENS = 16384


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  options = _parser().parse_args(arguments)
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
  model = trained.load(options.workdir, step=options.step, mesh=mesh)
  _check_evaluators(model.cfg)
  context = options.context or model.cfg.data.context
  if context == "document":
    piece = length = min(model.cfg.data.context, _BATCH_TOKENS)
  else:
    piece, length = _BATCH_TOKENS, min(context, _BATCH_TOKENS)
  batch_size = options.batch_size or (
    _BATCH_TOKENS // length * sharding.batch_shards(mesh)
  )
  folders = options.data or model.cfg.data.paths
  if not folders:
    raise UserError(f"The run in {options.workdir} names no data: give --data.")
  splits = {path: open_split(path, options.split) for path in folders}
  for path, split in splits.items():
    trained.check_tokenizer(model, split.manifest.tokenizer.hash, path)
  counted = _count(model.cfg.data.paths) if options.ngrams else None
  report: dict[str, Any] = {
    "workdir": str(options.workdir),
    "step": model.step,
    "split": options.split,
    "context": context,
    "data": {},
  }
  print(f"{options.workdir}, step {model.step}, context {context}", flush=True)
  for path, split in splits.items():
    with _memory_explained(context, batch_size):
      result = evaluate_split(
        model.definition,
        model.params,
        split,
        context=context,
        batch_size=batch_size,
        mesh=mesh,
        piece=piece,
      )
    baselines = _baselines(split, counted) if counted is not None else {}
    print(
      f"\n{options.split} of {path}\n{table(result, baselines)}", flush=True
    )
    report["data"][str(path)] = _as_json(split, result, baselines)
  subject = Subject(
    definition=model.definition,
    params=model.params,
    mesh=mesh,
    heldout=list(splits.values()),
    context=context,
    batch_size=batch_size,
    piece=piece,
  )
  with _memory_explained(context, batch_size):
    figures = _other_figures(subject, model.cfg)
  if figures:
    lines = [f"{name} {value:.4f}" for name, value in figures.items()]
    print("\n" + "\n".join(lines), flush=True)
    report["figures"] = {n: _finite(value) for n, value in figures.items()}
  if options.json is not None:
    path = Path(options.json)
    with files.writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_json(path, report)
  return 0


def _check_evaluators(cfg: RunConfig) -> None:
  """Before hours of work: the run may be of a version that has others."""
  for name in cfg.evaluators.names:
    if name not in evaluators.EVALUATORS:
      raise UserError(
        f"The run names the evaluator {name!r}; there are "
        f"{', '.join(evaluators.EVALUATORS)}."
      )


def _other_figures(subject: Subject, cfg: RunConfig) -> dict[str, float]:
  """What the run's evaluators find, except for the perplexity."""
  names = [n for n in cfg.evaluators.names if n != evaluators.PERPLEXITY]
  return evaluators.figures(subject, cfg.evaluators, tuple(names))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.evaluate",
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
    "--data",
    type=paths.argument(paths.reachable),
    action="append",
    metavar="DIR",
    help="prepared dataset to score, may be given several times (default: "
    "those of the run)",
  )
  parser.add_argument(
    "--split",
    choices=SPLITS,
    default="heldout",
    help="which part of them (default: %(default)s)",
  )
  parser.add_argument(
    "--context",
    type=_context,
    metavar="N|document",
    help="positions of a window, which starts from an empty state; or carry "
    "the state through every document (default: the training length)",
  )
  parser.add_argument(
    "--step",
    default="latest",
    metavar="latest|best|N",
    help="checkpoint to score (default: %(default)s)",
  )
  parser.add_argument(
    "--batch-size",
    type=_positive,
    metavar="N",
    help="rows at a time, at most; of longer windows and of documents a piece "
    f"at a time (default: {_BATCH_TOKENS} tokens on every device)",
  )
  parser.add_argument(
    "--ngrams",
    action="store_true",
    help="also score unigram and bigram models fitted on the run's training "
    f"shards (vocabularies of at most {ngrams.MAX_VOCAB_SIZE})",
  )
  parser.add_argument(
    "--json",
    type=paths.argument(paths.new_file),
    metavar="FILE",
    help="write the scores to this file too",
  )
  return parser


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
  return int(text)


def _context(text: str) -> Context:
  return "document" if text == "document" else _positive(text)


@contextlib.contextmanager
def _memory_explained(context: Context, batch_size: int) -> Iterator[None]:
  """Within, memory that runs out is an error of the arguments."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    # What XLA says of a device's memory and of a CPU's.
    on_device = "RESOURCE_EXHAUSTED" in str(error)
    if not on_device and not isinstance(error, MemoryError):
      raise
    raise UserError(
      f"Memory ran out with --context={context} and --batch-size={batch_size}; "
      "a smaller --batch-size takes less, and so do shorter windows, "
      "--context=N."
    ) from error


def _count(folders: Sequence[str]) -> ngrams.NGrams:
  """The n-gram models of the training shards."""
  if not folders:
    raise UserError("The run names no training data to fit n-grams on.")
  splits = [open_split(folder, "train") for folder in folders]
  chunks = (tokens for split in splits for _, tokens in split.chunks())
  return ngrams.fit(chunks, splits[0].vocab_size)


def _baselines(split: Split, counted: ngrams.NGrams) -> dict[str, Result]:
  """What the n-gram models reach on the targets of a split."""
  chunks = (
    (tokens, split.target_sources(start, start + len(tokens) - 1))
    for start, tokens in split.chunks()
  )
  unigram_S, bigram_S = ngrams.nats(counted, chunks, len(split.sources))
  tokens_S = np.array([split.counts[name].tokens for name in split.sources])
  return {
    "unigram": by_source(split, unigram_S, tokens_S, whole=True),
    "bigram": by_source(split, bigram_S, tokens_S, whole=True),
  }


def table(result: Result, baselines: Mapping[str, Result]) -> str:
  """A line per source and one for their total, the largest source first.

  Args:
    result: of the model.
    baselines: others on the same targets, which stand beside the model.
  """
  names = sorted(result.sources, key=lambda n: -result.sources[n].tokens)
  # Two lines, so that the names of the baselines stand above their units.
  rows = [
    [*[""] * 5, *(name for name in baselines for _ in range(2))],
    ["source", "bytes", "targets"]
    + ["perplexity", "bits/byte"] * (1 + len(baselines)),
  ]
  for name in names:
    others = [other.sources[name] for other in baselines.values()]
    rows.append(_row(name, result.sources[name], others))
  rows.append(
    _row("total", result.total, [other.total for other in baselines.values()])
  )
  if not baselines:
    del rows[0]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if at else cell.ljust(width)
      for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  )


def _row(name: str, score: Score, others: Iterable[Score]) -> list[str]:
  size = "-" if score.bytes is None else f"{score.bytes:,}"
  cells = [name, size, f"{score.tokens:,}"]
  for one in (score, *others):
    bits = one.bits_per_byte
    cells.append(f"{one.perplexity:.4f}")
    cells.append("-" if bits is None else f"{bits:.4f}")
  return cells


def _as_json(
  split: Split, result: Result, baselines: Mapping[str, Result]
) -> dict[str, Any]:
  def entry(score: Score, documents: int, others: Mapping[str, Score]):
    return {
      "documents": documents,
      "bytes": score.bytes,
      "targets": score.tokens,
      "nats": _finite(score.nats),
      "perplexity": _finite(score.perplexity),
      "bits_per_byte": _finite(score.bits_per_byte),
      "perplexity_of": {
        name: _finite(other.perplexity) for name, other in others.items()
      },
      "bits_per_byte_of": {
        name: _finite(other.bits_per_byte) for name, other in others.items()
      },
    }

  return {
    "total": entry(
      result.total,
      split.documents,
      {n: other.total for n, other in baselines.items()},
    ),
    "sources": {
      name: entry(
        score,
        split.counts[name].documents,
        {n: other.sources[name] for n, other in baselines.items()},
      )
      for name, score in result.sources.items()
    },
  }


def _finite(value: float | None) -> float | None:
  """JSON has no infinity and no NaN, which a diverged model reaches."""
  return value if value is not None and math.isfinite(value) else None


if __name__ == "__main__":
  sys.exit(exit_code(main))
