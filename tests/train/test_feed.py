"""Batches in order, without what is left out; waits that are given up."""

import dataclasses
import threading
import types

import numpy as np
import pytest

from xlstm_jax import sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import feed
from xlstm_jax.train.feed import Feed
from xlstm_jax.train.rollbacks import Rollback

CFG = RunConfig(data=DataConfig(context=4), batch_size=8)


@pytest.fixture
def run():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
  return types.SimpleNamespace(cfg=CFG, mesh=mesh)


def numbered(cfg, *, batch_size, position, **_):
  """Batches whose entries tell their number, row and place."""
  B, T = batch_size, cfg.context
  while True:
    yield {"inputs": 100 * position + np.arange(B * T).reshape(B, T)}
    position += 1


def read(feeding, count):
  found = []
  for _ in range(count):
    item = feeding.next(unless=lambda: False)
    assert item is not None
    number, batch = item
    expected = next(
      numbered(CFG.data, batch_size=CFG.batch_size, position=number)
    )
    np.testing.assert_array_equal(batch["inputs"], expected["inputs"])
    found.append(number)
  feeding.close()
  return found


def test_what_is_left_out_is_jumped_at_the_start_and_on_the_way(
  run, monkeypatch
):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  left_out = [
    Rollback(found=1, reason="r", to=0, first=8 * first, stop=8 * stop)
    for first, stop in ((3, 5), (7, 8), (8, 10))
  ]
  assert read(Feed(run, 0, ()), 4) == [0, 1, 2, 3]
  assert read(Feed(run, 1, left_out), 6) == [1, 2, 5, 6, 10, 11]
  assert read(Feed(run, 4, left_out), 2) == [5, 6]


def test_a_wait_is_given_up_when_told(run, monkeypatch):
  never = threading.Event()

  def stuck(*_, **__):
    never.wait()
    yield from ()

  monkeypatch.setattr(feed.pipeline, "batches", stuck)
  feeding = Feed(run, 0, ())
  answers = iter([False, True])
  assert feeding.next(unless=lambda: next(answers)) is None
  feeding.close()
  never.set()


def test_data_that_are_there_are_given_in_any_case(run, monkeypatch):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  assert read(Feed(run, 2, ()), 1) == [2]


@pytest.mark.parametrize("error", [UserError("Altered."), MemoryError()])
def test_errors_of_the_reader_are_raised_where_it_is_read(
  run, monkeypatch, error
):
  def broken(*_, **__):
    raise error
    yield

  monkeypatch.setattr(feed.pipeline, "batches", broken)
  feeding = Feed(run, 0, ())
  with pytest.raises(type(error)):
    feeding.next(unless=lambda: False)
  feeding.close()


def test_a_feed_that_nobody_reads_ends(run, monkeypatch):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  feeding = Feed(run, 0, ())
  feeding.close()
  feeding._thread.join(300)
  assert not feeding._thread.is_alive()


def test_the_batch_size_counts_the_windows(run, monkeypatch):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  run.cfg = dataclasses.replace(CFG, batch_size=4)
  left_out = [Rollback(found=1, reason="r", to=0, first=8, stop=18)]
  feeding = Feed(run, 0, left_out)
  numbers = []
  for _ in range(4):
    item = feeding.next(unless=lambda: False)
    assert item is not None
    numbers.append(item[0])
  feeding.close()
  assert numbers == [0, 1, 5, 6]
