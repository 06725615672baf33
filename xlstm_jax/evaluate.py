"""Exact perplexity and bits per byte: `python -m xlstm_jax.evaluate --help`."""

import argparse
import contextlib
import dataclasses
import functools
import heapq
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from xlstm_jax import ngrams, paths, sharding, trained
from xlstm_jax.data.format import SPLITS
from xlstm_jax.data.shards import Split, open_split
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.objective import token_losses
from xlstm_jax.sharding import MeshConfig

Context = int | Literal["document"]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Score:
  """The loss summed over `tokens` targets.

  Attributes:
    nats: the sum of -log p(target).
    tokens: targets: the tokens of documents and their ends.
    bytes: UTF-8 bytes of the text these targets are; None when they are a
      part of the split.
  """

  nats: float = 0.0
  tokens: int = 0
  bytes: int | None = 0

  def __add__(self, other: "Score") -> "Score":
    size = None
    if self.bytes is not None and other.bytes is not None:
      size = self.bytes + other.bytes
    return Score(self.nats + other.nats, self.tokens + other.tokens, size)

  @property
  def loss(self) -> float:
    """Nats per target."""
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    """exp(loss)."""
    with np.errstate(over="ignore"):
      return float(np.exp(self.loss))

  @property
  def bits_per_byte(self) -> float | None:
    """Bits per UTF-8 byte of text; None without any text."""
    return self.nats / math.log(2) / self.bytes if self.bytes else None


@dataclasses.dataclass(frozen=True)
class Result:
  """The scores of every source that has targets."""

  sources: Mapping[str, Score]

  @property
  def total(self) -> Score:
    """The score over all sources."""
    return sum(self.sources.values(), Score())


def evaluate_split(
  definition: Definition,
  params: Params,
  split: Split | str | os.PathLike[str],
  *,
  context: Context,
  batch_size: int,
  mesh: Mesh,
  max_tokens: int | None = None,
  piece: int = 1024,
  loss_chunk: int = 256,
  before_batch: Callable[[], None] = lambda: None,
) -> Result:
  """Scores every token of every document and its end exactly once.

  The result depends on `batch_size`, `piece` and `mesh` by rounding alone. The
  losses leave the device in fp32 and are added up in fp64. However long the
  windows or documents are, a device holds its share of `batch_size` times
  `piece` positions at a time, or of `batch_size` windows if they are shorter.

  Args:
    definition: the model; dropout is off.
    params: its parameters, on `mesh`.
    split: what to score, or the folder whose "heldout" split it is.
    context: windows of so many positions, each from an empty state; or
      "document", where the state is carried through every document.
    batch_size: rows at a time, at most.
    mesh: rows are spread over data and fsdp, positions over sequence.
    max_tokens: score at most about so many targets: whole windows at equal
      distances over the split, always the same; None for all.
    piece: positions at a time of a window or document that is longer; a batch
      of fewer rows has as many more.
    loss_chunk: positions whose logits exist at a time.
    before_batch: called before every batch; may raise to end the evaluation.

  Raises:
    UserError: the model lacks tokens of the split, the mesh cannot divide a
      batch, or `max_tokens` is given for whole documents.
  """
  if not isinstance(split, Split):
    split = open_split(split, "heldout")
  if split.vocab_size > definition.cfg.vocab_size:
    raise UserError(
      f"{split.directory} has {split.vocab_size} token ids, the model only "
      f"{definition.cfg.vocab_size}; prepare it with the model's tokenizer."
    )
  if context != "document":
    # A window is no longer than the split.
    context = min(context, _multiple(split.tokens, _step(mesh)))
  length = piece if context == "document" else min(context, piece)
  _check_batch(batch_size, length, mesh)
  if context == "document":
    if max_tokens is not None:
      raise UserError(
        "A limit of tokens needs windows; with context 'document' whole "
        "documents are scored."
      )
    carry = True
    stops = np.cumsum(split.document_lengths().astype(np.int64) + 1)
    starts = np.concatenate([[0], stops[:-1]])
    sources = split.document_sources()
  else:
    sources = None
    carry = context > piece
    starts = _window_numbers(split, context, max_tokens) * context
    stops = np.minimum(starts + context, split.tokens)
  if carry:
    batches = _lanes(split, starts, stops, sources, batch_size, piece, mesh)
  else:
    batches = _windows(split, starts // length, batch_size, length, mesh)
  nats_S, tokens_S = _sums(
    definition,
    params,
    batches,
    len(split.sources),
    carry=carry,
    loss_chunk=loss_chunk,
    mesh=mesh,
    before_batch=before_batch,
  )
  return _result(split, nats_S, tokens_S, whole=max_tokens is None)


def _check_batch(batch_size: int, length: int, mesh: Mesh) -> None:
  if length < 1 or batch_size < 1:
    raise UserError(
      f"A batch of {batch_size} rows of {length} tokens cannot be scored; "
      "both must be at least 1."
    )
  shards = sharding.batch_shards(mesh)
  if batch_size % shards or length % mesh.shape["sequence"]:
    raise UserError(
      f"The mesh {dict(mesh.shape)} cannot divide batches of {batch_size} rows "
      f"of {length} tokens: rows must be a multiple of {shards}, tokens of "
      f"{mesh.shape['sequence']}."
    )


def _result(split: Split, nats_S, tokens_S, *, whole: bool) -> Result:
  sources = {}
  for at, name in enumerate(split.sources):
    counts = split.counts[name]
    if whole and tokens_S[at] != counts.tokens:
      raise AssertionError(
        f"{tokens_S[at]} targets of {name} were scored, not {counts.tokens}"
      )
    if tokens_S[at]:
      sources[name] = Score(
        float(nats_S[at]),
        int(tokens_S[at]),
        counts.bytes if whole else None,
      )
  return Result(sources)


def _window_numbers(
  split: Split, context: int, max_tokens: int | None
) -> np.ndarray:
  """The windows to score: all, or some at equal distances."""
  total = split.window_count(context)
  wanted = total
  if max_tokens is not None:
    wanted = min(max(max_tokens // context, 1), total)
  return np.arange(wanted) * total // wanted


def _windows(
  split: Split, numbers: np.ndarray, batch_size: int, context: int, mesh: Mesh
) -> Iterator[Batch]:
  """Batches of independent windows; the last one may have empty rows."""
  size = _even(len(numbers), batch_size, sharding.batch_shards(mesh))
  for start in range(0, len(numbers), size):
    rows = numbers[start : start + size]
    batch = split.windows(rows, context)
    batch["sources"] = split.window_sources(rows, context)
    missing = ((0, size - len(rows)), (0, 0))
    yield {name: np.pad(rows, missing) for name, rows in batch.items()}


# Of all tokens, what lanes may take with the waiting for the longest of them.
_WAITING = 4 / 3


class _Lane(NamedTuple):
  """Spans of the stream that a row reads one after the other.

  Arrays of a number per span: its first input position in the stream, where it
  begins and ends in the lane, and its source if it is of one.
  """

  starts: np.ndarray
  begins: np.ndarray
  ends: np.ndarray
  sources: np.ndarray | None


def _lanes(
  split: Split,
  starts: np.ndarray,
  stops: np.ndarray,
  sources: np.ndarray | None,
  batch_size: int,
  piece: int,
  mesh: Mesh,
) -> Iterator[Batch]:
  """Batches in which row b goes on where row b of the batch before ended.

  The segments of a lane count its spans and the documents in them, so that the
  state is carried exactly as far as a document goes, and out of no span.

  Args:
    split: what is read.
    starts: first input position of every span.
    stops: the end of every span.
    sources: of every span; None where they are of several.
    batch_size: lanes, at most.
    piece: positions at a time of so many lanes.
    mesh: must divide a batch.
  """
  sizes = stops - starts
  shards = sharding.batch_shards(mesh)
  # With more lanes than these some would wait for the longest span.
  rows = int(sizes.sum() // sizes.max()) // shards * shards
  rows = min(max(rows, shards), batch_size)
  packed, end = _packed(sizes, rows)
  while rows > shards and rows * end > _WAITING * sizes.sum():
    rows -= shards
    packed, end = _packed(sizes, rows)
  lanes = []
  for spans in packed:
    ends = np.cumsum(sizes[spans])
    of_lane = None if sources is None else sources[spans]
    lanes.append(_Lane(starts[spans], ends - sizes[spans], ends, of_lane))
  length = _even(end, piece * (batch_size // rows), _step(mesh))
  seen = [0] * rows
  for first in range(0, end, length):
    batch = {
      name: np.zeros((rows, length), np.int32)
      for name in ("inputs", "targets", "segments", "sources")
    }
    for row, lane in enumerate(lanes):
      columns = {name: values[row] for name, values in batch.items()}
      seen[row] = _read(split, lane, first, columns, seen[row])
    yield batch


def _packed(sizes: np.ndarray, rows: int) -> tuple[list[np.ndarray], int]:
  """The numbers of the spans of each lane, and the length of the longest lane.

  The longest span is placed first, each in the lane that is the shortest yet.
  """
  lane_of = np.empty(len(sizes), np.int64)
  shortest = [(0, lane) for lane in range(rows)]
  for span in np.argsort(-sizes, kind="stable").tolist():
    length, lane = shortest[0]
    lane_of[span] = lane
    heapq.heapreplace(shortest, (length + int(sizes[span]), lane))
  borders = np.cumsum(np.bincount(lane_of, minlength=rows))[:-1]
  return np.split(np.argsort(lane_of, kind="stable"), borders), max(shortest)[0]


def _read(
  split: Split,
  lane: _Lane,
  first: int,
  columns: dict[str, np.ndarray],
  segment: int,
) -> int:
  """Fills one row with a lane's positions from `first` on.

  Args:
    split: what is read.
    lane: of it.
    first: position in the lane.
    columns: zeros [T] for each name of a batch.
    segment: the last of the lane before `first`.

  Returns:
    The last segment.
  """
  stop = first + len(columns["inputs"])
  low = np.searchsorted(lane.ends, first, side="right")
  high = np.searchsorted(lane.begins, stop)
  for number in range(low, high):
    begin = int(max(lane.begins[number], first))
    end = int(min(lane.ends[number], stop))
    start = int(lane.starts[number] - lane.begins[number]) + begin
    tokens = split.read(start, start + end - begin + 1)
    opens = tokens[:-1] == split.end_of_text
    opens[0] |= begin == lane.begins[number]
    segments = segment + np.cumsum(opens)
    segment = int(segments[-1])
    at = slice(begin - first, end - first)
    columns["inputs"][at] = tokens[:-1]
    columns["targets"][at] = tokens[1:]
    columns["segments"][at] = segments
    if lane.sources is None:
      sources = split.target_sources(start, start + end - begin)
    else:
      sources = lane.sources[number]
    columns["sources"][at] = sources
  return segment


def _even(count: int, limit: int, step: int) -> int:
  """The size of parts, at most `limit`, that leave little of the last empty.

  It is a multiple of `step`, or the limit.
  """
  parts = -(-count // limit)
  return min(_multiple(-(-count // parts), step), limit)


def _multiple(count: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-count // step) * step


def _step(mesh: Mesh) -> int:
  """Positions by which the length of a short batch is rounded up.

  Each share of the time needs a few, and shapes should not be too many.
  """
  return 64 * mesh.shape["sequence"]


def _sums(
  definition,
  params,
  batches,
  num_sources,
  *,
  carry,
  loss_chunk,
  mesh,
  before_batch,
) -> tuple[np.ndarray, np.ndarray]:
  """Nats and targets per source."""
  nats_S = np.zeros(num_sources)
  tokens_S = np.zeros(num_sources, np.int64)

  def add(batch: Batch, loss_BT: jax.Array) -> None:
    real_BT = batch["segments"] > 0
    sources = batch["sources"][real_BT]
    losses = np.asarray(loss_BT)[real_BT].astype(np.float64)
    nats_S[:] += np.bincount(sources, losses, minlength=num_sources)
    tokens_S[:] += np.bincount(sources, minlength=num_sources)

  # The losses of a batch are fetched while the next one is computed.
  waiting = None
  state = None
  with jax.set_mesh(mesh):
    for batch in batches:
      before_batch()
      tokens = _put(batch, mesh)
      if carry and state is None:
        state = _empty(definition, params, len(batch["inputs"]))
      loss_BT, state = _losses(
        definition, params, tokens, state, loss_chunk=loss_chunk, carry=carry
      )
      if waiting is not None:
        add(*waiting)
      waiting = batch, loss_BT
  if waiting is not None:
    add(*waiting)
  return nats_S, tokens_S


def _put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """What the model reads, on the mesh; every process takes its share."""
  target = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(
      batch[name].shape, target, batch[name].__getitem__
    )
    for name in ("inputs", "targets", "segments")
  }


@functools.partial(jax.jit, static_argnames=("definition", "batch_size"))
def _empty(definition, params, batch_size):
  return _by_rows(definition.bind(params).empty_state(batch_size))


@functools.partial(
  jax.jit, static_argnames=("definition", "loss_chunk", "carry")
)
def _losses(definition, params, batch, state, *, loss_chunk, carry):
  """The loss of every target [B, T], whole on every process; the state."""
  lm = definition.bind(params)
  x_BTD, state = lm(batch["inputs"], segments_BT=batch["segments"], state=state)
  loss_BT = token_losses(
    lm.vocabulary_weight(),
    x_BTD,
    batch["targets"],
    chunk=loss_chunk,
    cap=lm.cfg.logit_cap,
  )
  loss_BT = sharding.constrain(loss_BT, None, None)
  return loss_BT, _by_rows(state) if carry else None


def _by_rows(state):
  """The same sharding in every call: states are [repeats, rows, ...]."""
  return jax.tree.map(
    lambda x: sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2)),
    state,
  )


_DESCRIPTION = """\
Scores a trained model on held-out text, in total and per source: perplexity
per token, and bits per UTF-8 byte of text (nats / ln 2 / bytes), which compares
across tokenizers. Every token of every document and its end counts once.
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
  if options.json is not None:
    _write_json(options.json, report)
  return 0


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
    "unigram": _result(split, unigram_S, tokens_S, whole=True),
    "bigram": _result(split, bigram_S, tokens_S, whole=True),
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


def _write_json(file: str, report: Mapping[str, Any]) -> None:
  path = epath.Path(file)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
  except OSError as error:
    raise UserError(f"{file} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
  sys.exit(exit_code(main))
