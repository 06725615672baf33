"""LayerNorm and RMSNorm over the last dimension."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute, wide
from xlstm_jax.ranges import ranged


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """A norm over channels.

  Attributes:
    kind: "layer" subtracts the mean, "rms" does not.
    eps: Number added to the variance (mean square).
    scale: How the stored scale w acts: as 1 + w ("offset", starts at 0), as w
      ("direct", starts at 1), or not at all ("none").
    bias: Whether there is a learned bias.
  """

  kind: Literal["layer", "rms"] = "layer"
  eps: float = ranged(1e-5, at_least=0)
  scale: Literal["offset", "direct", "none"] = "offset"
  bias: bool = False


class Norm(nnx.Module):
  """Normalises the last dimension; parameters have the shape `shape`.

  `shape` is (D,) for a block's norm and (H, V) for a norm per head. Heads are
  normalised one by one, and nothing is averaged over time.
  """

  def __init__(
    self,
    cfg: NormConfig,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    self.cfg = cfg
    self.dtype = compute.dtype
    self.of_heads = len(shape) > 1

    def param(init):
      value = init(rngs.params(), shape, compute.param_dtype)
      return nnx.Param(value, axes=axes)

    starts = {"offset": initializers.zeros, "direct": initializers.ones}
    self.scale = param(starts[cfg.scale]) if cfg.scale != "none" else None
    self.bias = param(initializers.zeros) if cfg.bias else None

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` normalised, scaled and shifted in fp32, in the compute dtype."""
    x = wide(x)
    if self.cfg.kind == "layer":
      x = x - self._apart(x.mean(-1, keepdims=True))
    # Two passes: E[x^2] - E[x]^2 cancels to nothing at a large mean.
    variance = jnp.square(x).mean(-1, keepdims=True)
    y = x * self._apart((variance + self.cfg.eps) ** -0.5)
    if self.scale is not None:
      y = y * (wide(self.scale[...]) + (self.cfg.scale == "offset"))
    if self.bias is not None:
      y = y + wide(self.bias[...])
    return y.astype(self.dtype)

  def _apart(self, statistic: jax.Array) -> jax.Array:
    """The statistic of a row, computed in a pass of its own if rows are short.

    For short rows, XLA's fusions of a norm on GPUs (Triton) take twice as long.
    """
    if self.of_heads:
      return jax.lax.optimization_barrier(statistic)
    return statistic


def qk_norm(
  shape: tuple[int, int], *, compute: Compute, rngs: nnx.Rngs
) -> Norm:
  """The RMSNorm of queries or keys per head; `shape` is (H, K)."""
  cfg = NormConfig("rms", 1e-6, "direct")
  return Norm(cfg, shape, ("heads", None), compute=compute, rngs=rngs)
