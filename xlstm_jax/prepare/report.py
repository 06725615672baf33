"""What a preparation says, and its list of what it could not read."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xlstm_jax.data import encoding, journal, layout
from xlstm_jax.data.readers.reader import Input, Place, Problem


class Skipped:
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

  def add(self, name: str, problem: Problem) -> None:
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


class ProgressLine:
  """A line on stderr: often on a terminal, else every half minute."""

  def __init__(self, inputs: Sequence[Input], place: Place):
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
      say(line)

  def end(self) -> None:
    if self._terminal:
      print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - self._started
    say(
      f"{self._text_bytes / 1e6:,.1f} MB of text in {_duration(seconds)}, "
      f"{self._text_bytes / max(seconds, 1e-9) / 1e6:.1f} MB/s"
    )


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"


def summarise(manifest: layout.Manifest) -> None:
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
      f"{listed(origin['skipped'])}, {origin['empty_files']} empty files and "
      f"{empty_lines} lines without text"
    )
  for name, split in manifest.splits.items():
    if not split.shards:
      print(f"the split {name} is empty")


def listed(skipped: int) -> str:
  return f" (listed in {layout.SKIPPED})" if skipped else ""
