"""What the step communicates on TPUs, from programs compiled without one."""

import functools

import jax
import pytest
from jax.experimental import topologies

from xlstm_jax import sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models import counts
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.plan.collectives import collectives
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps

pytestmark = pytest.mark.slow


@pytest.fixture
def topology(monkeypatch):
  """Of a TPU, which libtpu describes on any machine, and more than once."""
  pytest.importorskip("libtpu")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  return functools.partial(topologies.get_topology_desc, platform="tpu")


def program(cfg: RunConfig, devices):
  definition = Definition(cfg.model, cfg.compute)
  mesh = sharding.make_mesh(cfg.mesh, devices)
  with jax.set_mesh(mesh):
    return (
      steps.compiled(definition, cfg, mesh)
      .lower(
        states.abstract(definition, mesh, cfg.optim),
        steps.abstract_batch(cfg, mesh),
      )
      .compile()
    )


def test_gradients_are_reduce_scattered_under_fsdp(topology):
  """All but norms, biases and gates, which are no 2 % of the parameters.

  And but the weight of the vocabulary projection: libtpu makes an all-reduce
  of its sum, also where it is told to scatter it.

  A reduce-scatter is a ring of permutes around the product whose partial sums
  it adds up, or an all-reduce fused with the slice that a device keeps.
  """
  cfg = RunConfig(
    model=ModelConfig(
      vocab_size=1024,
      width=512,
      num_blocks=2,
      mlstm_block="large",
      mlstm_large=MLSTMLargeConfig(num_heads=4),
    ),
    data=DataConfig(context=512),
    mesh=MeshConfig(data=1, fsdp=8),
    compute=Compute(remat="block"),
    batch_size=16,
  )
  devices = topology(topology_name="v5e:2x4").devices
  found = collectives(program(cfg, devices).as_text())
  projection = ("bf16", (cfg.model.vocab_size, cfg.model.width))
  whole = [
    c for c in found if c.kind == "all-reduce" and c.arrays != (projection,)
  ]
  weights = 4 * counts.parameters(cfg.model)
  assert sum(c.bytes for c in whole) < 0.02 * weights
  assert any(c.kind == "collective-permute" for c in found)


def test_slices_are_joined_by_the_data_axis_alone(topology):
  devices = topology(topology_name="v5e:2x2", num_slices=2).devices
  grid = sharding.device_grid(
    MeshConfig(data=2, fsdp=2, tensor=2, slices=2), devices
  )
  of_slice = [{d.slice_index for d in part.flat} for part in grid]
  assert of_slice == [{0}, {1}]
