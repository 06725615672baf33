"""The quickstart: its steps, where it stops, and the whole of it."""

import json
import runpy
from pathlib import Path

import pytest

from xlstm_jax.prepare import __main__ as prepare

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "quickstart.py"


@pytest.fixture
def script():
  return runpy.run_path(str(SCRIPT))


def names(steps):
  return [
    step[2].removeprefix("xlstm_jax.")
    if step[1] == "-m"
    else Path(step[1]).stem
    for step in steps
  ]


def test_what_is_prepared_is_not_prepared_again(script, tmp_path):
  rest = ["train", "evaluate", "generate", "plot_loss"]
  all_steps = names(script["steps"](tmp_path, []))
  assert all_steps == ["stdlib_corpus", "prepare", *rest]
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "manifest.json").touch()
  assert names(script["steps"](tmp_path, [])) == rest


def test_it_stops_where_a_step_fails(script, tmp_path, capfd):
  corpus = tmp_path / "corpus.txt"
  corpus.write_text("text")
  arguments = [f"--input={corpus}", f"--output={tmp_path / 'data'}"]
  assert prepare.main([*arguments, "--tokenizer=byte", "--workers=1"]) == 0
  wrong = ["--", "--config.steps=0"]
  assert script["main"]([f"--workdir={tmp_path}", *wrong]) == 2
  out, err = capfd.readouterr()
  assert "$ python -m xlstm_jax.train" in out
  assert "xlstm_jax.evaluate" not in out
  assert "config.steps is 0; it must be at least 1." in err
  assert "ended with status 2" in err


@pytest.mark.slow
def test_the_whole_of_it_and_again(script, tmp_path, capfd, monkeypatch):
  # One device and fast programs, as on a newcomer's machine.
  monkeypatch.delenv("XLA_FLAGS")
  monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
  short = [
    "--config.steps=6",
    "--config.optim.warmup_steps=2",
    "--config.model.width=32",
  ]
  workdir = tmp_path / "with a space"
  arguments = [f"--workdir={workdir}", "--", *short]
  assert script["main"](arguments) == 0
  out, _ = capfd.readouterr()
  assert "bits per byte" in out
  assert (workdir / "loss.png").stat().st_size > 0
  assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
  scored = json.loads((workdir / "heldout.json").read_text())
  (data,) = scored["data"].values()
  assert set(data["total"]["bits_per_byte_of"]) == {"unigram", "bigram"}
  _, table = out.split(f"heldout of {workdir / 'data'}\n")
  names = [line.split()[0] for line in table.split("\n\n")[0].splitlines()]
  assert names[:2] == ["unigram", "source"]
  assert sorted(names[2:]) == sorted([*data["sources"], "total"])
  assert len(data["sources"]) > 3
  # What is done stays done.
  assert script["main"](arguments) == 0
  out, _ = capfd.readouterr()
  assert "xlstm_jax.prepare" not in out
  assert "is finished: 6 of 6 steps" in out
