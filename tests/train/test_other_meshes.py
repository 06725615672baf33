"""A run that goes on on other devices is the run that stayed."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from small_run import EXPERIMENT, final_items, prepared
from tools.trajectory import trajectory

from xlstm_jax import config
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import feed, loop

STEPS, SAVED = 8, 4


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  data = prepared(folder, "data", "--tokenizer=byte")
  path = folder / "experiment.py"
  path.write_text(EXPERIMENT)
  cfg = config.from_experiment(str(path), [f"--config.data.paths={data}"])
  return dataclasses.replace(
    cfg,
    mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    steps=STEPS,
    save_every=SAVED,
    eval_every=None,
    compilation_cache=None,
  )


@pytest.fixture
def read(monkeypatch):
  """Numbers and tokens of the batches that a run reads, as they come."""
  found, following = [], feed.Feed.next

  def noting(self, **options):
    batch = following(self, **options)
    found.append(jax.tree.map(np.asarray, batch))
    return batch

  monkeypatch.setattr(feed.Feed, "next", noting)
  return found


@pytest.mark.slow
def test_any_mesh_continues_a_run(cfg, tmp_path, read, monkeypatch):
  assert loop.train(cfg, tmp_path / "whole") == 0
  whole, batches = trajectory(tmp_path / "whole"), list(read)
  items = final_items(tmp_path / "whole", cfg)
  devices = jax.devices()
  for mesh in (
    MeshConfig(data=1),
    MeshConfig(data=2),
    MeshConfig(data=1, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
  ):
    count = mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence
    workdir = tmp_path / f"on_{count}"
    shutil.copytree(tmp_path / "whole", workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    read.clear()
    with monkeypatch.context() as patched:
      patched.setattr(jax, "devices", lambda n=count: devices[:n])
      patched.setattr(jax, "device_count", lambda n=count: n)
      assert loop.train(dataclasses.replace(cfg, mesh=mesh), workdir) == 0
    for ours, theirs in zip(read, batches[SAVED:], strict=True):
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for ours, theirs in zip(trajectory(workdir), whole, strict=True):
      assert ours == pytest.approx(theirs, rel=2e-5)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
      final_items(workdir, cfg),
      items,
    )
