"""The configuration in a workdir."""

import dataclasses
import json

import pytest

from xlstm_jax import config
from xlstm_jax.config import RunConfig
from xlstm_jax.errors import UserError
from xlstm_jax.models import presets
from xlstm_jax.optim import OptimConfig

CFG = RunConfig(
  optim=OptimConfig(peak_lr=0.1 + 0.2, clip_norm=None), steps=3, profile=(1, 2)
)


def test_a_configuration_returns_from_disk(tmp_path):
  config.save(tmp_path / "run", CFG)
  assert config.load(tmp_path / "run") == CFG
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(UserError, match="is not the workdir of a run"):
    config.load(tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"{", "not valid JSON"),
    (b"\xff", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"[]", "must be a section"),
    (b'{"stesp": 1}', "nearest key is config.steps"),
    (b'{"steps": "1"}', "must be an integer"),
  ],
)
def test_a_damaged_file_is_explained(tmp_path, content, message):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    config.load(tmp_path)
  assert str(error.value).startswith(f"{tmp_path / 'config.json'} is ")


def test_keys_that_came_later_have_their_defaults(tmp_path):
  (tmp_path / "config.json").write_text('{"steps": 7}')
  assert config.load(tmp_path) == RunConfig(steps=7)


def test_a_run_of_before_these_keys_is_the_same_run(tmp_path):
  cfg = RunConfig(model=presets.paper("125M", "7:1"))
  values = dataclasses.asdict(cfg)
  del values["model"]["pattern"]
  del values["model"]["slstm"]["feedforward"]
  del values["compute"]["slstm_backend"]
  del values["compute"]["lstm_backend"]
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert config.load(tmp_path) == cfg


def test_changes_are_listed_by_key():
  assert config.changes(RunConfig(), CFG) == {
    "optim.peak_lr": (1e-3, 0.1 + 0.2),
    "optim.clip_norm": (1.0, None),
    "steps": (1000, 3),
    "profile": ((), (1, 2)),
  }
