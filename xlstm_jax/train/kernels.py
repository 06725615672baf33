"""Compiles the step of a run, and checks its kernels before it trains."""

import concurrent.futures
from typing import Any

from jax.sharding import Mesh

from xlstm_jax.cells.backends import AUTO, Backend, Cell, Share
from xlstm_jax.config import RunConfig
from xlstm_jax.runtime.output import say
from xlstm_jax.sharding import batch_shards
from xlstm_jax.train import memory
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps
from xlstm_jax.train.run import Run


def checked_step(run: Run) -> Any:
  """The compiled training step on the current mesh, checked before use.

  Each kernel, whether it was named or chosen by "auto", is compared with the
  native form at the run's shapes on a device. That takes an instant, but its
  program has to be compiled, which happens while XLA compiles the step. If
  "auto" passes over a kernel for this platform, the reason is printed.

  Raises:
    UserError: a kernel disagrees with the native form, or refuses the device or
      the shapes; or the step takes more memory than a device has.
  """
  kernels = _kernels(run)
  lowered = steps.compiled(run.definition, run.cfg, run.mesh).lower(
    states.abstract(run.definition, run.mesh),
    steps.abstract_batch(run.cfg, run.mesh),
  )
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    comparisons = [
      thread.submit(cell.prepare, backend.name) for cell, backend in kernels
    ]
    compiled = lowered.compile()
    memory.check(compiled)
    for (cell, backend), comparison in zip(kernels, comparisons, strict=True):
      comparison.result()()
      name = f"{cell.registry.cell} backend {backend.name}"
      say(f"kernels   {name} agrees with the native form on this device")
  return compiled


def _kernels(run: Run) -> list[tuple[Cell, Backend]]:
  """The cells of the run that kernels compute, with their kernels."""
  found = []
  for cell, backend in cells(run.cfg, run.mesh):
    registry = cell.registry
    if backend.is_kernel:
      found.append((cell, backend))
    elif getattr(run.cfg.compute, registry.setting) == AUTO:
      for name, reason in registry.passed_over(cell.shapes).items():
        say(f"kernels   native {registry.cell}, not {name}: {reason}")
  return found


def cells(cfg: RunConfig, mesh: Mesh) -> list[tuple[Cell, Backend]]:
  """The cells of a training step, and their backends on the current mesh.

  Raises:
    UserError: the configuration names a backend that cannot compute them.
  """
  share = Share(
    B=cfg.batch_size // cfg.accumulation // batch_shards(mesh),
    T=cfg.data.context // mesh.shape["sequence"],
    width=cfg.model.width,
    tensor=mesh.shape["tensor"],
  )
  found = []
  for row, mixer in cfg.model.kinds_used.values():
    if row.cell is not None:
      cell = row.cell(mixer, share, cfg.compute)
      name = getattr(cfg.compute, cell.registry.setting)
      found.append((cell, cell.registry.choose(name, cell.shapes)))
  return found
