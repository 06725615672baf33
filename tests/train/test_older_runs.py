"""A run and its data of version 0.1 go on.

`goldens/run_of_0_1` was written by its code when AdamW was the only optimizer:
a dataset, and a workdir killed at the end of step 8 whose newest checkpoint is
of step 4.
"""

import dataclasses
import shutil
from pathlib import Path

import pytest

from xlstm_jax import config, metrics
from xlstm_jax.train import loop

OLD = Path(__file__).parents[1] / "goldens" / "run_of_0_1"


def test_it_continues_as_it_did_then(tmp_path, capsys):
  workdir = shutil.copytree(OLD / "run", tmp_path / "run")
  cfg = config.load(workdir)
  assert cfg.optim.name == "adamw"
  data = dataclasses.replace(cfg.data, paths=(str(OLD / "data"),))
  cfg = dataclasses.replace(cfg, data=data, compilation_cache=None)
  assert loop.train(cfg, workdir) == 0
  assert "start     step 4, batch 4 of the data" in capsys.readouterr().out
  then, now = metrics.trajectory(OLD / "run"), metrics.trajectory(workdir)
  assert len(then) == 8 + 2
  for before, after in zip(then, now, strict=True):
    assert after == pytest.approx(before, rel=1e-5)
