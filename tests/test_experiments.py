"""Every experiment builds, states its recipe, and trains when made small."""

import ast
import dataclasses
import re
import runpy
from pathlib import Path

import jax
import pytest
from data.small_datasets import write_dataset
from tools.trajectory import trajectory

from xlstm_jax import config
from xlstm_jax.config import RunConfig
from xlstm_jax.models import counts
from xlstm_jax.plan import machines, program
from xlstm_jax.train import loop

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
NAMES = [path.stem for path in FILES]

# Parameters, and tokens of the whole run: of the published recipes.
PUBLISHED = {
  "xlstm_125m": (163_806_144, 30_000 * 256 * 2048),
  "xlstm_350m": (409_290_112, 30_000 * 256 * 2048),
  "xlstm_1b": (1_422_559_616, 30_000 * 256 * 2048),
  "xlstm_7b": (6_865_424_896, 550_000 * 512 * 8192),
}


def load(name, argument=""):
  return config.from_experiment(f"{ROOT / 'experiments' / name}.py{argument}")


def test_there_are_the_promised_experiments():
  assert set(NAMES) >= {"quickstart", *PUBLISHED}


def check_docstring(path):
  """Refuses an experiment that does not state its recipe."""
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert text is not None
  for part in (f"--config=experiments/{path.name}", "Cost: ", "Expected"):
    assert part in text
  machine = re.search(r"^Machine: .*\((\S+)\)", text, re.MULTILINE)
  assert machine is not None
  assert machine[1] == runpy.run_path(str(path))["MACHINE"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_docstring_has_command_machine_cost_and_result(path):
  check_docstring(path)


TOY = '''\
"""A toy.

  python -m xlstm_jax.train --config=experiments/toy.py --workdir=runs/toy

Machine: one H200 (h200:1)
Cost: a minute (computed)
Expected: unknown
"""

from xlstm_jax.config import RunConfig, to_config_dict
from xlstm_jax.models.config import ModelConfig

MACHINE = "h200:1"


def get_config():
  model = ModelConfig(vocab_size=257, width=32, num_blocks=2)
  return to_config_dict(RunConfig(model=model, steps=4))
'''


def test_an_experiment_is_one_file(tmp_path):
  path = tmp_path / "toy.py"
  path.write_text(TOY)
  check_docstring(path)
  cfg = config.from_experiment(str(path))
  config.validate(cfg, None, devices=1)
  assert config.changes(RunConfig(), cfg).keys() == {
    *("model.vocab_size", "model.width", "model.num_blocks", "steps")
  }
  path.write_text(TOY.replace("h200:1)", "h200:8)"))
  with pytest.raises(AssertionError):
    check_docstring(path)


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_fit_one_another(name):
  config.validate(load(name), None, devices=1)
  if name != "quickstart":
    config.validate(load(name), None, devices=8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_tokens_are_the_published_ones(name):
  cfg = load(name)
  tokens = cfg.steps * cfg.batch_size * cfg.data.context
  assert (counts.parameters(cfg.model), tokens) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["xlstm_125m", "xlstm_350m", "xlstm_1b"])
def test_the_other_ratio_differs_in_the_slstm_blocks_alone(name):
  changed = config.changes(load(name), load(name, ":7:1"))
  assert list(changed) == ["model.slstm_at"]


@pytest.mark.slow
def test_the_quickstart_fits_a_small_machine():
  """The others need compilers of other machines: tests/plan."""
  small = machines.Machine("cpu", jax.devices()[:1], 2**31, 2**31)
  assert program.plan(load("quickstart"), small).fits


def shrunk(cfg: RunConfig, data: Path) -> RunConfig:
  """The same recipe on a small block of each kind, for two steps."""
  kinds = sorted(set(cfg.model.kinds))
  model = dataclasses.replace(
    cfg.model,
    vocab_size=257,
    width=32,
    num_blocks=len(kinds),
    slstm_at=(1,) if "slstm" in kinds else (),
  )
  optim = dataclasses.replace(
    cfg.optim,
    warmup_steps=1,
    decay_steps=cfg.optim.decay_steps and 2,
    cooldown_steps=min(cfg.optim.cooldown_steps, 1),
  )
  return dataclasses.replace(
    cfg,
    model=model,
    optim=optim,
    data=dataclasses.replace(cfg.data, paths=(str(data),), context=16),
    steps=2,
    batch_size=16,
    accumulation=min(cfg.accumulation, 2),
    log_every=1,
    eval_every=None,
    compilation_cache=None,
  )


@pytest.mark.parametrize(
  "name",
  [
    # Made small, the others are 125M with other numbers.
    pytest.param(
      name,
      marks=[pytest.mark.slow] if name in ("xlstm_350m", "xlstm_1b") else [],
    )
    for name in NAMES
  ],
)
def test_it_trains_for_two_steps_when_made_small(name, tmp_path, capsys):
  data = write_dataset(tmp_path / "data", [(b"some text to train on", 0)] * 9)
  assert loop.train(shrunk(load(name), data), tmp_path / "run") == 0
  assert "finished  step 2" in capsys.readouterr().out
  records = trajectory(tmp_path / "run")
  losses = [record["loss"] for record in records]
  assert len(losses) == 2
  # A model that knows nothing needs log 257 = 5.55 nats.
  assert 4 < losses[1] < losses[0] < 7
