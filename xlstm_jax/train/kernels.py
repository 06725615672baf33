"""The mLSTM kernel of a run, and a look at it before it trains."""

from typing import Any

import jax
from jax.sharding import Mesh

from xlstm_jax.cells.mlstm import KERNELS, backends, self_test
from xlstm_jax.config import RunConfig
from xlstm_jax.sharding import batch_shards
from xlstm_jax.train.run import Run, say


def check(run: Run) -> None:
  """Compares a kernel with the native form at the run's shapes on a device.

  Whether it was named or "auto" chose it; of a GPU on which "auto" did not, it
  says why.

  Raises:
    UserError: they disagree, or the kernel refuses the device or the shapes.
  """
  if set(run.cfg.model.kinds) == {"slstm"}:
    return
  name = backend(run.cfg, run.mesh)
  if name not in KERNELS:
    if name != run.cfg.compute.mlstm_backend and jax.default_backend() == "gpu":
      reason = backends.left_out(**_cell(run.cfg, run.mesh))
      say(f"kernels   native mLSTM, not pallas_gpu: {reason}")
    return
  mixer = run.cfg.model.memory
  self_test.check(
    name,
    share(run.cfg, run.mesh),
    dtype=run.cfg.compute.dtype,
    chunk=run.cfg.compute.mlstm_chunk,
    input_gate=mixer.input_gate,
    normalize=mixer.normalize,
    eps=mixer.eps,
  )
  say(f"kernels   {name} agrees with the native form on this device")


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
