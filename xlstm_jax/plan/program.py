"""The training step of a configuration, compiled for a described machine."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from xlstm_jax import config, metrics, sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.models import counts
from xlstm_jax.models.language_model import Definition
from xlstm_jax.plan.collectives import Traffic, collectives, traffic
from xlstm_jax.plan.machines import Machine
from xlstm_jax.train import kernels, memory
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps

# Values of `Compute.remat`, from nothing recomputed to everything.
REMAT = ("none", "matmuls", "block")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What compiling found; bytes are those of one device.

  Attributes:
    topology: Name of the machine.
    platform: "tpu" or "gpu".
    device_kind: Kind of its devices.
    devices: Number of its devices.
    mesh: Number of devices along each axis.
    batch_size: Rows of a step.
    context: Tokens of a row.
    accumulation: Number of parts of a step.
    remat: What the backward pass recomputes.
    backends: The backend of each cell, by the cell's name.
    kernels: The cells whose backend is a kernel.
    without_kernel: The cells for which no kernel is written on this platform.
    parameters: Number of the model's parameters.
    flops_per_token: FLOPs of the model, forward and backward, without
      recomputation.
    seconds_at_peak: Time of a step if all devices did those FLOPs at their
      peak; None if that is unknown.
    parameter_bytes: Size of the stored parameters.
    optimizer_bytes: Size of the stored moments.
    batch_bytes: Size of the input.
    temporary_bytes: Size of gradients, activations and everything else that
      lives only in the step; None if the compiler gave up.
    program_bytes: Size of the code; None if the compiler gave up.
    peak_bytes: Largest size of all that lives at the same time.
    memory: Memory that a program may use.
    device_memory: Memory of the device, of which `memory` is a share.
    collectives: Communication, by kind.
    compile_seconds: Time to lower and compile on this machine.
  """

  topology: str
  platform: str
  device_kind: str
  devices: int
  mesh: dict[str, int]
  batch_size: int
  context: int
  accumulation: int
  remat: str
  backends: dict[str, str]
  kernels: tuple[str, ...]
  without_kernel: tuple[str, ...]
  parameters: int
  flops_per_token: float
  seconds_at_peak: float | None
  parameter_bytes: int
  optimizer_bytes: int
  batch_bytes: int
  temporary_bytes: int | None
  program_bytes: int | None
  peak_bytes: int
  memory: int
  device_memory: int
  collectives: dict[str, Traffic]
  compile_seconds: float

  @property
  def fits(self) -> bool:
    """Whether the step fits into a device's memory."""
    return self.temporary_bytes is not None and self.peak_bytes <= self.memory


def plan(cfg: RunConfig, machine: Machine) -> Plan:
  """Compiles the step that `train` would run, for the machine.

  Raises:
    UserError: the configuration contradicts itself, or does not fit the
      machine.
  """
  config.validate(cfg, None, len(machine.devices))
  definition = Definition(cfg.model, cfg.compute)
  mesh = sharding.make_mesh(cfg.mesh, machine.devices)
  state = states.abstract(definition, mesh)
  batch = steps.abstract_batch(cfg, mesh)
  tokens = cfg.batch_size * cfg.data.context
  flops = counts.train_flops_per_token(cfg.model, cfg.data.context)
  platform = machine.devices[0].platform
  device_kind = machine.devices[0].device_kind
  peak_flops = metrics.peak_flops(device_kind)
  started = time.monotonic()
  with jax.set_mesh(mesh):
    cells = kernels.cells(cfg, mesh)
    lowered = steps.compiled(definition, cfg, mesh).lower(state, batch)
    found, communication = _compile(lowered)
  return Plan(
    topology=machine.name,
    platform=platform,
    device_kind=device_kind,
    devices=len(machine.devices),
    mesh=dict(mesh.shape),
    batch_size=cfg.batch_size,
    context=cfg.data.context,
    accumulation=cfg.accumulation,
    remat=cfg.compute.remat,
    backends={cell.registry.cell: b.name for cell, b in cells},
    kernels=tuple(cell.registry.cell for cell, b in cells if b.is_kernel),
    without_kernel=tuple(
      cell.registry.cell
      for cell, _ in cells
      if not cell.registry.has_kernel_for(platform)
    ),
    parameters=counts.parameters(cfg.model),
    flops_per_token=flops,
    seconds_at_peak=(
      None
      if peak_flops is None
      else flops * tokens / peak_flops / len(machine.devices)
    ),
    parameter_bytes=bytes_per_device(state.params),
    optimizer_bytes=bytes_per_device(state.moments),
    batch_bytes=bytes_per_device(batch),
    memory=machine.memory,
    device_memory=machine.device_memory,
    collectives=communication,
    temporary_bytes=found.temporary,
    program_bytes=found.program,
    peak_bytes=found.peak,
    compile_seconds=time.monotonic() - started,
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes of a tree of arrays with shardings on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


class _Memory(NamedTuple):
  """Fields of a `Plan`, without their suffix "_bytes"."""

  temporary: int | None
  program: int | None
  peak: int


def _compile(lowered: Any) -> tuple[_Memory, dict[str, Traffic]]:
  """The memory that the compiled step takes, and its collectives."""
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = out_of_memory(str(error))
    if needed is None:
      raise
    return _Memory(None, None, needed), {}
  used = compiled.memory_analysis()
  found = _Memory(
    used.temp_size_in_bytes,
    used.generated_code_size_in_bytes,
    memory.taken(compiled),
  )
  return found, traffic(collectives(compiled.as_text()))


def out_of_memory(message: str) -> int | None:
  """The bytes that a device would need, from a compiler's error message.

  None if the message is about something else, such as VMEM, which a smaller
  batch does not relieve.
  """
  needed = re.search(
    r"Ran out of memory (?:on|in memory space) hbm\b.*?(\d[\d.]*)([KMGT])",
    message,
    re.IGNORECASE,
  )
  if needed is None:
    return None
  return int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))


def search(cfg: RunConfig, machine: Machine) -> Iterator[Plan]:
  """Compiles with larger and larger batches, recomputing as little as possible.

  The batch starts with one row per share of the mesh and accumulation part, and
  doubles until it does not fit. Bisection then finds the largest multiple of
  the first batch that fits. The next policy, which recomputes more, starts with
  the smallest batch that did not fit. So the last plan that fits has the
  largest batch, and among the policies under which it fits, the one that
  recomputes least.
  """
  sizes = dict(
    zip(
      sharding.AXES,
      sharding.mesh_shape(cfg.mesh, len(machine.devices)),
      strict=True,
    )
  )
  rows = sizes["data"] * sizes["fsdp"] * cfg.accumulation
  # Both in units of `rows`.
  fitting, units = 0, 1
  for remat in REMAT:
    compute = dataclasses.replace(cfg.compute, remat=remat)
    too_many = None
    while too_many is None or too_many - fitting > 1:
      found = plan(
        dataclasses.replace(cfg, compute=compute, batch_size=rows * units),
        machine,
      )
      yield found
      if found.fits:
        fitting = units
      else:
        too_many = units
      units = 2 * units if too_many is None else (fitting + too_many) // 2
    units = too_many
