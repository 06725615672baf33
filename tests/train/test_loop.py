"""Whole runs on prepared text: resumed, refused, initialised, interrupted."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
from etils import epath
from small_run import (
  EXPERIMENT,
  GRACE,
  PATIENCE,
  SIGNALS_ITSELF,
  command,
  environment,
  final_items,
  patched,
  prepared,
  run,
  run_until,
)

from xlstm_jax import config, metrics, sharding
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import LimitsConfig
from xlstm_jax.errors import UserError
from xlstm_jax.runtime import accounting, lock
from xlstm_jax.runtime.interrupt import Interrupt
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import loop, resume


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def data(folder):
  return prepared(folder, "data", "--tokenizer=byte")


@pytest.fixture(scope="module")
def arguments(folder, data):
  """Of the command line, without the workdir."""
  path = folder / "experiment.py"
  path.write_text(EXPERIMENT)
  return [
    f"--config={path}",
    f"--config.data.paths={data}",
    f"--config.compilation_cache={folder / 'cache'}",
  ]


@pytest.fixture(scope="module")
def cfg(arguments):
  """The same run, in this process, which no grace may end."""
  path = arguments[0].removeprefix("--config=")
  cfg = config.from_experiment(path, [*arguments[1:], f"--config.{GRACE}"])
  return dataclasses.replace(cfg, compilation_cache=None)


@pytest.fixture(scope="module")
def whole(folder, arguments):
  """The workdir of a run that nothing interrupted."""
  done = run(arguments, folder / "whole")
  assert done.returncode == 0, done.stderr
  assert "finished  step 60" in done.stdout
  last = done.stdout.splitlines()[-1]
  assert re.fullmatch(r"goodput   [\d.]+% of .* in steps; start .*", last)
  return folder / "whole"


def test_a_run_that_is_killed_and_continued_is_the_same_bit_by_bit(
  folder, arguments, cfg, whole
):
  workdir = folder / "killed"
  # When step 16 begins to be saved, step 8 is.
  code, _ = run_until(arguments, workdir, 17, signal.SIGKILL)
  assert code == -signal.SIGKILL
  saved = Checkpoints(workdir / "checkpoints").latest()
  assert saved is not None
  assert saved % 8 == 0
  # A limit on the size of files stands for a full disk.
  once = "--config.checkpoint.retries=0"
  full = run(arguments, workdir, once, limit_kib=16)
  assert full.returncode == 2
  assert full.stderr.startswith("error: A checkpoint could not be written")
  assert f"step {saved} is intact" in full.stderr
  assert full.stderr.count("\n") == 1
  code, output = run_until(arguments, workdir, 27, signal.SIGTERM)
  assert code == Status.PREEMPTED
  assert f"start     step {saved}, batch {saved} of the data" in output
  stopped = Checkpoints(workdir / "checkpoints").latest()
  assert f"stopped   step {stopped}, saved" in output
  assert output.splitlines()[-1].startswith("goodput ")
  assert stopped is not None
  assert 27 <= stopped < 60
  done = run(arguments, workdir)
  assert done.returncode == 0, done.stderr
  assert f"start     step {stopped}, batch {stopped} of" in done.stdout

  assert len(metrics.trajectory(whole)) == 60 + 4
  assert metrics.trajectory(workdir) == metrics.trajectory(whole)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_items(workdir, cfg),
    final_items(whole, cfg),
  )


def test_training_lowers_the_loss(whole):
  records = [r for r in metrics.read(whole) if "loss" in r]
  assert records[0]["loss"] == pytest.approx(np.log(257), rel=0.05)
  assert records[-1]["loss"] < 0.75 * records[0]["loss"]
  held_out = [r["eval_loss"] for r in metrics.read(whole) if "eval_loss" in r]
  assert held_out == sorted(held_out, reverse=True)
  assert held_out[-1] == pytest.approx(records[-1]["loss"], rel=0.1)


def test_the_workdir_holds_what_is_needed_without_the_data(whole, cfg):
  names = {path.name for path in whole.iterdir()}
  assert names == {
    *("checkpoints", "config.json", "metrics.jsonl", "tensorboard"),
    *("goodput.json", "lock", "tokenizer_spec.json"),
  }
  same = dataclasses.replace(
    config.load(whole),
    compilation_cache=cfg.compilation_cache,
    limits=cfg.limits,
  )
  assert same == cfg
  assert Checkpoints(whole / "checkpoints").best() == 60


def test_a_finished_run_says_so(whole, cfg, capsys):
  assert loop.train(cfg, whole) == 0
  assert "is finished: 60 of 60 steps" in capsys.readouterr().out


def test_a_finished_run_says_so_without_its_data(whole, tmp_path, capsys):
  shutil.copytree(whole, tmp_path / "run")
  cfg = config.load(whole)
  gone = dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, paths=(str(tmp_path / "gone"),))
  )
  config.save(tmp_path / "run", gone)
  assert loop.train(gone, tmp_path / "run") == 0
  assert "is finished: 60 of 60 steps" in capsys.readouterr().out
  # What is left to do needs them.
  with pytest.raises(UserError, match="gone holds no prepared dataset"):
    loop.train(dataclasses.replace(gone, steps=61), tmp_path / "run")


def test_changes_are_listed_and_applied(whole, cfg, capsys):
  optim = dataclasses.replace(cfg.optim, peak_lr=0.5)
  loop.train(dataclasses.replace(cfg, optim=optim), whole)
  output = capsys.readouterr().out
  assert "changed   optim.peak_lr: 0.001 -> 0.5" in output


def test_a_workdir_of_another_model_is_refused(whole, cfg):
  model = dataclasses.replace(cfg.model, width=32)
  with pytest.raises(UserError, match=r"another model \(model.width: 16 -> 32"):
    loop.train(dataclasses.replace(cfg, model=model), whole)


def test_data_of_another_tokenizer_is_refused(folder, whole, cfg, tmp_path):
  other = prepared(folder, "other", "--train-tokenizer=257")
  changed = dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, paths=(other,))
  )
  with pytest.raises(UserError, match="trained with another tokenizer"):
    loop.train(changed, whole)
  changed = dataclasses.replace(changed, init_from=str(whole))
  with pytest.raises(UserError, match="trained with another tokenizer"):
    loop.train(changed, tmp_path / "run")


def test_imported_parameters_are_no_run(whole, cfg, tmp_path):
  params = final_items(whole, cfg)["params"]
  checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
  checkpoints.save(0, {"params": params})
  checkpoints.close()
  config.save(tmp_path, cfg)
  with pytest.raises(UserError, match=r"--config\.init_from="):
    loop.train(cfg, tmp_path)


def test_wrong_places_are_named(cfg, tmp_path):
  nothing = dataclasses.replace(cfg.data, paths=())
  with pytest.raises(UserError, match=r"config\.data\.paths is empty"):
    loop.train(dataclasses.replace(cfg, data=nothing), tmp_path / "run")
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    loop.train(cfg, tmp_path / "file")
  nowhere = dataclasses.replace(cfg, init_from=str(tmp_path / "none"))
  with pytest.raises(UserError, match="no workdir with checkpoints"):
    loop.train(nowhere, tmp_path / "run")


def test_given_parameters_start_a_fresh_run(folder, arguments, cfg, whole):
  workdir = folder / "initialised"
  more = [f"--config.init_from={whole}", "--config.profile=2,3"]
  done = run(arguments, workdir, *more)
  assert done.returncode == 0, done.stderr
  assert f"start     parameters of {whole}, step 60" in done.stdout
  first = metrics.read(workdir)[0]
  params = jax.tree.leaves(final_items(whole, cfg)["params"])
  norm = np.sqrt(sum(np.square(np.float64(p)).sum() for p in params))
  assert first["step"] == 1
  assert first["param_norm"] == pytest.approx(norm, rel=1e-5)
  assert first["learning_rate"] == pytest.approx(cfg.optim.peak_lr / 5)
  assert first["loss"] < 0.8 * metrics.read(whole)[0]["loss"]
  assert list((workdir / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh_and_batch_size(whole, cfg, tmp_path):
  one = dataclasses.replace(
    cfg,
    mesh=sharding.MeshConfig(data=2, fsdp=2, tensor=2),
    steps=70,
    batch_size=16,
    accumulation=4,
  )
  shutil.copytree(whole, tmp_path / "run")
  assert loop.train(one, tmp_path / "run") == 0
  records = [r for r in metrics.read(tmp_path / "run") if "loss" in r]
  assert [r["step"] for r in records] == list(range(1, 71))
  assert records[60]["loss"] < 1.1 * records[59]["loss"]
  saved = Checkpoints(tmp_path / "run" / "checkpoints")
  progress = saved.restore(70, {"progress": None})["progress"]
  assert progress["windows"] == 60 * 8 + 10 * 16


@pytest.mark.parametrize(
  ("batch_size", "position"), [(8, 5), (4, 10), (16, 3), (40, 1), (64, 1)]
)
def test_another_batch_size_goes_on_behind_what_was_read(batch_size, position):
  assert resume.next_batch(windows=5 * 8, batch_size=batch_size) == position


def test_a_signal_before_the_first_step_ends_the_run(cfg, tmp_path, capsys):
  stopped = Interrupt()
  stopped.note("SIGTERM")
  assert loop.train(cfg, tmp_path, stopped) == Status.PREEMPTED
  stopped.close()
  *_, before, last = capsys.readouterr().out.splitlines()
  assert before.startswith("stopped   before the first step")
  assert last.startswith("goodput ")
  assert Checkpoints(tmp_path / "checkpoints").latest() is None


# As where a disk or a server does not answer: a thread of grain's waits.
DATA_THAT_NEVER_COMES = """
import threading
from xlstm_jax.data import pipeline

pipeline._GROUP_TOKENS = 1
read, waiting = pipeline._Groups.__getitem__, threading.Event()
def stuck(self, index):
  if index >= 6:
    waiting.set()
    threading.Event().wait()
  return read(self, index)
pipeline._Groups.__getitem__ = stuck
"""


def test_a_run_ends_though_data_never_come(arguments, tmp_path):
  code = DATA_THAT_NEVER_COMES + SIGNALS_ITSELF.format(
    step=3, before="assert waiting.wait(600)", number=int(signal.SIGTERM)
  )
  done = subprocess.run(
    patched(code, arguments, tmp_path / "run", f"--config.{GRACE}"),
    capture_output=True,
    text=True,
    env=environment(),
    timeout=PATIENCE,
    check=False,
  )
  assert done.returncode == Status.PREEMPTED, done.stderr
  assert re.search(r"stopped   step [456], saved", done.stdout)


@pytest.mark.slow
def test_a_defect_ends_the_run_with_a_traceback_though_data_never_come(
  arguments, tmp_path
):
  code = DATA_THAT_NEVER_COMES + SIGNALS_ITSELF.format(
    step=3, before="assert waiting.wait(600); 1 / 0", number=0
  )
  done = subprocess.run(
    patched(code, arguments, tmp_path / "run"),
    capture_output=True,
    text=True,
    env=environment(),
    timeout=PATIENCE,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_workdir_that_another_run_writes_is_refused(cfg, tmp_path):
  with (
    lock.held(epath.Path(tmp_path)),
    pytest.raises(UserError, match=f"Another run writes.*{os.getpid()}"),
  ):
    loop.train(cfg, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


class OpenedError(Exception):
  """Stands for what a folder of checkpoints that does not answer does."""


@pytest.mark.parametrize("index", [None, 0, 1])
def test_the_guards_have_their_limits_before_anything_can_hang(
  cfg, tmp_path, monkeypatch, index
):
  guards = {}

  class Watchdog:
    def __init__(self, clock, seconds, workdir, *, behind):
      guards.update(seconds=seconds, workdir=workdir, behind=behind())

    def close(self):
      pass

  class Peers(Watchdog):
    def __init__(self, *, passed, doing, heard):
      guards.update(passed=passed(), doing=doing(), heard=heard)

    def agree(self, passed):
      return passed

    def behind(self):
      return "nobody"

  def opened(*_):
    raise OpenedError

  monkeypatch.setattr(loop, "Watchdog", Watchdog)
  monkeypatch.setattr(loop, "Peers", Peers)
  monkeypatch.setattr(loop, "Checkpoints", opened)
  if index is not None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: index)
  limits = LimitsConfig(
    start_seconds=1.0,
    step_seconds=2.0,
    eval_seconds=3.0,
    save_seconds=4.0,
    grace_seconds=6.0,
  )
  stopped = Interrupt()
  with pytest.raises(OpenedError):
    loop.train(dataclasses.replace(cfg, limits=limits), tmp_path, stopped)
  assert guards["seconds"] == {
    accounting.START: 1.0,
    accounting.COMPILE: 1.0,
    accounting.STEP: 2.0,
    accounting.DATA: 2.0,
    accounting.EVAL: 3.0,
    accounting.SAVE: 4.0,
  }
  assert guards["workdir"] == epath.Path(tmp_path)
  assert stopped.grace == 6.0
  if index is None:
    assert guards["behind"] == "there are no others"
    assert stopped.early == 0.0
  else:
    assert (guards["behind"], guards["doing"]) == ("nobody", "start")
    assert (guards["passed"], guards["heard"]) == (0, stopped.note)
    # The first process is the last to end, by more than a second.
    assert stopped.early == (1.5 if index == 0 else 4.0)


def test_the_first_execution_is_no_step(cfg, tmp_path, monkeypatch):
  clocks, waits = [], []

  class Clock(metrics.Clock):
    def __init__(self, activity):
      super().__init__(activity)
      clocks.append(self)

  ready = jax.block_until_ready

  def waited(measured):
    if isinstance(measured, dict) and "loss" in measured:
      waits.append(clocks[-1].activity)
    return ready(measured)

  monkeypatch.setattr(metrics, "Clock", Clock)
  monkeypatch.setattr(jax, "block_until_ready", waited)
  short = dataclasses.replace(cfg, steps=6, eval_every=None)
  assert loop.train(short, tmp_path) == Status.DONE
  assert waits == [accounting.COMPILE]


@pytest.mark.slow
def test_a_signal_during_the_imports_ends_the_run(arguments, tmp_path):
  words = command(arguments, tmp_path / "run")
  with subprocess.Popen(
    [words[0], "-X", "importtime", *words[1:]],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment(),
  ) as process:
    assert process.stderr is not None
    for line in process.stderr:
      # The first of many that come after the handlers.
      if line.endswith(" xlstm_jax.errors\n"):
        break
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == Status.PREEMPTED
  assert " jax\n" in errors[errors.index("SIGTERM: stopping") :]
  assert "stopped   before the first step" in output
