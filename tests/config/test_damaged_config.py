"""Any override and any config.json is a configuration or an error of ours."""

import contextlib
import json
from pathlib import Path

import pytest
from damage import bytes_like, json_like, same_folder, values
from hypothesis import example, given
from hypothesis import strategies as st

from xlstm_jax import config
from xlstm_jax.config import RunConfig, conversion
from xlstm_jax.errors import UserError

EXPERIMENT = """\
from xlstm_jax.config import RunConfig, to_config_dict

def get_config():
  return to_config_dict(RunConfig())
"""
KEYS = sorted(conversion.keys(RunConfig))
# As the system hands over arguments: any bytes but zero.
arguments = st.text(
  st.characters(exclude_characters="\0", exclude_categories=()), max_size=30
)
written = st.sampled_from([
  "1", "-1", "1e-3", "1e999", "nan", "none", "true", "a", "1,2", "(1,)", "(",
  "'a", "[1]", "1" * 5000, "((((1", "a" * 500, "=", "--", "__import__('os')",
])  # fmt: skip
overrides = st.builds(
  "{}{}{}{}".format,
  st.sampled_from(["--config.", "-config.", "--noconfig.", "--no", "--"]),
  st.sampled_from([*KEYS, "model", "optim.", "optim..eps"]) | arguments,
  st.sampled_from(["=", "", " "]),
  written
  | values.map(str).map(lambda text: text.replace("\0", ""))
  | arguments,
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
  path = tmp_path_factory.mktemp("experiment") / "experiment.py"
  path.write_text(EXPERIMENT)
  return str(path)


@same_folder
@given(st.lists(overrides | arguments, max_size=4))
@example(["--config.steps", "--config.steps=1"])
@example(["--config.data.paths=a", "--noconfig.data.paths"])
@example(["--noconfig.model.out_norm=1"])
def test_any_overrides_are_applied_or_refused(experiment: str, given_overrides):
  with contextlib.suppress(UserError):
    cfg = config.from_experiment(experiment, given_overrides)
    assert isinstance(cfg, RunConfig)


def read(folder: Path, data: bytes) -> None:
  """Reads a config.json, which a reader may refuse."""
  (folder / config.CONFIG_FILE).write_bytes(data)
  with contextlib.suppress(UserError):
    cfg = config.load(folder)
    # What is read is a whole configuration, which can be written again.
    config.save(folder, cfg)
    assert config.load(folder) == cfg


def saved(folder: Path) -> bytes:
  config.save(folder, RunConfig())
  return (folder / config.CONFIG_FILE).read_bytes()


@same_folder
@given(st.binary(max_size=60))
def test_any_bytes_are_a_configuration_or_refused(tmp_path: Path, data: bytes):
  read(tmp_path, data)


@same_folder
@given(st.data())
def test_a_damaged_configuration_is_read_or_refused(
  tmp_path: Path, data: st.DataObject
):
  read(tmp_path, data.draw(bytes_like(saved(tmp_path))))


@same_folder
@given(st.data())
def test_any_value_in_a_configuration_is_read_or_refused(
  tmp_path: Path, data: st.DataObject
):
  content = data.draw(json_like(json.loads(saved(tmp_path))))
  read(tmp_path, json.dumps(content).encode())
