"""Going back: decided once, committed first, and then as if told so before."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import EXPERIMENT, final_items, prepared

from xlstm_jax import config, metrics
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import HealthConfig
from xlstm_jax.errors import UserError
from xlstm_jax.train import feed, loop, rollbacks
from xlstm_jax.train import step as steps
from xlstm_jax.train.rollbacks import Rollback
from xlstm_jax.train.status import Status

# Batches that make the loss NaN, and one that makes it a hundred times as big.
NAN, SPIKE = (10, 11), 20


def rollback(first, stop):
  return Rollback(found=1, reason="r", to=0, first=first, stop=stop)


@pytest.mark.parametrize(
  ("left_out", "expected"),
  [
    ([], [0, 1, 2, 3, 4, 5]),
    ([(0, 8)], [2, 2, 2, 3, 4, 5]),
    ([(8, 12), (4, 8)], [0, 3, 3, 3, 4, 5]),
    ([(4, 12), (4, 16)], [0, 4, 4, 4, 4, 5]),
    # Another batch size than the one it was decided with.
    ([(7, 9)], [0, 3, 3, 3, 4, 5]),
  ],
)
def test_batches_that_hold_a_window_left_out_are_jumped(left_out, expected):
  decided = [rollback(*window) for window in left_out]
  found = [rollbacks.following(decided, n, batch_size=4) for n in range(6)]
  assert found == expected


def test_decisions_return_as_they_were_made(tmp_path):
  assert rollbacks.read(tmp_path) == ()
  rollbacks.add(tmp_path, rollback(0, 4))
  rollbacks.add(tmp_path, rollback(8, 12))
  assert rollbacks.read(tmp_path) == (rollback(0, 4), rollback(8, 12))


@pytest.mark.parametrize(
  "text", ["", "[{}]", "3", "[3]", '[{"first": 0}]', "[[]]", "\udcff"]
)
def test_a_damaged_file_is_an_error(tmp_path, text):
  data = text.encode("utf-8", "surrogateescape")
  (tmp_path / rollbacks.FILE).write_bytes(data)
  with pytest.raises(UserError, match=r"rollbacks\.json is damaged"):
    rollbacks.read(tmp_path)


def test_an_empty_window_is_damage(tmp_path):
  rollbacks.add(tmp_path, rollback(4, 8))
  (entry,) = json.loads((tmp_path / rollbacks.FILE).read_text())
  for bad in ({"stop": 4}, {"first": "0"}, {"first": -1}, {"stop": None}):
    (tmp_path / rollbacks.FILE).write_text(json.dumps([entry | bad]))
    with pytest.raises(UserError, match="is damaged"):
      rollbacks.read(tmp_path)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rollbacks")
  data = prepared(folder, "data", "--tokenizer=byte")
  (folder / "experiment.py").write_text(EXPERIMENT)
  cfg = config.from_experiment(
    str(folder / "experiment.py"), [f"--config.data.paths={data}"]
  )
  return dataclasses.replace(
    cfg,
    steps=24,
    save_every=4,
    eval_every=None,
    compilation_cache=None,
    checkpoint=dataclasses.replace(cfg.checkpoint, keep_every=4),
    health=HealthConfig(
      max_skipped=1, window=4, spike_deviations=20.0, max_rollbacks=2
    ),
  )


@pytest.fixture
def poisoned(monkeypatch):
  """Batches with targets -1 and -2, and a loss that they spoil."""
  batches, loss_sum = feed.pipeline.batches, steps._loss_sum

  def poison(*args, position, **kwargs):
    stream = batches(*args, position=position, **kwargs)
    for number, batch in enumerate(stream, start=position):
      if number in NAN or number == SPIKE:
        value = -1 if number in NAN else -2
        batch = batch | {"targets": np.full_like(batch["targets"], value)}
      yield batch

  def spoiled(params, *, batch, **kwargs):
    loss, tokens = loss_sum(params, batch=batch, **kwargs)
    sign = batch["targets"].min()
    factor = jnp.where(sign == -1, jnp.nan, jnp.where(sign == -2, 100, 1))
    return loss * factor, tokens

  # Nothing in `health` is part of the step: the runs compile it once.
  once = {}

  def compiled(definition, cfg, mesh):
    key = dataclasses.replace(cfg, health=HealthConfig())
    if key not in once:
      once[key] = compile_step(definition, cfg, mesh)
    return once[key]

  compile_step = steps.compiled
  monkeypatch.setattr(steps, "compiled", compiled)
  monkeypatch.setattr(feed.pipeline, "batches", poison)
  monkeypatch.setattr(steps, "_loss_sum", spoiled)


@pytest.mark.slow
def test_a_run_goes_back_as_if_it_had_been_told_before(
  cfg, poisoned, tmp_path, monkeypatch, capsys
):
  once = dataclasses.replace(
    cfg, health=dataclasses.replace(cfg.health, max_rollbacks=1)
  )
  workdir = tmp_path / "run"

  def killed(*args):
    add(*args)
    raise KeyboardInterrupt

  add = rollbacks.add
  with monkeypatch.context() as patched:
    patched.setattr(rollbacks, "add", killed)
    with pytest.raises(KeyboardInterrupt):
      loop.train(once, workdir)
  # Updates 11 and 12 were skipped, and nothing was saved since step 8.
  assert Checkpoints(workdir / "checkpoints").latest() == 8
  (first,) = rollbacks.read(workdir)
  assert (first.found, first.to, first.first, first.stop) == (12, 8, 64, 96)
  assert "update skipped, 2 in a row" in first.reason

  capsys.readouterr()
  assert loop.train(once, workdir) == Status.DIVERGED
  output = capsys.readouterr().out
  assert "start     step 8, batch 8" in output
  assert "diverged  step 17: loss " in output
  assert Checkpoints(workdir / "checkpoints").latest() == 16
  assert len(rollbacks.read(workdir)) == 1

  assert loop.train(cfg, workdir) == Status.DONE
  output = capsys.readouterr().out
  assert "rollback  from step 17 to step 16, without the windows" in output
  first, second = rollbacks.read(workdir)
  assert (second.first, second.stop) == (20 * 8, 21 * 8)
  assert "20 deviations of" in second.reason

  told = tmp_path / "told"
  told.mkdir()
  shutil.copy(workdir / rollbacks.FILE, told)
  assert loop.train(cfg, told) == Status.DONE
  records = metrics.trajectory(told)
  assert [record["step"] for record in records] == list(range(1, 25))
  assert {record["skipped"] for record in records} == {0}
  assert metrics.trajectory(workdir) == records
  jax.tree.map(
    np.testing.assert_array_equal,
    final_items(workdir, cfg),
    final_items(told, cfg),
  )

  # From a checkpoint before what is left out, should the later ones be lost.
  for step in (8, 12, 16, 20, 24):
    shutil.rmtree(told / "checkpoints" / str(step))
  assert loop.train(cfg, told) == Status.DONE
  assert metrics.trajectory(told) == records


@pytest.mark.slow
def test_a_few_bad_batches_cost_their_updates_alone(cfg, poisoned, tmp_path):
  patient = dataclasses.replace(
    cfg, steps=14, health=HealthConfig(max_skipped=2)
  )
  assert loop.train(patient, tmp_path) == Status.DONE
  records = metrics.trajectory(tmp_path)
  assert [r["skipped"] for r in records] == [0] * 10 + [1, 2, 2, 2]
  assert [r["loss"] is None for r in records] == (
    [False] * 10 + [True] * 2 + [False] * 2
  )
  norms = [r["param_norm"] for r in records]
  # Norms are of the parameters before the update.
  assert norms[10] == norms[11] == norms[12] != norms[13]
  final = final_items(tmp_path, patient)["optimizer"]
  assert int(final["count"]) == 12
