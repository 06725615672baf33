"""Experiment files and command-line overrides, right and wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_jax import config
from xlstm_jax.config import RunConfig
from xlstm_jax.errors import UserError

ROOT = Path(__file__).parents[2]
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
    # Names are taken as they are, whatever Python would make of them.
    (("--config.data.paths=d c",), {"data.paths": ("d c",)}),
    (("--config.data.paths=a,b",), {"data.paths": ("a,b",)}),
    (
      ("--config.data.paths=2024", "--config.data.paths=1e5"),
      {"data.paths": ("2024", "1e5")},
    ),
    (("--config.data.paths=None",), {"data.paths": ("None",)}),
    (("--config.data.paths=a=b",), {"data.paths": ("a=b",)}),
    (("--config.data.paths", "a b"), {"data.paths": ("a b",)}),
    (('--config.data.paths=("a","b")',), {"data.paths": ("a", "b")}),
    (("--config.data.paths=['a, b']",), {"data.paths": ("a, b",)}),
    (
      ("--config.data.paths=('a',)", "--config.data.paths=b"),
      {"data.paths": ("a", "b")},
    ),
    (("--config.data.paths=()",), {}),
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
    ("--config.optim=3", "config.optim is a section; .*optim.name="),
    ("--config.model.slstm_at=1,x", "slstm_at.*must be an integer"),
    ("--config.model.slstm_at=99", "slstm_at names the blocks"),
    ("--config.data.paths=(a)", r"is '\(a\)'; .* must be a tuple of strings"),
    ("--config.data.paths=('a')", "must be a tuple of strings"),
    ("--config.data.paths=['a', 3]", "must be a tuple of strings"),
    ("--config.data.paths=(", "must be a tuple of strings"),
    ("--config.data.paths=", "config.data.paths is given without a value"),
    ("--config.data.paths", "config.data.paths is given without a value"),
    ("--noconfig.data.paths", "config.data.paths is given without a value"),
    ("--noconfig.model.out_norm=1", "out_norm=1' says no and has a value"),
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
    (
      "  return to_config_dict(RunConfig(stesp=3))\n",
      "line 7: There is no config.stesp; the nearest key is config.steps.",
    ),
    (
      "  cfg = get_config.__wrapped__\n",
      "line 7: 'function' object has no attribute '__wrapped__'.",
    ),
    ("  def f():\n    pass\n  f(a=1)\n", "line 9: .*argument 'a'"),
    ("  return cgf\n", "line 7: name 'cgf' is not defined"),
    (
      "  from xlstm_jax.config import RunConfg\n",
      "line 7: cannot import name 'RunConfg' from 'xlstm_jax.config'.$",
    ),
    ("  import xlstm\n", "line 7: No module named 'xlstm'.$"),
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


# In a process of its own, since annotations are executed in this one.
MESSAGES = """
import sys
from xlstm_jax import config, errors

for path in sys.argv[1:]:
  try:
    config.from_experiment(path)
  except errors.UserError as error:
    print(error)
"""


def test_a_wrong_argument_of_a_dataclass_is_explained(tmp_path):
  cases = {
    "OptimConfig(peaklr=1.0)": "1.py, line 2: There is no config.optim.peaklr; "
    "the nearest key is config.optim.peak_lr.",
    "SLSTMConfig(num_head=4)": "2.py, line 2: There is no "
    "config.model.slstm.num_head; the nearest key is "
    "config.model.slstm.num_heads.",
    "ModelConfig(slstm_at=1)": "3.py, line 2: model.slstm_at is 1; it must be "
    "a tuple of integers, such as (1,).",
    "ModelConfig(slstm_at=('1',))": "4.py, line 2: model.slstm_at is ('1',); "
    "it must be a tuple of integers, such as (1,).",
    "ModelConfig(vocab_size='257')": "5.py, line 2: model.vocab_size is '257'; "
    "it must be an integer, at least 1.",
    "RunConfig(steps='10')": "config.steps is '10'; it must be an integer.",
  }
  head = (
    "from xlstm_jax.config import *; from xlstm_jax.optim import *; "
    "from xlstm_jax.models.config import *; "
    "from xlstm_jax.mixers.slstm import *\n"
  )
  for number, call in enumerate(cases, 1):
    body = f"cfg = {call}\ndef get_config(): return to_config_dict(cfg)\n"
    (tmp_path / f"{number}.py").write_text(head + body)
  files = [f"{number}.py" for number in range(1, len(cases) + 1)]
  found = subprocess.run(
    [sys.executable, "-c", MESSAGES, *files],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert found.stdout.splitlines() == list(cases.values())


def test_a_relative_path_has_lines_too(experiment, monkeypatch, tmp_path):
  experiment("  return cgf\n")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r"^experiment\.py, line 7: name 'cgf'"):
    config.from_experiment("experiment.py")


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
