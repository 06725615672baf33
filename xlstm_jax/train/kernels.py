"""A look at the kernel that was chosen, before it trains."""

from xlstm_jax.cells.mlstm import KERNELS, self_test
from xlstm_jax.sharding import batch_shards
from xlstm_jax.train.run import Run, say


def check(run: Run) -> None:
  """Compares a kernel with the native form at the run's shapes on a device.

  Raises:
    UserError: they disagree, or the kernel refuses the device or the shapes.
  """
  backend = run.cfg.compute.mlstm_backend
  if backend not in KERNELS or set(run.cfg.model.kinds) == {"slstm"}:
    return
  mixer = run.cfg.model.memory
  self_test.check(
    backend,
    share(run),
    dtype=run.cfg.compute.dtype,
    chunk=run.cfg.compute.mlstm_chunk,
    input_gate=mixer.input_gate,
    normalize=mixer.normalize,
    eps=mixer.eps,
  )
  say(f"kernels   {backend} agrees with the native form on this device")


def share(run: Run) -> self_test.Shape:
  """What one device computes of a part of a step."""
  cfg, mesh = run.cfg, run.mesh.shape
  mixer = cfg.model.memory
  K, V = mixer.head_channels(cfg.model.width)
  return self_test.Shape(
    B=cfg.batch_size // cfg.accumulation // batch_shards(run.mesh),
    T=cfg.data.context // mesh["sequence"],
    H=mixer.num_heads // mesh["tensor"],
    K=K,
    V=V,
  )
