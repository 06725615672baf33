"""A dataset and a run that an earlier version wrote are read and continued.

Commit 9271e90 wrote `old_formats`, in its checkout with one device:

  python -m xlstm_jax.prepare --output=tests/old_formats/dataset \\
    --input=code=experiments/ --input=prose=docs/decisions/ \\
    --train-tokenizer=320 --heldout-fraction=0.3 --workers=1
  python -m xlstm_jax.train --config=tests/old_formats/experiment.py \\
    --workdir=tests/old_formats/workdir \\
    --config.data.paths=tests/old_formats/dataset
  python -m xlstm_jax.evaluate --workdir=tests/old_formats/workdir --step=4 \\
    --json=tests/old_formats/heldout.json

after which everything of the workdir that is not needed was deleted:
`tensorboard`, `lock`, and all checkpoints but that of step 4. The records still
have the losses of steps 5 and 6.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from xlstm_jax import config, metrics
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer
from xlstm_jax.data.shards import open_split
from xlstm_jax.evaluate import __main__ as evaluate
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import loop

HERE = Path(__file__).with_name("old_formats")
DATASET = HERE / "dataset"
SAVED, LAST = 4, 6
# Other devices and versions of XLA sum in another order.
ROUNDING = 1e-5


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
  """A copy that may be written."""
  return Path(shutil.copytree(HERE / "workdir", tmp_path / "run"))


def read_config(workdir: Path) -> RunConfig:
  cfg = config.load(workdir)
  data = dataclasses.replace(cfg.data, paths=(str(DATASET),))
  return dataclasses.replace(cfg, data=data)


def test_the_dataset_is_read():
  ids = tokenizer.load(DATASET)
  split = open_split(DATASET, "train", verify="first_use")
  text = ids.decode(split.read(0, split.tokens).tolist())
  assert split.sources == ("code", "prose")
  assert len(text) > 15_000
  assert text.startswith('"""xLSTM[1:0] of 164M parameters')
  assert text.endswith("where it now takes 0.11.\n")


@pytest.mark.slow
def test_the_run_continues_with_the_losses_it_had(workdir: Path):
  expected = {r["step"]: r for r in metrics.read(workdir) if "loss" in r}
  assert sorted(expected) == list(range(1, LAST + 1))
  assert loop.train(read_config(workdir), workdir) == Status.DONE
  found = {r["step"]: r for r in metrics.read(workdir) if "loss" in r}
  assert sorted(found) == sorted(expected)
  for step in range(SAVED + 1, LAST + 1):
    for name in ("loss", "grad_norm", "param_norm", "learning_rate", "tokens"):
      assert found[step][name] == pytest.approx(
        expected[step][name], rel=ROUNDING
      )


def test_the_run_is_evaluated(workdir: Path, tmp_path: Path):
  file = tmp_path / "heldout.json"
  arguments = [f"--workdir={workdir}", f"--data={DATASET}", f"--json={file}"]
  assert evaluate.main(arguments) == 0
  (found,) = json.loads(file.read_text())["data"].values()
  report = json.loads((HERE / "heldout.json").read_text())
  (expected,) = report["data"].values()
  assert report["step"] == SAVED
  assert found["sources"].keys() == expected["sources"].keys()
  for name, value in expected["total"].items():
    assert found["total"][name] == pytest.approx(value, rel=ROUNDING), name
