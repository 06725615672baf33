"""Reports come one step late, and their rates count training alone."""

import dataclasses
import math
import types

import jax.numpy as jnp
import pytest

from xlstm_jax import metrics
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.models import counts
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.train import report
from xlstm_jax.train.health import Health

CFG = RunConfig(
  model=ModelConfig(vocab_size=16, width=32, num_blocks=1),
  data=DataConfig(context=8),
  batch_size=4,
  steps=9,
  log_every=2,
)


class FakeClock(metrics.Clock):
  """Ten seconds a lap, of which four are training."""

  def lap(self):
    others = {"compile": 1.0, "eval": 2.0, "save": 3.0, "data": 0.4}
    return {"step": 3.6, **others}


class FakeLog:
  def __init__(self):
    self.records = []

  def write(self, step, record):
    self.records.append((step, record))


def reports_of(cfg, log, *, step):
  health = Health(cfg.health)
  return report.Report(cfg, log, FakeClock("step"), health, step=step)


def measured(loss):
  names = ("tokens", "grad_norm", "param_norm", "learning_rate", "skipped")
  return {"loss": jnp.float32(loss)} | dict.fromkeys(names, jnp.float32(1))


@pytest.fixture
def log():
  return FakeLog()


def test_a_step_is_reported_after_the_next_was_handed_over(log):
  reports = reports_of(CFG, log, step=0)
  seen = []
  for step in range(1, 10):
    reports.later(step, step + 100, measured(step))
    seen.append([at for at, _ in log.records])
  assert seen[0] == []
  assert seen[1] == [1]
  assert seen[4] == [1, 2, 4]
  reports.now()
  reports.now()
  assert [at for at, _ in log.records] == [1, 2, 4, 6, 8, 9]
  assert [r["loss"] for _, r in log.records] == [1, 2, 4, 6, 8, 9]


def test_rates_leave_out_what_is_no_training(log):
  reports = reports_of(CFG, log, step=2)
  reports.later(4, 4 + 100, measured(2.0))
  reports.now()
  ((_, record),) = log.records
  tokens = 2 * 4 * 8
  flops = counts.train_flops_per_token(CFG.model, 8)
  assert record["tokens_per_second"] == pytest.approx(tokens / 4)
  assert record["flops_per_second"] == pytest.approx(tokens * flops / 4)
  assert record["seconds_per_step"] == pytest.approx(2)
  assert record["data_wait"] == pytest.approx(0.1)
  assert record["perplexity"] == pytest.approx(7.389056, rel=1e-6)
  assert "mfu" not in record


def test_the_first_step_of_a_process_is_no_part_of_its_rates(log):
  reports = reports_of(CFG, log, step=2)
  reports.later(3, 103, measured(2.0))
  reports.first_took(90.0)
  for step in (4, 5, 6, 7):
    reports.later(step, step + 100, measured(2.0))
  (_, record), (_, after) = log.records
  # Of steps 3 and 4 the second alone took the four seconds of a lap.
  assert record["seconds_per_step"] == pytest.approx(4)
  assert record["tokens_per_second"] == pytest.approx(1 * 4 * 8 / 4)
  assert record["data_wait"] == pytest.approx(0.1)
  assert after["seconds_per_step"] == pytest.approx(2)


def test_where_there_is_no_other_the_rates_are_of_the_first_step(log):
  reports = reports_of(CFG, log, step=0)
  reports.later(1, 101, measured(2.0))
  reports.first_took(16.0)
  reports.now()
  ((_, record),) = log.records
  assert record["seconds_per_step"] == pytest.approx(16 + 4)
  assert record["tokens_per_second"] == pytest.approx(1 * 4 * 8 / 20)
  assert record["data_wait"] == pytest.approx(0.4 / 20)


def test_mfu_is_of_all_devices_and_of_bf16(log, monkeypatch):
  monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e9)
  for dtype in ("bfloat16", "float32"):
    compute = dataclasses.replace(CFG.compute, dtype=dtype)
    cfg = dataclasses.replace(CFG, compute=compute)
    reports = reports_of(cfg, log, step=0)
    reports.later(2, 2 + 100, measured(1.0))
    reports.now()
  (_, bf16), (_, fp32) = log.records
  assert bf16["mfu"] == pytest.approx(bf16["flops_per_second"] / 8e9)
  assert "mfu" not in fp32


def test_lines_are_readable(log, capsys):
  reports = reports_of(CFG, log, step=0)
  reports.later(2, 2 + 100, measured(2.0))
  reports.now()
  reports.evaluated(2, {"eval_loss": 1.0})
  compiled, step, evaluation = capsys.readouterr().out.splitlines()
  assert compiled == "compiled  in 1.0 s"
  assert step.startswith("step      2/9  loss 2.0000  perplexity 7.389  lr 1.0")
  assert "16 tokens/s" in step
  assert "0m14s left" in step
  assert evaluation.startswith("eval      2  loss 1.0000  perplexity 2.718")


def test_a_finding_is_told_and_a_serious_one_ends_the_reports(log, capsys):
  health = dataclasses.replace(CFG.health, max_skipped=1)
  reports = reports_of(dataclasses.replace(CFG, health=health), log, step=2)
  for step, loss in ((3, 1.0), (5, math.nan), (7, math.nan), (8, 1.0)):
    reports.later(step, step + 100, measured(loss))
  reports.now()
  # Odd steps are not due, but these two are told.
  assert [step for step, _ in log.records] == [5, 7]
  assert "warning   step 5: loss nan" in capsys.readouterr().out
  assert reports.finding is not None
  assert (reports.finding.step, reports.position) == (7, 107)


@pytest.mark.parametrize(
  ("known", "told"),
  [
    (16, "vocabulary 16\n"),
    (5, "vocabulary 16, of which the tokenizer has 5\n"),
  ],
)
def test_ids_that_no_text_has_are_told(capsys, known, told):
  """Their rows of the embedding take memory, and of the head time."""
  total = types.SimpleNamespace(tokens=100)
  manifest = types.SimpleNamespace(
    splits={"train": types.SimpleNamespace(total=total)},
    tokenizer=types.SimpleNamespace(vocab_size=known),
  )
  mesh = types.SimpleNamespace(shape={"data": 1})
  report.describe(
    types.SimpleNamespace(cfg=CFG, workdir="w", mesh=mesh, manifests=[manifest])
  )
  assert told in capsys.readouterr().out
