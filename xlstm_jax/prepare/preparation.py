"""A preparation: from the inputs to the last shard."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax import files
from xlstm_jax.data import (
  documents,
  encoding,
  journal,
  json_lines,
  layout,
  shards,
  tokenizer,
  writer,
)
from xlstm_jax.data.readers.reader import Input, Place, Problem
from xlstm_jax.errors import UserError
from xlstm_jax.prepare import refusals, report, workers
from xlstm_jax.prepare.report import say

_MIB = 2**20
_COMMIT_SECONDS = 10.0
_SHOWN_PROBLEMS = 20
# Text to train a tokenizer on.
TRAINING_MIB = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a dataset is made of, and how.

  Attributes:
    inputs: the inputs as they were named, [SOURCE=]PATH each.
    tokenizer: what encodes them; a number for the size of the vocabulary of
      one that is trained on them.
    train_tokenizer_size: MiB of text to train it on.
    heldout_fraction: share of the documents held out.
    max_bad_lines: how many lines or files may be unreadable.
    max_document_size: MiB beyond which a document counts as unreadable.
    shard_size: MiB at which a new shard is begun.
    workers: processes that parse and encode.
  """

  inputs: Sequence[str]
  tokenizer: tokenizer.Tokenizer | int
  train_tokenizer_size: int = TRAINING_MIB
  heldout_fraction: float
  max_bad_lines: int
  max_document_size: int
  shard_size: int
  workers: int

  def settings(self) -> dict[str, Any]:
    """All that shapes the output beside the inputs, by option."""
    if isinstance(self.tokenizer, int):
      chosen = {
        "train-tokenizer": self.tokenizer,
        "train-tokenizer-size": self.train_tokenizer_size,
      }
    else:
      chosen = {"tokenizer": f"{self.tokenizer.kind} {self.tokenizer.hash}"}
    return {
      **chosen,
      "heldout-fraction": self.heldout_fraction,
      "max-document-size": self.max_document_size,
      "shard-size": self.shard_size,
    }


class Preparation:
  """Makes a dataset, or continues where an earlier one was interrupted.

  Args:
    options: what to make.
    inputs: the files that the options name.
    output: the folder to write, which no other preparation writes.

  Raises:
    UserError: the folder holds something else.
  """

  def __init__(
    self,
    options: Options,
    inputs: Sequence[Input],
    output: Path,
  ):
    self._options = options
    self._inputs = inputs
    self._output = output
    self._max_document_bytes = options.max_document_size * _MIB
    self._journal = self._recognise()
    self._writers: dict[str, writer.SplitWriter] = {}
    self._source_ids = {name: i for i, name in enumerate(self._journal.sources)}
    self._skipped = report.Skipped(output / layout.SKIPPED)

  def run(self) -> int:
    """Goes on to the end; returns the signal that ended it early, or 0."""
    if (self._output / layout.MANIFEST).exists():
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
        self._stopped(stopped_by)
        return stopped_by
      self._finish(tokens)
    finally:
      for split in self._writers.values():
        split.close()
    return 0

  def _recognise(self) -> journal.Journal:
    """The journal to go on with; refuses what is not of this command."""
    new = journal.Journal(
      settings=self._options.settings(),
      listing=documents.listing_hash(self._inputs, times=True),
      sizes=documents.listing_hash(self._inputs, times=False),
    )
    old = journal.load(self._output)
    if old is None:
      refusals.refuse_strangers(self._output)
      new.save(self._output)
      return new
    if old.place == Place():
      # Nothing is lost by starting over with whatever is asked for now. A
      # tokenizer that was trained on the same inputs stays.
      same = all(
        getattr(old, name) == getattr(new, name)
        for name in ("settings", "listing", "rules")
      )
      return old if same else new
    refusals.refuse_other_settings(self._output, old.settings, new.settings)
    if old.sizes != new.sizes or old.place.file >= len(self._inputs):
      raise refusals.other_inputs(self._output)
    self._refuse_other_rules(old, new)
    if old.listing != new.listing:
      self._check_contents(old.place)
      old.listing = new.listing
    return old

  def _refuse_other_rules(
    self, old: journal.Journal, new: journal.Journal
  ) -> None:
    """Refuses to go on, or to compare contents, by other rules."""
    done = (self._output / layout.MANIFEST).exists()
    if old.rules == new.rules or (done and old.listing == new.listing):
      return
    if one := documents.read_otherwise(self._inputs):
      raise UserError(
        f"{self._output} was begun by an older version, which read {one.path} "
        "in another way; use another --output."
      )
    # What is left is read by the new rules.
    old.rules = new.rules

  def _check_contents(self, place: Place) -> None:
    say("the inputs have other modification times: checking their contents")
    crc = documents.content_crc(
      self._inputs, place, max_document_bytes=self._max_document_bytes
    )
    if crc != place.crc:
      raise refusals.other_inputs(self._output)

  def _tokenizer(self) -> tokenizer.Tokenizer:
    if self._journal.tokenizer:
      tokens = tokenizer.load(self._output)
      if tokens.hash != self._journal.tokenizer:
        raise UserError(
          f"The tokenizer in {self._output} is not the one its shards were "
          "begun with; delete the folder and prepare again."
        )
      return tokens
    tokens = self._options.tokenizer
    if isinstance(tokens, int):
      tokens = self._train(tokens)
    # What an attempt with another tokenizer may have left.
    (self._output / tokenizer.HUGGING_FACE_FILE).unlink(missing_ok=True)
    tokens.save(self._output)
    self._journal.tokenizer = tokens.hash
    self._journal.save(self._output)
    return tokens

  def _train(self, wanted: int) -> tokenizer.Tokenizer:
    say(f"training a tokenizer of {wanted} entries")
    tokens = tokenizer.train(self._training_texts(), wanted)
    if tokens.vocab_size < wanted:
      say(f"the text gave a vocabulary of only {tokens.vocab_size} entries")
    return tokens

  def _training_texts(self) -> Iterator[str]:
    """Documents that are not held out, the same amount of every argument."""
    budget = self._options.train_tokenizer_size * _MIB
    share = budget // len(self._options.inputs)
    for argument in range(len(self._options.inputs)):
      chosen = [one for one in self._inputs if one.argument == argument]
      left = share
      for text in self._texts(chosen):
        if left <= 0:
          break
        for part in tokenizer.training_parts(text.decode()):
          if left > 0:
            yield part
          left -= len(part.encode())

  def _texts(self, inputs: Sequence[Input]) -> Iterator[bytes]:
    limit = self._max_document_bytes
    for unit in documents.read(
      inputs,
      Place(),
      unit_bytes=workers.TASK_BYTES,
      max_document_bytes=limit,
    ):
      for one in documents.parse(unit, max_document_bytes=limit).documents:
        if one.tokens is not None:
          raise UserError(
            f"{inputs[one.file].path} holds token ids, which train no "
            "tokenizer: give the one that made them with --tokenizer=FILE."
          )
        split = encoding.split_of(one.text, self._options.heldout_fraction)
        if split == "train":
          yield one.text

  def _encode_all(self, tokens: tokenizer.Tokenizer) -> int:
    """Encodes what is left; returns the signal that ended it early, or 0."""
    if self._journal.place != Place():
      done = sum(c.documents for c in self._journal.totals.values())
      say(f"continuing behind {done:,} documents")
    progress = report.ProgressLine(self._inputs, self._journal.place)
    committed = time.monotonic()
    with _stop_requests() as stop, self._encoded(tokens) as results:
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

  def _encoded(
    self, tokens: tokenizer.Tokenizer
  ) -> contextlib.AbstractContextManager[Iterator[encoding.Encoded]]:
    units = documents.read(
      self._inputs,
      self._journal.place,
      unit_bytes=workers.TASK_BYTES,
      max_document_bytes=self._max_document_bytes,
    )
    return workers.encoded(
      units,
      tokens,
      folder=self._output,
      heldout_fraction=self._options.heldout_fraction,
      max_document_bytes=self._max_document_bytes,
      workers=self._options.workers,
    )

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
      if len(self._source_ids) == layout.MAX_SOURCES:
        raise UserError(
          f"The inputs name more than {layout.MAX_SOURCES} sources, the last "
          f"one {name!r}; is {json_lines.SOURCE_KEY!r} a source at all?"
        )
      self._source_ids[name] = len(self._source_ids)
      self._journal.sources.append(name)
    return self._source_ids[name]

  def _record(self, problem: Problem) -> None:
    """Counts and reports a document that is skipped; refuses too many."""
    state = self._journal
    one = self._inputs[problem.file]
    if problem.harmless:
      state.empty_files += 1
      return
    state.skipped += 1
    where = f"{one.path}:{problem.line}" if problem.line else one.path
    if state.skipped <= _SHOWN_PROBLEMS:
      say(f"skipping {where}: {problem.reason}")
    elif state.skipped == _SHOWN_PROBLEMS + 1:
      say(f"further ones are not shown; {self._skipped.path} lists them all")
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
    files.sync_folder(self._output)
    self._journal.save(self._output)

  def _stopped(self, number: int) -> None:
    done = sum(c.documents for c in self._journal.totals.values())
    say(
      f"stopped by {signal.Signals(number).name}: {done:,} documents are "
      "kept; run the same command to continue"
    )

  def _finish(self, tokens: tokenizer.Tokenizer) -> None:
    self._skipped.write()
    for name, split in self._writers.items():
      self._journal.splits[name] = split.finish()
    totals = self._journal.totals
    if not any(counts.documents for counts in totals.values()):
      raise UserError(
        f"The {len(self._inputs)} input files hold no documents "
        f"({self._journal.skipped} lines or files could not be read"
        f"{report.listed(self._journal.skipped)}, "
        f"{self._journal.empty_files} files are empty, "
        f"{self._journal.empty_lines} lines hold no text)."
      )
    files.sync_folder(self._output)
    self._journal.save(self._output)
    manifest = self._manifest(tokens)
    layout.write_manifest(self._output, manifest)
    print(f"{self._output} is ready")
    report.summarise(manifest)

  def _manifest(self, tokens: tokenizer.Tokenizer) -> layout.Manifest:
    state = self._journal
    return layout.Manifest(
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
    manifest = layout.read_manifest(self._output)
    for name, split in manifest.splits.items():
      if split.shards:
        shards.open_split(self._output, name, verify="first_use")
    print(f"{self._output} is already prepared, by this command")
    report.summarise(manifest)
    return 0


def _split_manifest(
  state: writer.SplitState, sources: Sequence[str]
) -> layout.SplitManifest:
  counts = state.counts + [layout.NO_COUNTS] * (
    len(sources) - len(state.counts)
  )
  return layout.SplitManifest(
    sources=dict(zip(sources, counts, strict=True)),
    shards=tuple(state.shards),
  )


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
