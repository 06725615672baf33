"""The command line."""

from pathlib import Path

import pytest

from xlstm_jax import errors
from xlstm_jax.runtime import peers
from xlstm_jax.runtime.interrupt import Interrupt
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import command

ROOT = Path(__file__).parents[2]
QUICKSTART = f"--config={ROOT / 'experiments' / 'quickstart.py'}"


def test_help_reads_well(capsys):
  with pytest.raises(SystemExit) as end:
    command.main(["--help"], Interrupt())
  assert end.value.code == 0
  text = capsys.readouterr().out
  for part in ("--config FILE.py", "--workdir DIR", "example:"):
    assert part in text
  for status in Status:
    assert f"\n  {status.value:<4}" in text
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=none.py", "--workdir=x"], "There is no experiment file"),
    (
      [QUICKSTART, "--workdir=x", "--stesp=3"],
      "The argument '--stesp=3' is not understood",
    ),
    (
      [QUICKSTART, "--workdir=x", "--config.stesp=3"],
      "There is no config.stesp; the nearest key is config.steps.",
    ),
  ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, message):
  assert errors.exit_code(lambda: command.main(arguments, Interrupt())) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert message in line


@pytest.mark.parametrize("arguments", [[], ["--config=a.py"], ["--workdir=a"]])
def test_missing_flags_are_named(capsys, arguments):
  with pytest.raises(SystemExit) as end:
    command.main(arguments, Interrupt())
  assert end.value.code == 2
  assert "are required" in capsys.readouterr().err


def test_a_missing_process_is_one_line_and_a_status(
  tmp_path, monkeypatch, capsys
):
  def train(cfg, workdir, stopped):
    raise peers.Missing("Not all processes came.")

  monkeypatch.setattr(command.loop, "train", train)
  path = tmp_path / "experiment.py"
  path.write_text(
    "from xlstm_jax.config import RunConfig, to_config_dict\n"
    "def get_config():\n"
    "  return to_config_dict(RunConfig())\n"
  )
  arguments = [f"--config={path}", f"--workdir={tmp_path}"]
  assert command.main(arguments, Interrupt()) == Status.HUNG
  assert capsys.readouterr().err == "error: Not all processes came.\n"
