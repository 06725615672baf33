"""The mesh, and which dimension lies on which of its axes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from xlstm_jax import sharding
from xlstm_jax.errors import UserError
from xlstm_jax.sharding import MeshConfig


@pytest.mark.parametrize(
  ("cfg", "shape"),
  [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(data=2, fsdp=-1), (2, 4, 1, 1)),
    (MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), (1, 2, 2, 2)),
  ],
)
def test_the_rest_of_the_devices_goes_where_asked(cfg, shape):
  assert sharding.mesh_shape(cfg, 8) == shape
  assert tuple(sharding.make_mesh(cfg).shape.values()) == shape


@pytest.mark.parametrize(
  "cfg",
  [
    MeshConfig(data=3),
    MeshConfig(data=4),
    MeshConfig(data=-1, fsdp=-1),
    MeshConfig(data=0),
    MeshConfig(data=-1, tensor=16),
  ],
)
def test_a_mesh_that_does_not_fit_says_so(cfg):
  with pytest.raises(UserError, match=f"data={cfg.data}, .* -1"):
    sharding.mesh_shape(cfg, 8)


def devices_of(slices, processes, number=16, platform="cpu"):
  """What a mesh asks of devices: none of these exist."""
  return [
    types.SimpleNamespace(
      id=n,
      platform=platform,
      device_kind="cpu",
      slice_index=n * slices // number,
      process_index=n * processes // number,
    )
    for n in range(number)
  ]


@pytest.mark.parametrize(
  ("cfg", "slices", "processes"),
  [
    (MeshConfig(data=4, fsdp=2, tensor=2, slices=2), 2, 4),
    # Nodes, on a platform that knows no slices.
    (MeshConfig(data=4, tensor=4, slices=4), 1, 4),
    (MeshConfig(data=1, fsdp=8, sequence=2, slices=4), 4, 1),
  ],
)
def test_only_one_axis_leaves_a_slice(cfg, slices, processes):
  devices = devices_of(slices, processes)
  grid = sharding.device_grid(cfg, devices)
  assert sorted(d.id for d in grid.flat) == list(range(16))
  granule = np.vectorize(lambda d: d.id * cfg.slices // 16)(grid)
  spanned = 0 if cfg.data > 1 else 1
  of_axis = np.moveaxis(granule, spanned, 0).reshape(grid.shape[spanned], -1)
  # Along the one axis slices follow one another, across it nothing changes.
  assert (of_axis == of_axis[:, :1]).all()
  assert (np.diff(of_axis[:, 0]) >= 0).all()
  assert set(of_axis[:, 0]) == set(range(cfg.slices))


@pytest.mark.parametrize(
  ("cfg", "message"),
  [
    (MeshConfig(slices=4), "slices is 4, but .* in 2 slices and 8 processes"),
    (MeshConfig(data=2, tensor=8, slices=4), r"divide data=2 or fsdp=1"),
    (MeshConfig(slices=0), "slices=0: it must be at least 1"),
  ],
)
def test_slices_that_are_not_there_are_an_error(cfg, message):
  with pytest.raises(UserError, match=message):
    sharding.device_grid(cfg, devices_of(2, 8))


def test_slices_that_are_not_asked_for_are_an_error():
  tpus = devices_of(2, 8, platform="tpu")
  with pytest.raises(UserError, match=r"16 TPU .* 2 slices.* mesh\.slices=2,"):
    sharding.device_grid(MeshConfig(), tpus)
  # Nodes of GPUs, which JAX calls slices as well, are joined in order.
  nodes = devices_of(2, 2, platform="gpu")
  grid = sharding.device_grid(MeshConfig(data=2, fsdp=8), nodes)
  assert [d.id for d in grid.flat] == list(range(16))


def test_parameters_are_split_where_their_axes_say():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  axes = {"up": (None, "width", "inner"), "odd": ("vocabulary", "width")}
  shapes = {
    "up": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32),
    "odd": jax.ShapeDtypeStruct((257, 4), jnp.float32),
  }
  found = sharding.shardings(mesh, axes, shapes)
  assert found["up"].spec == PartitionSpec(None, ("fsdp",), ("tensor",))
  # 257 rows cannot be halved: they stay whole.
  assert found["odd"].spec == PartitionSpec(None, ("fsdp",))


def test_batches_are_split_over_both_kinds_of_data_parallelism():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
  x = jax.device_put(jnp.zeros((8, 6)), sharding.batch_sharding(mesh))
  assert x.addressable_shards[0].data.shape == (2, 3)
  assert sharding.batch_shards(mesh) == 4
  whole = jax.device_put(x, sharding.replicated(mesh))
  assert whole.addressable_shards[0].data.shape == (8, 6)


def test_constrain_needs_no_mesh_and_obeys_the_one_there_is():
  x = jnp.zeros((8, 4, 6))
  assert sharding.constrain(x, "batch", "time", None) is x
  mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: sharding.constrain(x, "batch", None, "heads"))(x)
  assert y.addressable_shards[0].data.shape == (2, 4, 3)


def test_every_dimension_must_be_named():
  mesh = sharding.make_mesh(MeshConfig())
  with pytest.raises(ValueError, match="do not name"):
    sharding.shardings(mesh, {"w": ("width",)}, {"w": jnp.zeros((2, 2))})
