"""Machines for which programs can be compiled without having them."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from jax.experimental import topologies

from xlstm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices that programs are compiled for.

  Attributes:
    name: The name as the user wrote it.
    devices: Descriptions of the devices, on which no array can be put.
    memory: Bytes that a program may use on a device.
    device_memory: Bytes of a device, of which `memory` is a share that the user
      can change.
  """

  name: str
  devices: list[Any]
  memory: int
  device_memory: int


# Bytes that libtpu leaves to a program, as it printed when it refused one that
# was too large.
_TPU_MEMORY = {
  "v5e": int(15.75 * 2**30),
  "v5p": int(95.73 * 2**30),
  "v6e": int(31.24 * 2**30),
}

# Without these, libtpu waits for other processes that use it, asks the network
# what machine this is, and complains that there is no answer.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_SKIP_MDS_QUERY": "true",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_STDERR_LOG_LEVEL": "3",
}

# Dimensions of a slice's torus.
_TPU_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}
_DIMENSIONS = {2: "two", 3: "three"}

_GPUS_PER_NODE = 8

# Variables for the share of a GPU's memory that JAX allocates from; the first
# is the current name.
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class _GPU:
  """What distinguishes GPUs of compute capability 9.0."""

  description: str
  memory: int
  bandwidth: int
  clock_ghz: float


# Memory and bandwidth as the manufacturer states them, in bytes and bytes/s.
_GPUS = {
  "h100": _GPU("NVIDIA H100 80GB HBM3", 85_017_493_504, 3_350 * 10**9, 1.98),
  "h200": _GPU("NVIDIA H200", 150_754_820_096, 4_800 * 10**9, 1.98),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 62914560
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
platform_name: "CUDA"
device_description_str: "{description}"
"""


def machine(topology: str) -> Machine:
  """The machine with a name such as "v5e:16x16", "v5e:16x16*2" or "h200:64".

  Raises:
    UserError: there is no such machine, or its compiler is not installed.
  """
  kind, _, size = topology.partition(":")
  if kind in _TPU_MEMORY:
    slices = re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*)+)(?:\*([1-9]\d*))?", size)
    if slices:
      return _tpus(topology, kind, slices[1], int(slices[2] or 1))
  if kind in _GPUS and re.fullmatch(r"[1-9]\d*", size):
    return _gpus(topology, kind, int(size))
  raise UserError(
    f"The topology {topology!r} is not known; give chips of a TPU slice as "
    f"{', '.join(_TPU_MEMORY)} with the slice's shape, such as v5e:16x16 or "
    "v5p:8x8x8, of two slices v5e:16x16*2, or a number of GPUs as "
    f"{' or '.join(_GPUS)}, such as h200:64."
  )


def _tpus(topology: str, kind: str, shape: str, slices: int) -> Machine:
  dimensions = _TPU_DIMENSIONS[kind]
  if shape.count("x") + 1 != dimensions:
    raise UserError(
      f"The topology {topology!r} is not one of {kind}, whose slices have "
      f"{_DIMENSIONS[dimensions]} dimensions: give it as "
      f"{kind}:{'x'.join(['8'] * dimensions)}."
    )
  _require("libtpu", topology)
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{kind}:{shape}", num_slices=slices
    ).devices
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"There is no TPU slice {topology!r}: {str(error).splitlines()[0]}."
    ) from error
  memory = _TPU_MEMORY[kind]
  return Machine(topology, devices, memory, memory)


def _gpus(topology: str, kind: str, count: int) -> Machine:
  _require("jax_cuda13_plugin", topology)
  per_node = math.gcd(count, _GPUS_PER_NODE)
  gpu = _GPUS[kind]
  devices = topologies.get_topology_desc(
    platform="cuda",
    topology_name=kind,
    target_config=_TARGET.format(**dataclasses.asdict(gpu)),
    topology=f"1x{count // per_node}x{per_node}",
  ).devices
  memory = int(gpu.memory * _fraction())
  return Machine(topology, devices, memory, gpu.memory)


def _fraction() -> float:
  """The share of a GPU's memory that JAX would allocate from."""
  for name in FRACTIONS:
    value = os.environ.get(name)
    if not value:
      continue
    try:
      fraction = float(value)
    except ValueError:
      fraction = 0.0
    if not 0 < fraction <= 1:
      raise UserError(
        f"The environment variable {name} is {value!r}; it must be a number "
        "above 0, at most 1."
      )
    return fraction
  return _FRACTION


def _require(module: str, topology: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise UserError(
      f"Compiling for {topology} needs the package "
      f"{module.replace('_', '-')}, which is not installed: "
      "pip install -c constraints/newest.txt -e '.[plan]'."
    )
