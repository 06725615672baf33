"""The device mesh, and the mesh axes over which each logical axis is split.

The dimensions of arrays are named by logical axes ("batch", "heads", ...). Two
tables map these names to mesh axes, one for activations and one for parameters.
Meshes have Auto axes: the compiler propagates shardings between the points
where `constrain` pins them.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xlstm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")

# Batch rows are spread over both kinds of data parallelism.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "time": ("sequence",),
  "heads": ("tensor",),
  "inner": ("tensor",),
  "feedforward": ("tensor",),
  "vocabulary": ("tensor",),
  # Every device looks up its own columns of the embedding, for the rows of all
  # fsdp devices; these then exchange rows for columns.
  "looked_up": ("data",),
  "columns": ("fsdp",),
}
# Every weight has one dimension for "fsdp". Those with heads, up-projected
# channels, feed-forward units or the vocabulary also have one for "tensor".
PARAMETERS: dict[str, tuple[str, ...]] = {
  "width": ("fsdp",),
  "heads": ("tensor",),
  "inner": ("tensor",),
  "feedforward": ("tensor",),
  "vocabulary": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1, "the rest".

  Attributes:
    data: Number of replicas. Each holds all parameters and a share of the
      batch.
    fsdp: Number of devices that share the batch and split the parameters.
    tensor: Number of devices that split heads, feed-forward units and the
      vocabulary.
    sequence: Number of devices that split time.
    slices: Number of groups of devices that a slower network joins: TPU slices,
      or nodes of one process each. They divide `data`, or `fsdp` if `data`
      cannot be divided; the other axes stay within a group.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1
  slices: int = 1


def mesh_shape(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Sizes of `AXES` on `num_devices` devices.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = [getattr(cfg, axis) for axis in AXES]
  given = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
    raise UserError(
      f"The mesh ({given}) needs sizes of at least 1, of which one may be -1 "
      "for all remaining devices."
    )
  known = math.prod(size for size in sizes if size != -1)
  if num_devices % known or (-1 not in sizes and known != num_devices):
    raise UserError(
      f"The mesh ({given}) does not fit {num_devices} devices: the sizes must "
      f"multiply to {num_devices}; set one of them to -1 for the rest."
    )
  shape = tuple(num_devices // known if size == -1 else size for size in sizes)
  if cfg.slices < 1 or (shape[0] % cfg.slices and shape[1] % cfg.slices):
    raise UserError(
      f"The mesh ({given}) on {num_devices} devices cannot lie on "
      f"slices={cfg.slices}: it must be at least 1 and divide data={shape[0]} "
      f"or fsdp={shape[1]}."
    )
  return shape


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `cfg` over `devices` (all of them by default).

  Raises:
    UserError: the sizes do not fit the devices, or their slices.
  """
  devices = jax.devices() if devices is None else devices
  return Mesh(
    device_grid(cfg, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def device_grid(cfg: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
  """The devices along `AXES`; neighbours in the network are neighbours here."""
  shape = mesh_shape(cfg, len(devices))
  if cfg.slices == 1:
    _refuse_several_slices(devices)
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  spanned = 0 if shape[0] % cfg.slices == 0 else 1
  between = tuple(
    cfg.slices if axis == spanned else 1 for axis in range(len(AXES))
  )
  within = tuple(n // m for n, m in zip(shape, between, strict=True))
  of_slice = collections.Counter(getattr(d, "slice_index", 0) for d in devices)
  of_process = collections.Counter(d.process_index for d in devices)
  whole = [len(devices) // cfg.slices] * cfg.slices
  if whole not in ([*of_slice.values()], [*of_process.values()]):
    raise UserError(
      f"config.mesh.slices is {cfg.slices}, but the {len(devices)} devices "
      f"are in {len(of_slice)} slices and {len(of_process)} processes: set it "
      "to the number of slices, or of nodes with one process each."
    )
  return mesh_utils.create_hybrid_device_mesh(
    within,
    between,
    devices,
    process_is_granule=[*of_slice.values()] != whole,
  )


def _refuse_several_slices(devices: Sequence[Any]) -> None:
  """Refuses several TPU slices, over which such a mesh would split any axis.

  GPUs need no such check: they are in the order of their nodes, so only the
  outermost axes leave a node.
  """
  slices = {
    getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"
  }
  if len(slices) > 1:
    raise UserError(
      f"config.mesh.slices is 1, but the {len(devices)} TPU devices are in "
      f"{len(slices)} slices, which a slower network joins: set "
      f"mesh.slices={len(slices)}, so that one axis alone crosses it."
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's sharding to the current mesh, if there is one.

  Args:
    x: any array.
    *axes: for each dimension of `x`, a name from `ACTIVATIONS` or None.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = _spec(mesh, ACTIVATIONS, axes, x.shape)
  return jax.lax.with_sharding_constraint(x, spec)


def shardings(mesh: Mesh, axes: Any, abstract: Any) -> Any:
  """Shardings of a parameter tree.

  Args:
    mesh: the devices.
    axes: a tree of tuples of logical axis names, as from `Definition.axes`.
    abstract: the same tree with arrays or `jax.ShapeDtypeStruct`.
  """
  return jax.tree.map(
    lambda names, x: NamedSharding(
      mesh, _spec(mesh, PARAMETERS, names, x.shape)
    ),
    axes,
    abstract,
    is_leaf=_is_axes,
  )


def on_mesh(
  cell: Callable[..., Any], *args: Any, axes: tuple, out_axes: Any
) -> Any:
  """`cell(*args)`, where each device computes the rows and heads that it holds.

  If this were left to the compiler, it would gather a kernel's operands, and
  the reshapes around it, on every device. Nothing is communicated inside,
  except by a cell that is given the `time_axis` of its tokens or asks
  `split_over`.

  Args:
    cell: a function that works on any slice along the logical axes in `axes`.
      Its other dimensions must be whole, and are gathered if they are not.
    *args: arrays, trees of arrays, or None.
    axes: the logical axes of `args`, in the same trees. If "time" is among
      them, the cell has to know the `time_axis`.
    out_axes: the logical axes of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return cell(*args)
  specs = jax.tree.map(
    lambda names, x: _spec(mesh, ACTIVATIONS, names, x.shape),
    axes,
    args,
    is_leaf=_is_axes,
  )
  placed = {
    name: place
    for names, spec in zip(
      jax.tree.leaves(axes, is_leaf=_is_axes),
      jax.tree.leaves(specs, is_leaf=_is_spec),
      strict=True,
    )
    for name, place in zip(names, spec, strict=True)
  }
  out_specs = jax.tree.map(
    lambda names: PartitionSpec(*(placed.get(name) for name in names)),
    out_axes,
    is_leaf=_is_axes,
  )
  return jax.shard_map(
    cell, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
  )(*args)


def time_axis(length: int) -> str | None:
  """The mesh axis over which `on_mesh` splits `length` tokens, if any.

  The devices along it hold consecutive stretches of equal length.
  """
  return next(iter(split_over("time", length)), None)


def split_over(name: str, size: int) -> tuple[str, ...]:
  """The mesh axes over which `on_mesh` splits a dimension of that size.

  Args:
    name: a name from `ACTIVATIONS`.
    size: size of the dimension.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return () if mesh.empty else _split(mesh, ACTIVATIONS, name, size)


def from_before(tree: Any, axis_name: str, distance: int = 1) -> Any:
  """The tree of the device `distance` places before this one.

  The first devices, which have none before them, get zeros. For use inside
  `on_mesh`.
  """
  size = jax.lax.axis_size(axis_name)
  pairs = [(at, at + distance) for at in range(size - distance)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


def of_holder(tree: Any, holds_B: jax.Array, axis_name: str) -> Any:
  """Each row from the one device on which `holds_B` is true for it.

  For use inside `on_mesh`, with arrays [B, ...].
  """

  def held(x):
    mine = holds_B.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.lax.psum(jnp.where(mine, x, 0), axis_name)

  return jax.tree.map(held, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of [B, T]: rows over data and fsdp, time over sequence."""
  return NamedSharding(
    mesh, PartitionSpec(ACTIVATIONS["batch"], ACTIVATIONS["time"])
  )


def batch_shards(mesh: Mesh) -> int:
  """The number of parts into which the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def _is_axes(node) -> bool:
  """Whether `node` names the dimensions of one array."""
  return type(node) is tuple and all(
    name is None or isinstance(name, str) for name in node
  )


def _is_spec(node) -> bool:
  return isinstance(node, PartitionSpec)


def _spec(mesh, rules, names, shape) -> PartitionSpec:
  """The partition of an array; a dimension that does not divide stays whole."""
  if len(names) != len(shape):
    raise ValueError(f"axes {names} do not name the dimensions of {shape}")
  return PartitionSpec(
    *(
      _split(mesh, rules, name, size) or None
      for name, size in zip(names, shape, strict=True)
    )
  )


def _split(mesh, rules, name, size) -> tuple[str, ...]:
  """The mesh axes over which a dimension is split."""
  mesh_axes = rules.get(name, ())
  parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
  return mesh_axes if parts > 1 and size % parts == 0 else ()
