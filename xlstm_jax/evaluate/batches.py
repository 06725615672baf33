"""Batches for an evaluation: independent windows, or lanes of documents."""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from xlstm_jax import sharding
from xlstm_jax.data.shards import Split

Batch = dict[str, np.ndarray]


def window_numbers(
  split: Split, context: int, max_tokens: int | None
) -> np.ndarray:
  """The windows to score: all, or some at equal distances."""
  total = split.window_count(context)
  wanted = total
  if max_tokens is not None:
    wanted = min(max(max_tokens // context, 1), total)
  return np.arange(wanted) * total // wanted


def windows(
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


def lanes(
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
  length = _even(end, piece * (batch_size // rows), step(mesh))
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
  return min(multiple(-(-count // parts), step), limit)


def multiple(count: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-count // step) * step


def step(mesh: Mesh) -> int:
  """Positions by which the length of a short batch is rounded up.

  Each share of the time needs a few, and shapes should not be too many.
  """
  return 64 * mesh.shape["sequence"]
