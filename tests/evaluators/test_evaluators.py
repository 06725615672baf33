"""An evaluator is one row: a toy that lives here runs in training and after.

`run` and its settings are what a file in `evaluators/` holds, and `toys` adds
what `evaluators/table.py` would: a field of `EvaluatorsConfig` and a row.
"""

import dataclasses
import json
import math
from typing import Any

import jax
import pytest
from data.small_datasets import write_dataset
from tools.trajectory import trajectory

from xlstm_jax import config, metrics
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.evaluate import __main__ as evaluate
from xlstm_jax.evaluators import table
from xlstm_jax.evaluators.evaluator import Evaluator, Figures, Subject
from xlstm_jax.evaluators.table import EVALUATORS, EvaluatorsConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.train import loop


@dataclasses.dataclass(frozen=True)
class NormsConfig:
  """The norms of parameters.

  Attributes:
    order: Of the norm.
  """

  order: float = 2.0


def run(subject: Subject, settings: object) -> Figures:
  """The norm of the parameters by their first name."""
  assert isinstance(settings, NormsConfig)
  subject.before_batch()
  return {
    f"norms/{name}": float(
      sum((abs(x) ** settings.order).sum() for x in jax.tree.leaves(part))
      ** (1 / settings.order)
    )
    for name, part in subject.params.items()
  }


@dataclasses.dataclass(frozen=True)
class WithToy(EvaluatorsConfig):
  norms: NormsConfig = NormsConfig()


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  row = Evaluator(run, reads_heldout=False)
  monkeypatch.setitem(EVALUATORS, "norms", row)


def run_config(data, *names: str, **changes: Any) -> RunConfig:
  return RunConfig(
    **{
      "model": ModelConfig(
        vocab_size=257,
        width=16,
        num_blocks=1,
        mlstm=MLSTMConfig(num_heads=2, round_to=8),
      ),
      "data": DataConfig(paths=(str(data),), context=16),
      "evaluators": WithToy(names=names, norms=NormsConfig(order=1.0)),
      "steps": 2,
      "eval_every": 1,
      "save_every": 1,
      "log_every": 1,
      "compilation_cache": None,
    }
    | changes
  )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  text = [(b"some text to train on", 0)] * 9
  folder = tmp_path_factory.mktemp("evaluators") / "data"
  return write_dataset(folder, text, heldout=text[:2])


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
  """Without held-out text."""
  text = [(b"some text to train on", 0)] * 9
  return write_dataset(tmp_path_factory.mktemp("evaluators") / "empty", text)


def evaluations(workdir) -> list[dict[str, Any]]:
  records = trajectory(workdir)
  return [r for r in records if metrics.holds(r, metrics.EVALUATED)]


def test_it_runs_beside_the_perplexity_during_a_run_and_after_it(
  data, tmp_path, capsys, monkeypatch
):
  cfg = run_config(data, "perplexity", "norms")
  workdir = tmp_path / "run"
  assert loop.train(cfg, workdir) == 0
  first, last = evaluations(workdir)
  for record in (first, last):
    assert record["eval_perplexity"] == pytest.approx(
      math.exp(record["eval_loss"])
    )
    assert record["eval_norms/head"] > 1
  assert first["eval_norms/head"] != last["eval_norms/head"]
  out = capsys.readouterr().out
  assert f"eval      2  norms/blocks {last['eval_norms/blocks']:.4g}  " in out
  assert "held out" in out

  # The command reads the run's own configuration, of this module's class.
  monkeypatch.setattr(config, "load", lambda _: cfg)
  report = tmp_path / "report.json"
  arguments = [f"--workdir={workdir}", f"--json={report}", "--batch-size=8"]
  assert evaluate.main(arguments) == 0
  found = json.loads(report.read_text())
  assert set(found["figures"]) == {
    f"eval_norms/{name}" for name in ("embedding", "blocks", "norm", "head")
  }
  head = found["figures"]["eval_norms/head"]
  assert head == pytest.approx(last["eval_norms/head"], rel=1e-5)
  assert f"eval_norms/head {head:.4f}" in capsys.readouterr().out
  total = found["data"][str(data)]["total"]
  assert total["perplexity"] == pytest.approx(last["eval_perplexity"], rel=1e-2)


def test_a_run_can_do_without_held_out_text(
  empty, tmp_path, capsys, monkeypatch
):
  cfg = run_config(empty, "norms")
  workdir = tmp_path / "run"
  assert loop.train(cfg, workdir) == 0
  assert len(evaluations(workdir)) == 2
  out = capsys.readouterr().out
  assert "held out" not in out
  monkeypatch.setattr(config, "load", lambda _: cfg)
  # Neither is it evaluated again, nor does a checkpoint have a loss to rank.
  assert loop.train(cfg, workdir) == 0
  assert "is finished: 2 of 2 steps" in capsys.readouterr().out
  assert len(evaluations(workdir)) == 2
  assert Checkpoints(workdir / "checkpoints").best() == 2


def test_figures_of_one_name_are_refused(monkeypatch):
  row = Evaluator(lambda *_: {"loss": 1.0}, reads_heldout=False)
  for name in ("one", "other"):
    monkeypatch.setitem(EVALUATORS, name, row)
  with pytest.raises(ValueError, match="other gives 'loss', as another"):
    table.figures(SUBJECT, EvaluatorsConfig(), ("one", "other"))
  one = table.figures(SUBJECT, EvaluatorsConfig(), ("one",))
  assert one == {"eval_loss": 1.0}


SUBJECT: Any = None


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("perplexty",), "holds 'perplexty'; each must be one of 'perplexity', 'n"),
    (("norms", "norms"), r"is \('norms', 'norms'\); name each of them once"),
    ((), "eval_every is 1, but config.evaluators.names is empty"),
  ],
)
def test_names_that_are_none_are_refused(data, names, message):
  with pytest.raises(UserError, match=message):
    config.validate(run_config(data, *names), None, 8)


def test_a_run_of_a_missing_evaluator_is_refused(data):
  cfg = run_config(data, "perplexity", "gone")
  with pytest.raises(UserError, match="the evaluator 'gone'; there are perp"):
    evaluate._check_evaluators(cfg)
