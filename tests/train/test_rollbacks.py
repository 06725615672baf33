"""Going back: decided once, committed first, and then as if told so before."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from small_run import (
  EXPERIMENT,
  PATIENCE,
  environment,
  final_items,
  free_port,
  patched,
  prepared,
)

from xlstm_jax import config, metrics
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import HealthConfig
from xlstm_jax.errors import UserError
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import feed, loop, rollbacks
from xlstm_jax.train import step as steps
from xlstm_jax.train.health import Finding
from xlstm_jax.train.rollbacks import Rollback

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
  rollbacks.commit(tmp_path, [rollback(0, 4)])
  rollbacks.commit(tmp_path, [rollback(0, 4), rollback(8, 12)])
  assert rollbacks.read(tmp_path) == (rollback(0, 4), rollback(8, 12))


@pytest.mark.parametrize(
  "text",
  [
    *("", "[{}]", "3", "[3]", '[{"first": 0}]', "[[]]", "\udcff"),
    "[" * 10**5,
  ],
  ids=range(8),
)
def test_a_damaged_file_is_an_error(tmp_path, text):
  data = text.encode("utf-8", "surrogateescape")
  (tmp_path / rollbacks.FILE).write_bytes(data)
  with pytest.raises(UserError, match=r"rollbacks\.json is damaged"):
    rollbacks.read(tmp_path)


def test_an_empty_window_is_damage(tmp_path):
  rollbacks.commit(tmp_path, [rollback(4, 8)])
  (entry,) = json.loads((tmp_path / rollbacks.FILE).read_text())
  for bad in (
    *({"stop": 4}, {"first": "0"}, {"first": -1}, {"stop": None}),
    *({"first": 0.5}, {"stop": math.inf}, {"stop": 2**63}, {"to": True}),
    *({"found": 1.0}, {"reason": 3}),
  ):
    (tmp_path / rollbacks.FILE).write_text(json.dumps([entry | bad]))
    with pytest.raises(UserError, match="is damaged"):
      rollbacks.read(tmp_path)


@given(
  mutations.of(
    b'[{"found": 9, "reason": "r", "to": 8, "first": 64, "stop": 96}, '
    b'{"found": 17, "reason": "s", "to": 16, "first": 160, "stop": 168}]'
  )
)
def test_any_bytes_are_decisions_or_refused(tmp_path_factory, data):
  workdir = tmp_path_factory.getbasetemp()
  (workdir / rollbacks.FILE).write_bytes(data)
  decided = ()
  with contextlib.suppress(UserError):
    decided = rollbacks.read(workdir)
  assert rollbacks.following(decided, 3, batch_size=8) >= 3


class Meeting:
  """Checkpoints of step 8, and the name of every meeting."""

  def __init__(self, monkeypatch, cfg, workdir):
    self.names = []
    self.index = 0
    self.run = types.SimpleNamespace(
      cfg=cfg, workdir=epath.Path(workdir), checkpoints=self
    )
    monkeypatch.setattr(
      rollbacks.peers, "meet", lambda name, *, seconds: self.names.append(name)
    )
    monkeypatch.setattr(
      rollbacks.resume, "progress", lambda run, step: {"windows": 8 * step}
    )
    monkeypatch.setattr("jax.process_index", lambda: self.index)

  def failure(self, *, wait):
    return None

  def set_damaged_aside(self):
    return []

  def latest(self):
    return 8


def test_processes_decide_the_same_however_late_one_is(
  cfg, tmp_path, monkeypatch, capsys
):
  meeting = Meeting(monkeypatch, cfg, tmp_path)
  decided = {0: [], 1: []}
  for number, found in enumerate((11, 13), 1):
    finding = Finding("loss nan", found, serious=True)
    # The first one has committed before the other one comes to its decision.
    for meeting.index in (0, 1):
      mine = decided[meeting.index]
      assert rollbacks.go_back(meeting.run, mine, finding, found) is None
    assert decided[0] == decided[1]
    assert meeting.names[-2:] == [f"rollback {number}"] * 2
    meeting.index = 0
    assert rollbacks.read(tmp_path) == tuple(decided[0])
  for meeting.index in (0, 1):
    assert (
      rollbacks.go_back(meeting.run, decided[meeting.index], finding, 15)
      == Status.DIVERGED
    )


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
    commit(*args)
    raise KeyboardInterrupt

  commit = rollbacks.commit
  with monkeypatch.context() as patched:
    patched.setattr(rollbacks, "commit", killed)
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
  assert output.splitlines()[-1].startswith("goodput ")
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


@pytest.mark.slow
def test_a_run_does_not_go_back_to_a_step_damaged_meanwhile(
  cfg, poisoned, tmp_path, monkeypatch, capsys
):
  patient = dataclasses.replace(
    cfg, steps=14, health=HealthConfig(max_skipped=1, max_rollbacks=1)
  )
  go_back = rollbacks.go_back

  def damaged(run, *args):
    run.checkpoints.failure(wait=True)
    step = pathlib.Path(run.checkpoints.directory / "8" / "optimizer")
    path = max(step.rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    return go_back(run, *args)

  monkeypatch.setattr(rollbacks, "go_back", damaged)
  assert loop.train(patient, tmp_path) == Status.DONE
  output = capsys.readouterr().out
  assert "damaged   The checkpoint of step 8 in" in output
  assert "rollback  from step 12 to step 4, without the windows" in output
  (decision,) = rollbacks.read(tmp_path)
  assert (decision.to, decision.first, decision.stop) == (4, 32, 96)
  assert (tmp_path / "checkpoints" / "damaged-8").exists()


# Batch 5 makes the loss NaN. The second process comes to its decision when the
# first one has long committed its own.
LATE = """
import time
import jax, jax.numpy as jnp, numpy as np
from xlstm_jax.data import pipeline
from xlstm_jax.train import loop, resume, rollbacks
from xlstm_jax.train import step as steps

batches, loss_sum = pipeline.batches, steps._loss_sum
progress = resume.progress

def poison(*args, position, **kwargs):
  stream = batches(*args, position=position, **kwargs)
  for number, batch in enumerate(stream, start=position):
    if number == 5:
      batch = batch | {"targets": np.full_like(batch["targets"], -1)}
    yield batch

def spoiled(params, *, batch, **kwargs):
  loss, tokens = loss_sum(params, batch=batch, **kwargs)
  return loss * jnp.where(batch["targets"].min() == -1, jnp.nan, 1), tokens

# The last thing that both have to do together before they decide.
def late(checkpoints, step):
  found = progress(checkpoints, step)
  file = checkpoints.directory.parent / rollbacks.FILE
  while jax.process_index() == 1 and not file.exists():
    time.sleep(0.05)
  return found

pipeline.batches, steps._loss_sum, resume.progress = poison, spoiled, late
"""


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
  data = prepared(tmp_path, "data", "--tokenizer=byte")
  (tmp_path / "experiment.py").write_text(EXPERIMENT)
  port = free_port()
  hosts = [
    subprocess.Popen(
      patched(
        LATE,
        [f"--config={tmp_path / 'experiment.py'}"],
        tmp_path / "run",
        f"--config.data.paths={data}",
        "--config.compilation_cache=none",
        "--config.eval_every=none",
        "--config.steps=8",
        "--config.save_every=3",
        "--config.health.max_skipped=0",
        "--config.health.max_rollbacks=1",
        "--config.limits.meet_seconds=600",
        f"--coordinator=localhost:{port}",
        "--processes=2",
        f"--process={index}",
      ),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment(),
    )
    for index in range(2)
  ]
  outputs = [host.communicate(timeout=PATIENCE)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], outputs
  assert "rollback  from step 6 to step 3, without the windows" in outputs[0]
  (decision,) = rollbacks.read(tmp_path / "run")
  assert (decision.to, decision.first, decision.stop) == (3, 24, 48)
  records = metrics.trajectory(tmp_path / "run")
  assert [record["step"] for record in records] == list(range(1, 9))
