"""Every private or experimental name of JAX and Orbax that is used here.

A new version may rename any of them, and tests/test_jax_internals.py says which
one it was. Those of kernels are in cells/*_internals.py. JAX is
imported by the functions, as `machine` uses a name without it.
"""

import os
from collections.abc import Sequence
from typing import Any

# The module in which JAX starts a platform. JAX has no class of errors for a
# device that is not there; tracebacks with this module are known by it.
STARTS_BACKENDS = "jax._src.xla_bridge"

# Parts of the names of the barriers at which Orbax's writing threads wait, in
# this order. Orbax offers to replace its barriers, but not to tell them apart.
WRITING_BARRIERS = ("async_write_complete", "async_commit_complete")


def coordination_client() -> Any:
  """The client of the coordination service; None for a process alone.

  Its key-value store and barriers work while devices hang, and have no public
  name.
  """
  from jax._src import distributed

  return distributed.global_state.client


def is_coordinator() -> bool:
  """Whether this is the first of several processes.

  The public `jax.process_index` asks the devices, which may hang.
  """
  from jax._src import distributed

  return distributed.global_state.process_id == 0 and (
    distributed.global_state.client is not None
  )


def detect_processes(
  *, timeout_seconds: int
) -> tuple[str | None, int | None, int | None]:
  """Coordinator, number of processes and index, as a launcher set them.

  `jax.distributed.initialize` would find this out and keep it to itself.
  """
  from jax._src.clusters import ClusterEnv

  # Devices are left to `initialize`.
  address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
    coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
    num_processes=None,
    process_id=None,
    local_device_ids=[],
    cluster_detection_method=None,
    initialization_timeout=timeout_seconds,
  )
  return address, count, index


def broadcast_from_first(value: Any) -> Any:
  """An array of the first process, on all of them; only here is it public."""
  from jax.experimental import multihost_utils

  return multihost_utils.broadcast_one_to_all(value)


def device_mesh(shape: Sequence[int], devices: Sequence[Any]) -> Any:
  """Devices in a grid; `jax.make_mesh` cannot split physical axes of a TPU."""
  from jax.experimental import mesh_utils

  return mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )


def hybrid_device_mesh(
  within: Sequence[int],
  between: Sequence[int],
  devices: Sequence[Any],
  *,
  process_is_granule: bool,
) -> Any:
  """A grid of slices or nodes, each a grid; only here is it public."""
  from jax.experimental import mesh_utils

  return mesh_utils.create_hybrid_device_mesh(
    within, between, devices, process_is_granule=process_is_granule
  )


def topology_devices(platform: str, name: str, **options: Any) -> list[Any]:
  """Devices to compile for that are not there; only here are they public."""
  from jax.experimental import topologies

  found = topologies.get_topology_desc(
    platform=platform, topology_name=name, **options
  )
  return found.devices
