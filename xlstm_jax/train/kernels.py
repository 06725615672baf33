"""The compiled step of a run, and a look at its kernel before it trains."""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from xlstm_jax.cells.mlstm import KERNELS, backends, self_test
from xlstm_jax.config import RunConfig
from xlstm_jax.sharding import batch_shards
from xlstm_jax.train import memory
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps
from xlstm_jax.train.run import Run, say


def checked_step(run: Run) -> Any:
  """The compiled training step, on the current mesh, if it fits and is right.

  A kernel, whether it was named or "auto" chose it, is compared with the native
  form at the run's shapes on a device. That takes an instant, but the program
  has to be compiled: it is while XLA compiles the step. Of a GPU on which
  "auto" chose no kernel it says why.

  Raises:
    UserError: they disagree, the kernel refuses the device or the shapes, or
      the step takes more memory than a device has.
  """
  prepare = _comparison(run)
  lowered = steps.compiled(run.definition, run.cfg, run.mesh).lower(
    states.abstract(run.definition, run.mesh),
    steps.abstract_batch(run.cfg, run.mesh),
  )
  if prepare is None:
    compiled = lowered.compile()
    memory.check(compiled)
    return compiled
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    prepared = thread.submit(prepare)
    compiled = lowered.compile()
    memory.check(compiled)
    prepared.result()()
  name = backend(run.cfg, run.mesh)
  say(f"kernels   {name} agrees with the native form on this device")
  return compiled


def _comparison(run: Run) -> Callable[[], Callable[[], None]] | None:
  """What prepares the comparison of the run's kernel, if it has one."""
  if set(run.cfg.model.kinds) == {"slstm"}:
    return None
  name = backend(run.cfg, run.mesh)
  if name not in KERNELS:
    if name != run.cfg.compute.mlstm_backend and jax.default_backend() == "gpu":
      reason = backends.left_out(**_cell(run.cfg, run.mesh))
      say(f"kernels   native mLSTM, not pallas_gpu: {reason}")
    return None
  mixer = run.cfg.model.memory
  return functools.partial(
    self_test.prepared,
    name,
    share(run.cfg, run.mesh),
    dtype=run.cfg.compute.dtype,
    chunk=run.cfg.compute.mlstm_chunk,
    input_gate=mixer.input_gate,
    normalize=mixer.normalize,
    eps=mixer.eps,
  )


def backend(cfg: RunConfig, mesh: Mesh) -> str:
  """The mLSTM backend of a training step, on the current mesh's device."""
  return backends.choice(cfg.compute.mlstm_backend, **_cell(cfg, mesh))


def _cell(cfg: RunConfig, mesh: Mesh) -> dict[str, Any]:
  """What the choice of a backend depends on."""
  shape = share(cfg, mesh)
  return {
    "time": shape.T,
    "dtype": cfg.compute.dtype,
    "key_dim": shape.K,
    "value_dim": shape.V,
    "chunk": cfg.compute.mlstm_chunk,
  }


def share(cfg: RunConfig, mesh: Mesh) -> self_test.Shape:
  """What one device computes of a part of a step."""
  mixer = cfg.model.memory
  K, V = mixer.head_channels(cfg.model.width)
  return self_test.Shape(
    B=cfg.batch_size // cfg.accumulation // batch_shards(mesh),
    T=cfg.data.context // mesh.shape["sequence"],
    H=mixer.num_heads // mesh.shape["tensor"],
    K=K,
    V=V,
  )
