"""A run that is stopped in an evaluation or while it waits for data."""

import dataclasses
import itertools
import threading

import jax
import numpy as np
import pytest
from small_run import EXPERIMENT, GRACE, final_items, prepared

from xlstm_jax import config, metrics
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.runtime.interrupt import Interrupt
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import feed, loop


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stops")
  data = prepared(folder, "data", "--tokenizer=byte")
  (folder / "experiment.py").write_text(EXPERIMENT)
  cfg = config.from_experiment(
    str(folder / "experiment.py"),
    [f"--config.data.paths={data}", f"--config.{GRACE}"],
  )
  return dataclasses.replace(
    cfg,
    steps=6,
    save_every=6,
    eval_every=3,
    compilation_cache=None,
    optim=dataclasses.replace(cfg.optim, warmup_steps=1),
  )


class StopsAt(Interrupt):
  """A signal that comes right before a border."""

  def __init__(self, border):
    super().__init__()
    self._stop_at = border


def saved(workdir):
  return Checkpoints(workdir / "checkpoints").latest()


@pytest.mark.slow
def test_an_evaluation_that_was_given_up_is_made_up_for(cfg, tmp_path, capsys):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert loop.train(cfg, whole) == Status.DONE
  expected = metrics.trajectory(whole)
  assert len(expected) == 6 + 2

  # Behind three steps comes the border before the evaluation's first batch.
  assert loop.train(cfg, cut, StopsAt(3)) == Status.PREEMPTED
  assert "stopped   step 3, saved" in capsys.readouterr().out
  assert metrics.trajectory(cut) == expected[:3]
  # Before the first batch of the one that it owes.
  assert loop.train(cfg, cut, StopsAt(0)) == Status.PREEMPTED
  assert "stopped   before the first step" in capsys.readouterr().out
  assert saved(cut) == 3
  assert loop.train(cfg, cut) == Status.DONE
  assert metrics.trajectory(cut) == expected
  jax.tree.map(
    np.testing.assert_array_equal,
    final_items(cut, cfg),
    final_items(whole, cfg),
  )


@pytest.mark.slow
def test_the_last_evaluation_is_made_up_for_too(cfg, tmp_path, capsys):
  short = dataclasses.replace(cfg, steps=3, save_every=3)
  assert loop.train(short, tmp_path, StopsAt(3)) == Status.PREEMPTED
  assert saved(tmp_path) == 3
  assert len(metrics.trajectory(tmp_path)) == 3
  assert loop.train(short, tmp_path) == Status.DONE
  assert "eval_loss" in metrics.trajectory(tmp_path)[-1]
  capsys.readouterr()
  assert loop.train(short, tmp_path) == Status.DONE
  assert "is finished" in capsys.readouterr().out
  assert len(metrics.trajectory(tmp_path)) == 4


@pytest.mark.slow
def test_a_wait_for_data_is_given_up(cfg, tmp_path, monkeypatch):
  never, stopped = threading.Event(), Interrupt()
  batches, wait = feed.pipeline.batches, feed.Feed.next
  waits = itertools.count(1)

  def dry(*args, **kwargs):
    yield from itertools.islice(batches(*args, **kwargs), 2)
    never.wait()

  def signalled_while_dry(self, *, unless):
    if next(waits) == 3:
      stopped.note("SIGTERM")
    return wait(self, unless=unless)

  monkeypatch.setattr(feed.pipeline, "batches", dry)
  monkeypatch.setattr(feed.Feed, "next", signalled_while_dry)
  assert loop.train(cfg, tmp_path, stopped) == Status.PREEMPTED
  stopped.close()
  never.set()
  steps = [record["step"] for record in metrics.trajectory(tmp_path)]
  assert steps == [1, 2]
  assert saved(tmp_path) == 2
