"""Token shards to batches, as a function of (seed, position).

A grain `MapDataset` has groups of consecutive global batches as its elements,
so grain reads ahead with threads and starts anywhere at no cost.

The order is computed here, not by grain's shuffle, and for many windows at
once. grain's costs 10 us of Python per window (25 M tokens/s at 256 tokens,
before anything is read). And an order that depends on grain's version would
break a run that continues after an upgrade.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from xlstm_jax.data import shards
from xlstm_jax.errors import UserError

Batch = dict[str, np.ndarray]

# The mixing pattern repeats with this period: weights are exact to 1 / 2**17.
_MIX_PERIOD = 2**16
# Tokens of a group. Handing an element from thread to thread costs as much as
# reading thousands of tokens.
_GROUP_TOKENS = 2**17


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which tokens a run reads, and in which order.

  Attributes:
    paths: Folders that prepare wrote, all with the same tokenizer.
    weights: Shares of the windows drawn from each path, in any unit; None
      draws from each in proportion to its tokens.
    context: Input positions of a window (T).
    shuffle: Whether every epoch draws the windows in a new random order;
      otherwise they come in stream order.
    seed: Seed of the shuffling.
    threads: Number of threads that read ahead; 0 reads in the caller.
    prefetch: Number of batches kept ready.
    verify: When the checksums of token blocks are checked: when a split is
      opened, at a block's first use, or, with "auto", at opening if the split
      is smaller than 4 GiB and at first use otherwise.
    accept_changes: Whether a run resumes although its datasets, their weights,
      the context, the seed or the shuffling changed since its checkpoint. Some
      tokens are then read twice and others never. Otherwise this is an error.
  """

  paths: tuple[str, ...] = ()
  weights: tuple[float, ...] | None = None
  context: int = 2048
  shuffle: bool = True
  seed: int = 0
  threads: int = 2
  prefetch: int = 16
  verify: shards.Verify = "auto"
  accept_changes: bool = False


def batches(
  cfg: DataConfig,
  *,
  batch_size: int,
  position: int,
  rows: np.ndarray | None = None,
  split: str = "train",
) -> Iterator[Batch]:
  """Rows of the global batches from number `position` on.

  The content of a row depends only on its number, so the global order is the
  same for any number of hosts. The iterator never ends; epoch follows epoch.

  Args:
    cfg: which tokens are read, and in which order.
    batch_size: rows of a global batch.
    position: number of the first batch.
    rows: numbers, from 0, of the rows to read, in the order in which they are
      yielded; None for all.
    split: the split of the datasets.

  Yields:
    {"inputs", "targets", "segments"}, int32 [B, T] each, with B the number of
    rows that are read. Segments number the documents of a window from 1; 0 is
    padding, which is no target.

  Raises:
    UserError: datasets cannot be opened or do not share a tokenizer, or (from
      the iterator) a block was altered.
  """
  if batch_size < 1:
    raise UserError(f"The batch size is {batch_size}; it must be at least 1.")
  windows = Windows(cfg, open_splits(cfg, split=split))
  if rows is None:
    rows = np.arange(batch_size)
  groups = _Groups(
    windows,
    stride=batch_size,
    rows=rows,
    batches=max(1, _GROUP_TOKENS // (len(rows) * cfg.context)),
  )
  first, skip = divmod(position, groups.batches)
  dataset = grain.MapDataset.source(groups)[first:]
  ahead = max(-(-cfg.prefetch // groups.batches), cfg.threads)
  options = grain.ReadOptions(
    num_threads=cfg.threads, prefetch_buffer_size=ahead if cfg.threads else 0
  )
  return _ungroup(iter(dataset.to_iter_dataset(options)), len(rows), skip)


def _ungroup(groups: Iterator[Batch], rows: int, skip: int) -> Iterator[Batch]:
  """The batches of the groups, without the first `skip` of them."""
  for group in groups:
    for first in range(skip * rows, len(group["inputs"]), rows):
      yield {name: a[first : first + rows] for name, a in group.items()}
    skip = 0


def open_splits(cfg: DataConfig, *, split: str) -> list[shards.Split]:
  """Opens the datasets of a config; a UserError if they do not fit together."""
  if not cfg.paths:
    raise UserError("No dataset is given: set data.paths.")
  if cfg.context < 1:
    raise UserError(f"data.context must be positive, got {cfg.context}.")
  if cfg.threads < 0 or cfg.prefetch < 0:
    raise UserError(
      f"data.threads ({cfg.threads}) and data.prefetch ({cfg.prefetch}) cannot "
      "be negative."
    )
  if cfg.weights is not None:
    _check_weights(cfg)
  splits = [
    shards.open_split(path, split, verify=cfg.verify) for path in cfg.paths
  ]
  for other in splits[1:]:
    if other.manifest.tokenizer != splits[0].manifest.tokenizer:
      raise UserError(
        f"{splits[0].directory} and {other.directory} were prepared with "
        "different tokenizers; prepare one of them again."
      )
  return splits


def _check_weights(cfg: DataConfig) -> None:
  weights = cfg.weights or ()
  if len(weights) != len(cfg.paths):
    raise UserError(
      f"data.weights has {len(weights)} numbers for {len(cfg.paths)} paths."
    )
  if not all(math.isfinite(w) and w > 0 for w in weights):
    raise UserError(
      f"data.weights must be positive numbers, got {weights}; leave out a path "
      "that is not to be read."
    )


class Windows:
  """The infinite sequence of windows that a config and its datasets define."""

  def __init__(self, cfg: DataConfig, splits: Sequence[shards.Split]):
    self._cfg = cfg
    self._splits = splits
    self._counts = [split.window_count(cfg.context) for split in splits]
    weights = cfg.weights or [split.tokens for split in splits]
    self._pattern, self._ranks, self._shares = mixing_pattern(weights)

  def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The datasets and their windows at these places of the sequence."""
    periods, phases = np.divmod(numbers, len(self._pattern))
    datasets = self._pattern[phases]
    draws = periods * self._shares[datasets] + self._ranks[phases]
    windows = np.empty_like(draws)
    for dataset, count in enumerate(self._counts):
      chosen = datasets == dataset
      windows[chosen] = self._order(dataset, count, draws[chosen])
    return datasets, windows

  def _order(self, dataset: int, count: int, draws: np.ndarray) -> np.ndarray:
    """The windows of these draws from a dataset, epoch after epoch."""
    epochs, places = np.divmod(draws, count)
    if not self._cfg.shuffle:
      return places
    for epoch in np.unique(epochs).tolist():
      chosen = epochs == epoch
      keys = _round_keys(self._cfg.seed, dataset, epoch)
      places[chosen] = permute(places[chosen], count, keys)
    return places

  def read(self, datasets: np.ndarray, windows: np.ndarray) -> Batch:
    """These windows as a batch."""
    splits = [self._splits[dataset] for dataset in datasets.tolist()]
    return shards.read_windows(splits, windows, self._cfg.context)


class _Groups:
  """Random access for grain: element n is group n of this host's batches.

  `rows` are this host's row numbers in the first global batch. Those in the
  next batch are larger by `stride`. A group has `batches` batches.
  """

  def __init__(
    self, windows: Windows, *, stride: int, rows: np.ndarray, batches: int
  ):
    self.batches = batches
    self._windows = windows
    self._stride = stride
    self._rows = rows

  def __len__(self) -> int:
    # Row numbers are int64.
    return 2**62 // (self._stride * self.batches)

  def __getitem__(self, index: int) -> Batch:
    numbers = int(index) * self.batches + np.arange(self.batches)
    rows = numbers[:, None] * self._stride + self._rows
    return self._windows.read(*self._windows.locate(rows.ravel()))


def mixing_pattern(
  weights: Sequence[float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """An evenly spread order of the datasets, repeated for ever.

  Returns (pattern, ranks, shares), all int64: the dataset at each place of one
  period, how often it came before in the period, and the number of places of
  each dataset per period.
  """
  period = _MIX_PERIOD if len(weights) > 1 else 1
  exact = np.array(weights, np.float64)
  exact *= period / exact.sum()
  shares = np.maximum(np.floor(exact), 1).astype(np.int64)
  # The largest remainders get the places that are left. A tiny dataset that was
  # raised to one place takes it from the largest dataset.
  for dataset in np.argsort(shares - exact, kind="stable"):
    if shares.sum() < period:
      shares[dataset] += 1
  shares[shares.argmax()] -= shares.sum() - period
  ranks = [np.arange(share) for share in shares]
  times = np.concatenate(
    [(rank + 0.5) / share for rank, share in zip(ranks, shares, strict=True)]
  )
  order = np.argsort(times, kind="stable")
  pattern = np.repeat(np.arange(len(shares)), shares)
  return pattern[order], np.concatenate(ranks)[order], shares


def permute(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
  """A pseudo-random permutation of range(count), at the given places only.

  This is a Feistel network over pairs (place // width, place % width), with
  width the square root of count, rounded up. The few results outside the range
  are permuted again until they are inside (Black and Rogaway, "Ciphers with
  arbitrary finite domains", 2002).
  """
  width = math.isqrt(count - 1) + 1
  height = -(-count // width)
  result = _feistel(places.astype(np.uint64), height, width, keys)
  while (outside := result >= count).any():
    result[outside] = _feistel(result[outside], height, width, keys)
  return result.astype(np.int64)


def _feistel(
  places: np.ndarray, height: int, width: int, keys: np.ndarray
) -> np.ndarray:
  rows, columns = np.divmod(places, np.uint64(width))
  for key in keys.reshape(-1, 2):
    rows = (rows + _scramble(columns, key[0])) % np.uint64(height)
    columns = (columns + _scramble(rows, key[1])) % np.uint64(width)
  return rows * np.uint64(width) + columns


def _scramble(values: np.ndarray, key: np.uint64) -> np.ndarray:
  """Hashes uint64 to below 2**32 (the finaliser of SplitMix64)."""
  x = values + key
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x >> np.uint64(32)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, dataset: int, epoch: int) -> np.ndarray:
  text = f"{seed} {dataset} {epoch}".encode()
  return np.frombuffer(hashlib.blake2b(text).digest(), "<u8").copy()
