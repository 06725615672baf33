"""An optimizer is one row: toys that live here train, are saved and restored.

`momentum` and `signs` are what `optim.py` would hold, and `toys` adds their
rows.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from data.small_datasets import write_dataset
from fake_model import FakeDefinition
from small_run import final_items
from tools.trajectory import trajectory

from xlstm_jax import config, optim, sharding
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.optim import OptimConfig
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import loop
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps


def momentum(cfg: OptimConfig) -> optax.GradientTransformation:
  """Gradients averaged; keeps one tree, and nothing else."""
  return optax.chain(optax.identity(), optax.trace(decay=cfg.b1))


def signs(cfg: OptimConfig) -> optax.GradientTransformation:
  """The sign of every gradient; keeps nothing."""
  del cfg
  return optax.scale_by_sign()


def halves(cfg: OptimConfig) -> optax.GradientTransformation:
  """Matrices by factored moments, the rest by Adam."""
  return optax.partition(
    {
      "matrices": optax.scale_by_factored_rms(min_dim_size_to_factor=4),
      "rest": optim.adamw(cfg),
    },
    lambda params: jax.tree.map(
      lambda p: "matrices" if p.ndim == 2 else "rest", params
    ),
  )


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  for row in (momentum, signs, halves):
    monkeypatch.setitem(optim.OPTIMIZERS, row.__name__, row)


def run_config(data: Path, name: str, **changes: Any) -> RunConfig:
  return RunConfig(
    **{
      "model": ModelConfig(
        vocab_size=257,
        width=16,
        num_blocks=1,
        mlstm=MLSTMConfig(num_heads=2, round_to=8),
      ),
      "data": DataConfig(paths=(str(data),), context=16),
      "optim": OptimConfig(name=name, peak_lr=1e-2, weight_decay=0.01),
      "mesh": MeshConfig(data=2, fsdp=4),
      "steps": 2,
      "save_every": 1,
      "log_every": 1,
      "compilation_cache": None,
    }
    | changes
  )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  text = [(b"some text to train on", 0)] * 9
  return write_dataset(tmp_path_factory.mktemp("optimizers") / "data", text)


def test_a_run_with_it_is_saved_and_continued(data, tmp_path, capsys):
  cfg = run_config(data, "momentum")
  workdir = tmp_path / "run"
  assert loop.train(cfg, workdir) == 0
  losses = [r["loss"] for r in trajectory(workdir)]
  assert losses[1] < losses[0]
  whole = final_items(workdir, cfg)
  resumed = shutil.copytree(workdir, tmp_path / "resumed")
  shutil.rmtree(resumed / "checkpoints" / "2")
  assert loop.train(cfg, resumed) == 0
  assert "start     step 1, batch 1 of the data" in capsys.readouterr().out
  assert trajectory(resumed) == trajectory(workdir)
  jax.tree.map(np.testing.assert_array_equal, final_items(resumed, cfg), whole)
  other = dataclasses.replace(cfg, optim=OptimConfig(), steps=3)
  with pytest.raises(
    UserError,
    match=r"another optimizer \(optim\.name: momentum -> adamw\), .*"
    r"config\.optim\.name=momentum, or train in another workdir",
  ):
    loop.train(other, resumed)


@pytest.mark.parametrize("name", ["momentum", "signs", "halves"])
def test_what_it_keeps_lies_as_its_parameters_and_returns(name, tmp_path):
  definition: Any = FakeDefinition()
  cfg = run_config(tmp_path, name, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  mesh = sharding.make_mesh(cfg.mesh)
  batch = dict.fromkeys(("inputs", "targets", "segments"), np.ones((8, 16)))
  batch = jax.tree.map(np.int32, batch)
  with jax.set_mesh(mesh):
    step = steps.compiled(definition, cfg, mesh)
    state = states.init(definition, mesh, cfg.optim, seed=0)
    state, first = step(state, batch)
    state, second = step(state, batch)
  assert second["loss"] < first["loss"]
  where = jax.tree.map(lambda x: x.sharding, state)
  everywhere = sharding.replicated(mesh)
  if name == "momentum":
    assert where.optimizer[1].trace == where.params
  if name == "halves":
    parts = where.optimizer.inner_states
    moments = parts["rest"].inner_state
    assert moments.mu["mixer"]["bias"] == where.params["mixer"]["bias"]
    assert moments.count == everywhere
    # A row of a matrix does not have the shape of the matrix.
    rows = parts["matrices"].inner_state.v_row
    assert rows["head"]["weight"] == everywhere

  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(2, {**states.to_items(state), "progress": {}})
  checkpoints.close()
  like = states.abstract(definition, mesh, cfg.optim)
  items = Checkpoints(tmp_path).restore(2, states.to_items(like))
  assert ("optimizer" in items) == (name != "signs")
  back = states.from_items(
    items, like, step=2, position=2, skipped=0, mesh=mesh
  )
  jax.tree.map(np.testing.assert_array_equal, back, state)
  assert jax.tree.map(lambda x: x.sharding, back) == where


def test_an_unknown_name_is_refused(data):
  cfg = run_config(data, "adam")
  with pytest.raises(
    UserError,
    match=r"config\.optim\.name is 'adam'; it must be one of 'adamw', 'mom",
  ):
    config.validate(cfg, None, 8)
