"""Turns text into token shards: `python -m xlstm_jax.prepare --help`."""

import argparse
import collections
import contextlib
import errno
import fcntl
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax import paths
from xlstm_jax.data import (
  documents,
  encoding,
  journal,
  json_lines,
  shards,
  tokenizer,
  writer,
)
from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError, exit_code

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

_MIB = 2**20
# Text per task of a worker: large against the cost of sending a message.
_TASK_BYTES = _MIB
_COMMIT_SECONDS = 10.0
_SHOWN_PROBLEMS = 20
# Text to train a tokenizer on.
_TRAINING_MIB = 64
_WRITE_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
)


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
    f"of every --input (default: {_TRAINING_MIB})",
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
  _refuse_nesting(output, options.input)
  if inputs.hidden or inputs.links:
    _say(
      f"passing over {inputs.hidden} hidden entries and {inputs.links} "
      "symbolic links"
    )
  given = _given_tokenizer(options)
  with _exclusive(output), _explained(output):
    return _Preparation(options, inputs.files, output, given).run()


class _Preparation:
  """One run of the command."""

  def __init__(
    self,
    options: argparse.Namespace,
    inputs: Sequence[documents.Input],
    output: Path,
    given: tokenizer.Tokenizer | None,
  ):
    self._options = options
    self._inputs = inputs
    self._output = output
    self._max_document_bytes = options.max_document_size * _MIB
    self._given = given
    self._journal = self._recognise()
    self._writers: dict[str, writer.SplitWriter] = {}
    self._source_ids = {name: i for i, name in enumerate(self._journal.sources)}
    self._skipped = _Skipped(output / files.SKIPPED)

  def run(self) -> int:
    if (self._output / files.MANIFEST).exists():
      return self._already_finished()
    self._skipped.cut(self._journal.skipped)
    tokens = self._tokenizer()
    shard_entries = self._options.shard_size * _MIB // tokens.dtype.itemsize
    try:
      for name, state in self._journal.splits.items():
        self._writers[name] = writer.SplitWriter(
          self._output,
          name,
          tokens.spec,
          shard_entries=shard_entries,
          state=state,
        )
      stopped_by = self._encode_all(tokens)
      if stopped_by:
        return self._stopped(stopped_by)
      self._finish(tokens)
    finally:
      for split in self._writers.values():
        split.close()
    return 0

  def _recognise(self) -> journal.Journal:
    """The journal to go on with; refuses what is not of this command."""
    new = journal.Journal(
      settings=_settings(self._options, self._given),
      listing=documents.listing_hash(self._inputs, times=True),
      sizes=documents.listing_hash(self._inputs, times=False),
    )
    old = journal.load(self._output)
    if old is None:
      _refuse_strangers(self._output)
      new.save(self._output)
      return new
    if old.place == documents.Place():
      # Nothing is lost by starting over with whatever is asked for now. A
      # tokenizer that was trained on the same inputs stays.
      same = all(
        getattr(old, name) == getattr(new, name)
        for name in ("settings", "listing", "rules")
      )
      return old if same else new
    _refuse_other_settings(self._output, old.settings, new.settings)
    if old.sizes != new.sizes or old.place.file >= len(self._inputs):
      raise _other_inputs(self._output)
    self._refuse_other_rules(old, new)
    if old.listing != new.listing:
      self._check_contents(old.place)
      old.listing = new.listing
    return old

  def _refuse_other_rules(
    self, old: journal.Journal, new: journal.Journal
  ) -> None:
    """Refuses to go on, or to compare contents, by other rules."""
    done = (self._output / files.MANIFEST).exists()
    if old.rules == new.rules or (done and old.listing == new.listing):
      return
    if one := documents.read_otherwise(self._inputs):
      raise UserError(
        f"{self._output} was begun by an older version, which read {one.path} "
        "in another way; use another --output."
      )
    # What is left is read by the new rules.
    old.rules = new.rules

  def _check_contents(self, place: documents.Place) -> None:
    _say("the inputs have other modification times: checking their contents")
    crc = documents.content_crc(
      self._inputs, place, max_document_bytes=self._max_document_bytes
    )
    if crc != place.crc:
      raise _other_inputs(self._output)

  def _tokenizer(self) -> tokenizer.Tokenizer:
    if self._journal.tokenizer:
      tokens = tokenizer.load(self._output)
      if tokens.hash != self._journal.tokenizer:
        raise UserError(
          f"The tokenizer in {self._output} is not the one its shards were "
          "begun with; delete the folder and prepare again."
        )
      return tokens
    tokens = self._given or self._train()
    # What an attempt with another tokenizer may have left.
    (self._output / tokenizer.HUGGING_FACE_FILE).unlink(missing_ok=True)
    tokens.save(self._output)
    self._journal.tokenizer = tokens.hash
    self._journal.save(self._output)
    return tokens

  def _train(self) -> tokenizer.Tokenizer:
    wanted = self._options.train_tokenizer
    _say(f"training a tokenizer of {wanted} entries")
    tokens = tokenizer.train(self._training_texts(), wanted)
    if tokens.vocab_size < wanted:
      _say(f"the text gave a vocabulary of only {tokens.vocab_size} entries")
    return tokens

  def _training_texts(self) -> Iterator[str]:
    """Documents that are not held out, the same amount of every argument."""
    budget = _training_mib(self._options) * _MIB
    share = budget // len(self._options.input)
    for argument in range(len(self._options.input)):
      chosen = [one for one in self._inputs if one.argument == argument]
      left = share
      for text in self._texts(chosen):
        if left <= 0:
          break
        for part in tokenizer.training_parts(text.decode()):
          if left > 0:
            yield part
          left -= len(part.encode())

  def _texts(self, inputs: Sequence[documents.Input]) -> Iterator[bytes]:
    limit = self._max_document_bytes
    for piece in documents.read(
      inputs,
      documents.Place(),
      piece_bytes=_TASK_BYTES,
      max_document_bytes=limit,
    ):
      for one in documents.parse(piece, max_document_bytes=limit).documents:
        split = encoding.split_of(one.text, self._options.heldout_fraction)
        if split == "train":
          yield one.text

  def _encode_all(self, tokens: tokenizer.Tokenizer) -> int:
    """Encodes what is left; returns the signal that ended it early, or 0."""
    if self._journal.place != documents.Place():
      done = sum(c.documents for c in self._journal.totals.values())
      _say(f"continuing behind {done:,} documents")
    progress = _Progress(self._inputs, self._journal.place)
    committed = time.monotonic()
    with _stop_requests() as stop, self._results(tokens) as results:
      for encoded in results:
        self._append(encoded)
        progress.update(encoded, self._journal)
        if stop:
          self._commit()
          progress.end()
          return stop[0]
        if time.monotonic() - committed > _COMMIT_SECONDS:
          self._commit()
          committed = time.monotonic()
    progress.end()
    return 0

  @contextlib.contextmanager
  def _results(
    self, tokens: tokenizer.Tokenizer
  ) -> Iterator[Iterator[encoding.Encoded]]:
    pieces = documents.read(
      self._inputs,
      self._journal.place,
      piece_bytes=_TASK_BYTES,
      max_document_bytes=self._max_document_bytes,
    )
    fraction = self._options.heldout_fraction
    if self._options.workers == 1:
      encoder = encoding.Encoder(
        tokens,
        heldout_fraction=fraction,
        max_document_bytes=self._max_document_bytes,
      )
      yield map(encoder, _tasks(pieces))
      return
    pool = futures.ProcessPoolExecutor(
      self._options.workers,
      mp_context=multiprocessing.get_context("spawn"),
      initializer=encoding.start_worker,
      initargs=(self._output, fraction, self._max_document_bytes),
    )
    try:
      yield _in_order(pool, _tasks(pieces), self._options.workers)
    except BrokenProcessPool as error:
      raise UserError(
        "A worker process died, for want of memory perhaps; run the same "
        "command to continue, with fewer --workers."
      ) from error
    finally:
      pool.shutdown(cancel_futures=True)

  def _append(self, encoded: encoding.Encoded) -> None:
    ids = np.array([self._source_id(n) for n in encoded.sources], np.int64)
    for name, part in encoded.splits.items():
      if len(part.lengths):
        self._writers[name].append(
          part.tokens, part.lengths, ids[part.sources], part.sizes
        )
    self._journal.place = encoded.end
    self._journal.empty_lines += encoded.empty
    for problem in encoded.problems:
      self._record(problem)

  def _source_id(self, name: str) -> int:
    if name not in self._source_ids:
      if len(self._source_ids) == files.MAX_SOURCES:
        raise UserError(
          f"The inputs name more than {files.MAX_SOURCES} sources, the last "
          f"one {name!r}; is {json_lines.SOURCE_KEY!r} a source at all?"
        )
      self._source_ids[name] = len(self._source_ids)
      self._journal.sources.append(name)
    return self._source_ids[name]

  def _record(self, problem: documents.Problem) -> None:
    """Counts and reports a document that is skipped; refuses too many."""
    state = self._journal
    one = self._inputs[problem.file]
    if problem.harmless:
      state.empty_files += 1
      return
    state.skipped += 1
    where = f"{one.path}:{problem.line}" if problem.line else one.path
    if state.skipped <= _SHOWN_PROBLEMS:
      _say(f"skipping {where}: {problem.reason}")
    elif state.skipped == _SHOWN_PROBLEMS + 1:
      _say(f"further ones are not shown; {self._skipped.path} lists them all")
    self._skipped.add(one.name, problem)
    limit = self._options.max_bad_lines
    if state.skipped > limit:
      self._skipped.write()
      raise UserError(
        f"{state.skipped} lines or files cannot be read, the last one {where}: "
        f"{problem.reason}; that is more than --max-bad-lines={limit}. "
        f"{self._skipped.path} lists them. Run again with a higher number to "
        "continue, or mend the input and begin a new --output."
      )

  def _commit(self) -> None:
    """Makes what was appended durable, then says so in the journal."""
    self._skipped.write()
    for name, split in self._writers.items():
      self._journal.splits[name] = split.flush()
    files.sync_directory(self._output)
    self._journal.save(self._output)

  def _stopped(self, number: int) -> int:
    done = sum(c.documents for c in self._journal.totals.values())
    _say(
      f"stopped by {signal.Signals(number).name}: {done:,} documents are "
      "kept; run the same command to continue"
    )
    return 128 + number

  def _finish(self, tokens: tokenizer.Tokenizer) -> None:
    self._skipped.write()
    for name, split in self._writers.items():
      self._journal.splits[name] = split.finish()
    totals = self._journal.totals
    if not any(counts.documents for counts in totals.values()):
      raise UserError(
        f"The {len(self._inputs)} input files hold no documents "
        f"({self._journal.skipped} lines or files could not be read"
        f"{_listed(self._journal.skipped)}, {self._journal.empty_files} files "
        f"are empty, {self._journal.empty_lines} lines hold no text)."
      )
    files.sync_directory(self._output)
    self._journal.save(self._output)
    manifest = self._manifest(tokens)
    files.write_manifest(self._output, manifest)
    print(f"{self._output} is ready")
    _summarise(manifest)

  def _manifest(self, tokens: tokenizer.Tokenizer) -> files.Manifest:
    state = self._journal
    return files.Manifest(
      tokenizer=tokens.spec,
      sources=tuple(state.sources),
      splits={
        name: _split_manifest(split, state.sources)
        for name, split in state.splits.items()
      },
      origin={
        "settings": state.settings,
        "files": len(self._inputs),
        "content_crc32": state.place.crc,
        "skipped": state.skipped,
        "empty_files": state.empty_files,
        # Not where there are none, as in datasets of older versions.
        **({"empty_lines": state.empty_lines} if state.empty_lines else {}),
      },
    )

  def _already_finished(self) -> int:
    manifest = files.read_manifest(self._output)
    for name, split in manifest.splits.items():
      if split.shards:
        shards.open_split(self._output, name, verify="first_use")
    print(f"{self._output} is already prepared, by this command")
    _summarise(manifest)
    return 0


class _Skipped:
  """The list of what could not be read: file, line and reason, as JSON lines.

  It is of use where nothing else is written, after a refusal.
  """

  def __init__(self, path: Path):
    self.path = path
    self._waiting: list[str] = []

  def cut(self, kept: int) -> None:
    """Keeps so many lines: those that the journal counts."""
    if kept == 0:
      self.path.unlink(missing_ok=True)
    elif self.path.exists():
      with self.path.open("r+b") as file:
        for _ in range(kept):
          file.readline()
        file.truncate(file.tell())

  def add(self, name: str, problem: documents.Problem) -> None:
    """Lists one more, with the next `write`."""
    value = {"file": name, "line": problem.line, "reason": problem.reason}
    self._waiting.append(f"{json.dumps(value)}\n")

  def write(self) -> None:
    """Makes durable what was added."""
    if self._waiting:
      with self.path.open("a", encoding="utf-8") as file:
        file.writelines(self._waiting)
        file.flush()
        os.fsync(file.fileno())
      self._waiting = []


class _Progress:
  """A line on stderr: often on a terminal, else every half minute."""

  def __init__(self, inputs: Sequence[documents.Input], place: documents.Place):
    self._before = [0]
    for one in inputs:
      self._before.append(self._before[-1] + one.size)
    self._terminal = sys.stderr.isatty()
    self._started = self._shown = time.monotonic()
    self._first = self._before[place.file]
    self._text_bytes = 0

  def update(self, encoded: encoding.Encoded, state: journal.Journal) -> None:
    self._text_bytes += sum(
      int(part.sizes.sum()) for part in encoded.splits.values()
    )
    now = time.monotonic()
    if now - self._shown < (0.5 if self._terminal else 30.0):
      return
    self._shown = now
    seconds = now - self._started
    done = self._before[encoded.end.file] + encoded.raw
    total = self._before[-1]
    rate = max(done - self._first, 1) / seconds
    line = (
      f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB read, "
      f"{self._text_bytes / seconds / 1e6:.1f} MB/s of text, "
      f"{state.skipped} skipped, {_duration((total - done) / rate)} to go"
    )
    if self._terminal:
      print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
    else:
      _say(line)

  def end(self) -> None:
    if self._terminal:
      print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - self._started
    _say(
      f"{self._text_bytes / 1e6:,.1f} MB of text in {_duration(seconds)}, "
      f"{self._text_bytes / max(seconds, 1e-9) / 1e6:.1f} MB/s"
    )


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"


def _summarise(manifest: files.Manifest) -> None:
  print(
    f"tokenizer {manifest.tokenizer.kind}, vocabulary "
    f"{manifest.tokenizer.vocab_size:,}"
  )
  rows = [("split", "source", "documents", "tokens", "bytes of text")]
  for name, split in manifest.splits.items():
    counts = [*split.sources.items(), ("all", split.total)]
    rows += [
      (name, source, f"{c.documents:,}", f"{c.tokens:,}", f"{c.bytes:,}")
      for source, c in counts
      if c.documents or source == "all"
    ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for split, source, *numbers in rows:
    cells = [split.ljust(widths[0]), source.ljust(widths[1])]
    cells += [n.rjust(w) for n, w in zip(numbers, widths[2:], strict=True)]
    print("  ".join(cells).rstrip())
  origin = manifest.origin
  empty_lines = origin.get("empty_lines", 0)
  if origin["skipped"] or origin["empty_files"] or empty_lines:
    print(
      f"skipped {origin['skipped']} lines or files that cannot be read"
      f"{_listed(origin['skipped'])}, {origin['empty_files']} empty files and "
      f"{empty_lines} lines without text"
    )
  for name, split in manifest.splits.items():
    if not split.shards:
      print(f"the split {name} is empty")


def _listed(skipped: int) -> str:
  return f" (listed in {files.SKIPPED})" if skipped else ""


def _split_manifest(
  state: writer.SplitState, sources: Sequence[str]
) -> files.SplitManifest:
  counts = state.counts + [files.NO_COUNTS] * (len(sources) - len(state.counts))
  return files.SplitManifest(
    sources=dict(zip(sources, counts, strict=True)),
    shards=tuple(state.shards),
  )


def _given_tokenizer(options: argparse.Namespace) -> tokenizer.Tokenizer | None:
  if options.tokenizer is None:
    return None
  return tokenizer.load(options.tokenizer, end_of_text=options.end_of_text)


def _settings(
  options: argparse.Namespace, given: tokenizer.Tokenizer | None
) -> dict[str, Any]:
  """All that shapes the output beside the inputs, by option."""
  if given:
    chosen = {"tokenizer": f"{given.kind} {given.hash}"}
  else:
    chosen = {
      "train-tokenizer": options.train_tokenizer,
      "train-tokenizer-size": _training_mib(options),
    }
  return {
    **chosen,
    "heldout-fraction": options.heldout_fraction,
    "max-document-size": options.max_document_size,
    "shard-size": options.shard_size,
  }


def _training_mib(options: argparse.Namespace) -> int:
  return options.train_tokenizer_size or _TRAINING_MIB


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


def _tasks(
  pieces: Iterable[documents.Piece],
) -> Iterator[list[documents.Piece]]:
  """Groups small pieces, as of short text files."""
  task, held = [], 0
  for piece in pieces:
    task.append(piece)
    # The constant stands for what a piece costs beside its data.
    held += len(piece.data) + 256
    if held >= _TASK_BYTES:
      yield task
      task, held = [], 0
  if task:
    yield task


def _in_order(
  pool: futures.Executor,
  tasks: Iterable[list[documents.Piece]],
  workers: int,
) -> Iterator[encoding.Encoded]:
  """Encodes in the pool, holding no more tasks than keep it busy."""
  waiting: collections.deque[futures.Future[encoding.Encoded]] = (
    collections.deque()
  )
  for task in tasks:
    waiting.append(pool.submit(encoding.encode, task))
    if len(waiting) > 2 * workers:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM, to stop between two tasks."""
  requests: list[int] = []
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = [
    signal.signal(number, lambda got, _: requests.append(got))
    for number in numbers
  ]
  try:
    yield requests
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


@contextlib.contextmanager
def _exclusive(output: Path) -> Iterator[None]:
  """Creates the folder and locks it against a second preparation."""
  try:
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
  except OSError as error:
    raise UserError(f"Cannot write to {output}: {error.strerror}.") from error
  try:
    _lock(descriptor, output)
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(f"Another process is preparing {output}.") from error


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
  """Turns a failure to write into a sentence; what is committed stays."""
  try:
    yield
  except OSError as error:
    if error.errno not in _WRITE_ERRORS:
      raise
    raise UserError(
      f"Cannot write to {output}: {error.strerror}. What was committed before "
      "is kept: run the same command to continue once that is mended."
    ) from error


def _refuse_nesting(output: Path, arguments: Iterable[str]) -> None:
  for argument in arguments:
    _, path = documents.split_argument(argument)
    if os.path.isdir(path) and output.resolve().is_relative_to(
      Path(path).resolve()
    ):
      raise UserError(
        f"--output={output} is inside the input {path}: a rerun would read its "
        "own output."
      )


def _refuse_strangers(output: Path) -> None:
  ours = f".{files.PROGRESS}.tmp"
  for entry in output.iterdir():
    if entry.name != ours:
      raise UserError(
        f"{output} holds something else ({entry.name}) and no interrupted "
        "preparation; give a new or empty folder as --output."
      )


def _refuse_other_settings(
  output: Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
  if old != new:
    raise UserError(
      f"{output} was begun with {_typed(old, new)}, not with "
      f"{_typed(new, old)}; use the same options or another --output."
    )


def _typed(settings: dict[str, Any], others: dict[str, Any]) -> str:
  """The options that differ from others, about as a user types them."""
  return " ".join(
    f"--{name[:40]}={_shortened(value)}"
    for name, value in settings.items()
    if name not in others or value != others[name]
  )


def _shortened(value: Any) -> str:
  """A value of `_settings`, with 12 digits of a tokenizer's hash."""
  name, separator, hash = str(value)[:200].partition(" ")
  if name == tokenizer.HuggingFaceTokenizer.kind:
    name = tokenizer.HUGGING_FACE_FILE
  return f"{name} ({hash[:12]})" if separator else name


def _other_inputs(output: Path) -> UserError:
  return UserError(
    f"{output} was begun with other inputs: their names, sizes or contents "
    "have changed; use another --output."
  )


if __name__ == "__main__":
  sys.exit(exit_code(main))
