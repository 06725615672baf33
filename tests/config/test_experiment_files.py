"""Experiment files and command-line overrides, right and wrong."""

import pytest

from xlstm_jax import config
from xlstm_jax.config import RunConfig
from xlstm_jax.errors import UserError

HEAD = """
from xlstm_jax.config import RunConfig, to_config_dict

def get_config(size="64"):
  cfg = to_config_dict(RunConfig())
  cfg.model.width = int(size)
"""


@pytest.fixture
def experiment(tmp_path):
  def write(body="  return cfg\n", head=HEAD):
    path = tmp_path / "experiment.py"
    path.write_text(head + body)
    return str(path)

  return write


def changed(path, *overrides):
  cfg = config.from_experiment(path, overrides)
  new = {k: v[1] for k, v in config.changes(RunConfig(), cfg).items()}
  new.pop("model.width", None)
  return new


@pytest.mark.parametrize(
  ("overrides", "want"),
  [
    ((), {}),
    (("--config.steps=3",), {"steps": 3}),
    (("--config.steps", "3"), {"steps": 3}),
    (("-config.steps=3",), {"steps": 3}),
    (("--config.steps=3", "--config.steps=4"), {"steps": 4}),
    (("--config.optim.peak_lr=2",), {"optim.peak_lr": 2.0}),
    (("--config.optim.decay_steps=5",), {"optim.decay_steps": 5}),
    (("--config.optim.clip_norm=none",), {"optim.clip_norm": None}),
    (("--config.optim.clip_norm=None",), {"optim.clip_norm": None}),
    (("--config.model.slstm_at=3,4",), {"model.slstm_at": (3, 4)}),
    (("--config.model.slstm_at=(3,)",), {"model.slstm_at": (3,)}),
    (("--config.data.weights=(1,2.5)",), {"data.weights": (1.0, 2.5)}),
    (("--config.data.paths=a",), {"data.paths": ("a",)}),
    (
      ("--config.data.paths=a", "--config.data.paths=b"),
      {"data.paths": ("a", "b")},
    ),
    (("--config.model.out_norm=false",), {"model.out_norm": False}),
    (("--noconfig.model.out_norm",), {"model.out_norm": False}),
    (("--config.init_from=a=b",), {"init_from": "a=b"}),
  ],
)
def test_overrides_apply(experiment, overrides, want):
  assert changed(experiment(), *overrides) == want


def test_text_behind_a_colon_reaches_get_config(experiment):
  assert config.from_experiment(experiment() + ":32").model.width == 32


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("--config.stesp=3", "no config.stesp; the nearest key is config.steps"),
    ("--config.steps=3.5", "config.steps is '3.5'; it must be an integer"),
    ("--config.steps", "config.steps is ''; it must be an integer"),
    ("--config.optim.eps=x", "eps is 'x'; it must be a finite number"),
    ("--config.optim.eps=nan", "eps is nan; it must be a finite number"),
    ("--config.optim.clip_norm=x", "is 'x'; it must be a finite number"),
    ("--config.model.out_norm=7", "is '7'; it must be true or false"),
    ("--config.optim.schedule=cosin", "one of 'cosine'"),
    ("--config.optim=3", "config.optim is a section; .*optim.peak_lr="),
    ("--config.model.slstm_at=1,x", "slstm_at.*must be an integer"),
    ("--config.model.slstm_at=99", "slstm_at names the blocks"),
    ("--steps=3", "'--steps=3' is not understood"),
    ("steps", "'steps' is not understood"),
  ],
)
def test_a_wrong_override_is_explained(experiment, override, message):
  with pytest.raises(UserError, match=message):
    config.from_experiment(experiment(), [override])


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("  cfg.model.widht = 3\n  return cfg\n", "line 7: there is no .*'width'"),
    ("  cfg.steps = 'x'\n  return cfg\n", "line 7: .*steps"),
    ("  return (\n", "line 7: "),
    ("  pass\n", "returned NoneType"),
    ("  return vars(RunConfig())\n", "returned dict"),
  ],
)
def test_a_wrong_experiment_is_explained(experiment, body, message):
  path = experiment(body)
  with pytest.raises(UserError, match=message) as error:
    config.from_experiment(path)
  assert path in str(error.value)
  assert "\n" not in str(error.value)


def test_an_experiment_needs_get_config(experiment):
  with pytest.raises(UserError, match=r"has no get_config\(\)"):
    config.from_experiment(experiment("", head="x = 1\n"))


@pytest.mark.parametrize("name", ["none.py", "", ".", "folder"])
def test_a_missing_experiment_is_named(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  with pytest.raises(UserError, match=f"no experiment file '{name}'"):
    config.from_experiment(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
  (tmp_path / "a.txt").write_text("")
  with pytest.raises(UserError, match=r"must end in \.py"):
    config.from_experiment(str(tmp_path / "a.txt"))
