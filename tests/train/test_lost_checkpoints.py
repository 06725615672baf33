"""A run whose newest checkpoints are damaged, or whose data are other ones."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from xlstm_jax import checksums, config, sharding
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import layout
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.optim import OptimConfig
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.train import loop
from xlstm_jax.train import state as states


def prepared(corpus, output, *more):
  arguments = [f"--input={corpus}", f"--output={output}", "--tokenizer=byte"]
  assert prepare.main([*arguments, "--workers=1", *more]) == 0
  return str(output)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  corpus = folder / "text"
  corpus.mkdir()
  for n in range(9):
    (corpus / f"{n}.txt").write_text(f"line {n} of many\n" * 40)
  data = prepared(corpus, folder / "data", "--heldout-fraction=0")
  return RunConfig(
    model=ModelConfig(
      vocab_size=257,
      width=16,
      num_blocks=1,
      mlstm=MLSTMConfig(num_heads=2, round_to=16),
    ),
    data=DataConfig(paths=(data,), context=32),
    optim=OptimConfig(warmup_steps=2),
    compute=Compute(dtype="float32"),
    checkpoint=CheckpointConfig(keep_latest=3, retries=1),
    steps=8,
    save_every=2,
    log_every=1,
    compilation_cache=None,
  )


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "whole"
  assert loop.train(cfg, workdir) == 0
  return workdir


@pytest.fixture
def workdir(whole, tmp_path):
  return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def final_items(workdir, cfg):
  mesh = sharding.make_mesh(cfg.mesh)
  like = states.to_items(
    states.abstract(Definition(cfg.model, cfg.compute), mesh, cfg.optim)
  )
  return Checkpoints(workdir / "checkpoints").restore(cfg.steps, like)


def damage(workdir, step):
  folder = workdir / "checkpoints" / str(step) / "optimizer"
  path = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_run_goes_on_from_the_newest_good_checkpoint(
  whole, workdir, cfg, capsys
):
  damage(workdir, 8)
  damage(workdir, 6)
  assert loop.train(cfg, workdir) == 0
  output = capsys.readouterr().out
  for step in (8, 6):
    assert f"damaged   The checkpoint of step {step} in {workdir}" in output
  assert "start     step 4, batch 4 of the data" in output
  jax.tree.map(
    np.testing.assert_array_equal,
    final_items(workdir, cfg),
    final_items(whole, cfg),
  )
  names = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert names == {"4", "6", "8", "damaged-6", "damaged-8"}


def test_a_run_without_any_good_checkpoint_does_not_begin_anew(workdir, cfg):
  for step in (4, 6, 8):
    damage(workdir, step)
  before = (workdir / "metrics.jsonl").read_bytes()
  with pytest.raises(UserError, match="No good checkpoint is left"):
    loop.train(cfg, workdir)
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_saves_by_the_clock_and_saves_that_are_made_again(
  cfg, tmp_path, monkeypatch, capsys
):
  left = [1]
  write = checksums.write

  def fail(folder, names):
    # The last step has no next one at which its save could be made again.
    if left[0] and folder.name.startswith("4"):
      left[0] -= 1
      raise OSError(28, "No space left on device")
    write(folder, names)

  monkeypatch.setattr(checksums, "write", fail)
  cfg = dataclasses.replace(cfg, save_every=1000, save_minutes=1e-6, steps=4)
  assert loop.train(cfg, tmp_path) == 0
  assert "save      failed (No space left on device)" in capsys.readouterr().out
  assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 3, 4]


def test_other_data_under_the_same_name_are_refused(
  workdir, cfg, tmp_path, capsys
):
  data = pathlib.Path(shutil.copytree(cfg.data.paths[0], tmp_path / "data"))
  moved = dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, paths=(str(data),))
  )
  # The same data elsewhere are the same data.
  config.save(workdir, moved)
  assert loop.train(moved, workdir) == 0
  manifest = json.loads((data / "manifest.json").read_text())
  shutil.rmtree(data)
  (tmp_path / "text").mkdir()
  (tmp_path / "text" / "a.txt").write_text("another text " * 400)
  prepared(tmp_path / "text", data, "--heldout-fraction=0")
  assert json.loads((data / "manifest.json").read_text()) != manifest
  # A run that is finished needs none; what goes on does.
  assert loop.train(moved, workdir) == 0
  moved = dataclasses.replace(moved, steps=10)
  with pytest.raises(
    UserError, match=rf"{data} was prepared again.*accept_changes=true"
  ):
    loop.train(moved, workdir)
  capsys.readouterr()
  accepting = with_data(moved, accept_changes=True, context=64)
  assert loop.train(accepting, workdir) == 0
  told = capsys.readouterr().out
  assert f"accepted  {data} was prepared again since" in told
  assert (
    "; data.context: 32 -> 64: some tokens are read twice in this epoch, and "
    "others never.\n"
  ) in told
  # These are the data that come next from then on.
  again = with_data(accepting, accept_changes=False)
  assert loop.train(again, workdir) == 0
  assert "accepted  " not in capsys.readouterr().out


def test_other_data_under_another_name_are_refused_too(workdir, cfg, tmp_path):
  (tmp_path / "text").mkdir()
  (tmp_path / "text" / "a.txt").write_text("another text " * 400)
  data = prepared(tmp_path / "text", tmp_path / "d", "--heldout-fraction=0")
  other = dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, paths=(data,))
  )
  with pytest.raises(
    UserError, match=rf"{data} was .* is another dataset.*accept_changes=true"
  ):
    loop.train(other, workdir)


def with_data(cfg, **changes):
  changes = {
    name: value(cfg) if callable(value) else value
    for name, value in changes.items()
  }
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))


@pytest.fixture(scope="module")
def mixed(cfg, tmp_path_factory):
  """Of two datasets, after 4 steps of 8 windows."""
  folder = tmp_path_factory.mktemp("mixed")
  (folder / "text").mkdir()
  (folder / "text" / "a.txt").write_text("another text " * 400)
  other = prepared(folder / "text", folder / "d", "--heldout-fraction=0")
  paths = (*cfg.data.paths, other)
  cfg = dataclasses.replace(with_data(cfg, paths=paths), steps=4)
  assert loop.train(cfg, folder / "run") == 0
  return cfg, folder / "run"


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"context": 16}, "data.context: 32 -> 16: some tokens are read twice in"),
    ({"context": 64}, "data.context: 32 -> 64"),
    ({"seed": 5}, "data.seed: 0 -> 5"),
    ({"shuffle": False}, "data.shuffle: True -> False"),
    ({"weights": (1.0, 3.0)}, r"data.weights: None -> \[1.0, 3.0\]"),
    (
      {"paths": lambda cfg: cfg.data.paths[::-1]},
      "data.paths has the same datasets in another order: some tokens are",
    ),
    ({"paths": lambda cfg: cfg.data.paths[:1]}, "has 1 datasets, not 2: some"),
    ({"paths": lambda cfg: cfg.data.paths * 2}, "has 4 datasets, not 2: some"),
    (
      {"paths": lambda cfg: cfg.data.paths[:1] * 2},
      "data was prepared again since the checkpoint, or is another dataset: ",
    ),
    (
      {"seed": 5, "context": 16},
      "data.context: 32 -> 16; data.seed: 0 -> 5: some tokens are",
    ),
  ],
)
def test_whatever_changes_the_tokens_that_come_next_is_refused(
  mixed, changes, told
):
  cfg, workdir = mixed
  before = (workdir / "config.json").read_bytes()
  other = with_data(dataclasses.replace(cfg, steps=6), **changes)
  with pytest.raises(
    UserError, match=rf"other tokens than .*{told}.*accept_changes=true\."
  ):
    loop.train(other, workdir)
  assert (workdir / "config.json").read_bytes() == before


def test_a_batch_size_that_leaves_tokens_out_is_refused(mixed):
  cfg, workdir = mixed
  other = dataclasses.replace(cfg, batch_size=24, steps=6)
  with pytest.raises(
    UserError,
    match=r"batch_size=24 does not divide the 32 windows .* 16 more, of 32 tok",
  ):
    loop.train(other, workdir)


@pytest.mark.parametrize(
  ("changes", "batch_size"),
  [
    ({"threads": 0, "prefetch": 3, "verify": "never"}, 8),
    # Shares are in any unit, and these are those of the tokens.
    ({"weights": lambda cfg: tuple(2.0 * n for n in tokens(cfg))}, 8),
    ({}, 16),
    ({}, 32),
  ],
)
def test_what_changes_no_tokens_needs_no_consent(
  mixed, changes, batch_size, tmp_path, capsys
):
  cfg, workdir = mixed
  shutil.copytree(workdir, tmp_path / "run")
  other = dataclasses.replace(with_data(cfg, **changes), batch_size=batch_size)
  # There is no step left to do.
  assert loop.train(other, tmp_path / "run") == 0
  assert "changed   " in capsys.readouterr().out


def tokens(cfg):
  manifests = map(layout.read_manifest, cfg.data.paths)
  return [manifest.splits["train"].total.tokens for manifest in manifests]


def test_without_shuffling_the_seed_draws_nothing(mixed, tmp_path):
  cfg, workdir = mixed
  shutil.copytree(workdir, tmp_path / "run")
  # As of a run that was begun so.
  unshuffled = with_data(cfg, shuffle=False)
  config.save(tmp_path / "run", unshuffled)
  edit_progress(
    tmp_path / "run", lambda saved: saved["order"].update(shuffle=False)
  )
  assert loop.train(with_data(unshuffled, seed=3), tmp_path / "run") == 0
  with pytest.raises(UserError, match=r"data\.shuffle: False -> True"):
    loop.train(cfg, tmp_path / "run")


def test_checkpoints_of_older_versions_are_of_the_configuration(
  mixed, tmp_path
):
  cfg, workdir = mixed
  shutil.copytree(workdir, tmp_path / "run")
  edit_progress(tmp_path / "run", lambda saved: saved.pop("order"))
  with pytest.raises(UserError, match=r"data\.context: 32 -> 16"):
    loop.train(with_data(cfg, context=16), tmp_path / "run")
  assert (
    loop.train(dataclasses.replace(cfg, log_every=3), tmp_path / "run") == 0
  )


def edit_progress(workdir, edit):
  """Changes what the newest checkpoint says besides its arrays."""
  step = workdir / "checkpoints" / "4"
  path = step / "progress" / "metadata"
  saved = json.loads(path.read_text())
  edit(saved)
  path.write_text(json.dumps(saved))
  names = ["metrics", "optimizer", "params", "progress"]
  checksums.write(epath.Path(step), names)
