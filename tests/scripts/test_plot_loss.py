"""The loss curve: which points it has, and that it becomes a picture."""

import json
import runpy
from pathlib import Path

import pytest

from xlstm_jax.errors import exit_code

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_loss.py"
RECORDS = [
  {"step": 1, "loss": 5.5},
  {"step": 10, "loss": None},
  {"step": 10, "eval_loss": 4.0},
  {"step": 20, "loss": 3.0, "learning_rate": 1e-3},
]


@pytest.fixture(scope="module")
def script():
  return runpy.run_path(str(SCRIPT))


def test_a_curve_has_the_records_with_a_number(script):
  assert script["curve"](RECORDS, "loss") == ([1, 20], [5.5, 3.0])
  assert script["curve"](RECORDS, "eval_loss") == ([10], [4.0])
  assert script["curve"](RECORDS, "other") == ([], [])


def test_the_picture_lies_in_the_workdir(script, tmp_path, capsys):
  lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
  (tmp_path / "metrics.jsonl").write_text(lines)
  assert script["main"]([f"--workdir={tmp_path}"]) == 0
  assert capsys.readouterr().out == f"{tmp_path / 'loss.png'}\n"
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_records_is_refused(script, tmp_path, capsys):
  assert exit_code(lambda: script["main"]([f"--workdir={tmp_path}"])) == 2
  assert f"{tmp_path} has no metrics.jsonl" in capsys.readouterr().err
