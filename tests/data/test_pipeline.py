"""Batches are a function of (seed, position), whatever reads them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import MakeDataset

from xlstm_jax.data import pipeline, shards
from xlstm_jax.data.pipeline import DataConfig, batches
from xlstm_jax.data.tokenizer import train
from xlstm_jax.errors import UserError

CONTEXT = 8
NAMES = ("inputs", "targets", "segments")


def documents(seed: int, count: int) -> list[tuple[bytes, int]]:
  rng = np.random.default_rng(seed)
  sizes = rng.integers(0, 40, count)
  return [(rng.integers(0, 256, n, np.uint8).tobytes(), 0) for n in sizes]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
  """Batches of different groups in every test, at little cost."""
  monkeypatch.setattr(pipeline, "_GROUP_TOKENS", 200)


@pytest.fixture
def paths(make_dataset: MakeDataset) -> tuple[str, ...]:
  return tuple(
    str(make_dataset(documents(seed, count), name=f"d{seed}"))
    for seed, count in enumerate((30, 11, 4))
  )


def take(cfg: DataConfig, count: int, **options) -> list[dict[str, np.ndarray]]:
  options = {"batch_size": 6, "position": 0, **options}
  return list(itertools.islice(batches(cfg, **options), count))


def assert_equal(left: list, right: list) -> None:
  assert len(left) == len(right) > 0
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys() == set(NAMES)
    for name in NAMES:
      assert a[name].dtype == b[name].dtype == np.int32
      np.testing.assert_array_equal(a[name], b[name])


def config(paths: tuple[str, ...], **options) -> DataConfig:
  return DataConfig(**{"paths": paths, "context": CONTEXT, **options})


def test_an_epoch_has_every_window_once_in_a_new_order(paths: tuple[str, ...]):
  split = shards.open_split(paths[0], "train")
  count = split.window_count(CONTEXT)
  rows = take(config(paths[:1]), 2 * count, batch_size=1)
  plain = split.windows(np.arange(count), CONTEXT)
  expected = sorted(
    tuple(row) for row in np.stack(list(plain.values()), 1).reshape(count, -1)
  )
  orders = []
  for epoch in (rows[:count], rows[count:]):
    flat = [tuple(np.ravel([row[name] for name in NAMES])) for row in epoch]
    assert sorted(flat) == expected
    orders.append(flat)
  assert orders[0] != orders[1] != expected


def test_without_shuffling_the_stream_comes_in_order(paths: tuple[str, ...]):
  split = shards.open_split(paths[0], "train")
  count = split.window_count(CONTEXT)
  rows = take(config(paths[:1], shuffle=False), count + 2, batch_size=1)
  plain = split.windows(np.arange(count + 2) % count, CONTEXT)
  for name in NAMES:
    np.testing.assert_array_equal(
      np.concatenate([row[name] for row in rows]), plain[name]
    )


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("position", [1, 17, 400, 123_456_789])
def test_batch_n_needs_no_batch_before(
  paths: tuple[str, ...], weights: tuple[float, ...] | None, position: int
):
  cfg = config(paths, weights=weights)
  before = take(cfg, 9, position=position)
  assert_equal(take(cfg, 6, position=position + 3), before[3:])


@pytest.mark.parametrize(
  "hosts",
  [
    [[0, 1, 2, 3, 4, 5]],
    [[0, 1, 2], [3, 4, 5]],
    [[0, 1], [2, 3], [4, 5]],
    # Of a torus; the last two read the same row.
    [[0, 5], [1, 2, 4], [3], [3]],
  ],
)
def test_the_global_order_is_the_same_on_any_number_of_hosts(
  paths: tuple[str, ...], hosts: list[list[int]]
):
  cfg = config(paths)
  whole = take(cfg, 5, position=7)
  for rows in hosts:
    assert_equal(
      take(cfg, 5, position=7, rows=np.array(rows)),
      [{name: batch[name][rows] for name in NAMES} for batch in whole],
    )


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (4, 2)])
def test_threads_change_nothing(
  paths: tuple[str, ...], threads: int, prefetch: int
):
  cfg = config(paths, threads=threads, prefetch=prefetch)
  assert_equal(take(cfg, 40), take(config(paths), 40))


@pytest.mark.parametrize("tokens", [1, 1000, 2**15])
def test_groups_change_nothing(
  paths: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tokens: int
):
  expected = take(config(paths), 30, position=3)
  monkeypatch.setattr(pipeline, "_GROUP_TOKENS", tokens)
  assert_equal(take(config(paths), 30, position=3), expected)


def test_the_seed_changes_the_order(paths: tuple[str, ...]):
  first, second = (take(config(paths, seed=seed), 1)[0] for seed in (0, 1))
  assert (first["inputs"] != second["inputs"]).any()


def test_the_order_is_pinned():
  # A change here breaks every run that is resumed across it.
  keys = pipeline._round_keys(0, 0, 0)
  assert pipeline.permute(np.arange(10), 1000, keys).tolist() == [
    749, 369, 89, 29, 353, 899, 54, 191, 960, 169,
  ]  # fmt: skip
  pattern, ranks, shares = pipeline.mixing_pattern([1, 3])
  assert pattern[:8].tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
  assert ranks[:8].tolist() == [0, 0, 1, 2, 3, 1, 4, 5]
  assert shares.tolist() == [16384, 49152]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**32), st.integers(0, 9))
def test_permute_is_a_permutation(count: int, seed: int, epoch: int):
  keys = pipeline._round_keys(seed, 0, epoch)
  result = pipeline.permute(np.arange(count), count, keys)
  np.testing.assert_array_equal(np.sort(result), np.arange(count))


@pytest.mark.parametrize("count", [1, 2**31, 2**40 + 1, 10**15])
def test_permute_reaches_large_datasets(count: int):
  places = np.unique(np.linspace(0, count - 1, 1000).astype(np.int64))
  result = pipeline.permute(places, count, pipeline._round_keys(0, 0, 0))
  assert len(np.unique(result)) == len(places)
  assert (result >= 0).all()
  assert (result < count).all()


def test_permute_spreads_evenly():
  # Means of where the first tenth lands: uniform within 5 standard errors.
  count = 100_000
  places = np.arange(count // 10)
  means = [
    pipeline.permute(places, count, pipeline._round_keys(seed, 0, 0)).mean()
    for seed in range(20)
  ]
  error = count / np.sqrt(12 * len(places) * len(means))
  assert abs(np.mean(means) - (count - 1) / 2) < 5 * error


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_mixing_keeps_the_weights_and_spreads_them(weights: list[float]):
  pattern, ranks, shares = pipeline.mixing_pattern(weights)
  exact = np.array(weights) / sum(weights)
  for dataset, share in enumerate(shares):
    mine = np.flatnonzero(pattern == dataset)
    assert ranks[mine].tolist() == list(range(share))
    # Any prefix has its share of every dataset, give or take a few places.
    seen = np.arange(1, share + 1)
    places = (mine + 1) * share / len(pattern)
    assert np.abs(seen - places).max() <= len(weights)
  if len(weights) > 1:
    assert np.abs(shares / len(pattern) - exact).max() <= len(weights) / 2**16


def test_weights_set_the_shares_drawn(paths: tuple[str, ...]):
  windows = pipeline.Windows(
    config(paths, weights=(1.0, 2.0, 5.0)),
    [shards.open_split(path, "train") for path in paths],
  )
  datasets, _ = windows.locate(np.arange(80_000))
  shares = np.bincount(datasets) / len(datasets)
  np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=1e-3)


def test_the_least_weight_still_draws():
  _, _, shares = pipeline.mixing_pattern([1e-9, 1.0])
  assert shares.tolist() == [1, 2**16 - 1]


def test_each_dataset_of_a_mix_goes_through_its_own_epochs(
  paths: tuple[str, ...],
):
  splits = [shards.open_split(path, "train") for path in paths]
  windows = pipeline.Windows(config(paths, weights=(1.0, 1.0, 1.0)), splits)
  datasets, numbers = windows.locate(np.arange(3000))
  for dataset, split in enumerate(splits):
    count = split.window_count(CONTEXT)
    drawn = numbers[datasets == dataset]
    for start in range(0, len(drawn) - count, count):
      epoch = drawn[start : start + count]
      np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_datasets_must_share_the_tokenizer(
  paths: tuple[str, ...], make_dataset: MakeDataset
):
  other = make_dataset([(b"abc", 0)], name="bpe", tokenizer=train(["abc"], 257))
  with pytest.raises(UserError, match=r"d0 and .*bpe.*different tokenizers"):
    batches(config((paths[0], str(other))), batch_size=1, position=0)


@pytest.mark.parametrize(
  "weights", [(1.0,), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, np.nan, 1.0)]
)
def test_wrong_weights_are_refused(
  paths: tuple[str, ...], weights: tuple[float, ...]
):
  with pytest.raises(UserError, match=r"data\.weights"):
    batches(config(paths, weights=weights), batch_size=1, position=0)


def test_numbers_that_make_no_sense_are_refused(paths: tuple[str, ...]):
  with pytest.raises(UserError, match="No dataset"):
    batches(DataConfig(), batch_size=1, position=0)
  with pytest.raises(UserError, match="batch size is 0; it must be at least 1"):
    batches(config(paths), batch_size=0, position=0)
  with pytest.raises(UserError, match=r"data\.context"):
    batches(config(paths, context=0), batch_size=1, position=0)
  with pytest.raises(UserError, match=r"data\.threads \(-1\)"):
    batches(config(paths, threads=-1), batch_size=1, position=0)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_altered_block_ends_the_iteration_with_its_name(
  paths: tuple[str, ...], threads: int
):
  path = Path(paths[0]) / "train-00001.tokens"
  data = bytearray(path.read_bytes())
  data[20] ^= 1
  path.write_bytes(data)
  cfg = config(paths[:1], threads=threads, verify="first_use")
  with pytest.raises(UserError, match=r"train-00001\.tokens was altered"):
    take(cfg, 100)
