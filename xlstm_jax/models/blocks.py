"""Residual blocks: a norm and a mixer, then a norm and a feed-forward."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.feedforward import FeedForward
from xlstm_jax.layers.initializers import Depth
from xlstm_jax.layers.norm import Norm
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.kinds import KINDS
from xlstm_jax.sharding import constrain


class Block(nnx.Module):
  """`x + mixer(norm(x))`, then `x + feedforward(norm(x))`.

  Some kinds have no feed-forward. The paper's mLSTM block, for example,
  projects up inside its mixer.

  Args:
    cfg: the model's configuration.
    kind: the block's kind.
    index: the block's index among all blocks; it may be traced.
  """

  def __init__(
    self,
    cfg: ModelConfig,
    kind: str,
    index: int | jax.Array,
    *,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    def norm():
      return Norm(
        cfg.norm, (cfg.width,), ("width",), compute=compute, rngs=rngs
      )

    self.norm = norm()
    self.mixer = KINDS[kind].mixer(
      getattr(cfg, kind),
      cfg.width,
      depth=Depth(index, cfg.num_blocks),
      head_norm=cfg.head_norm,
      dropout=cfg.dropout,
      compute=compute,
      rngs=rngs,
    )
    self.mixer_post_norm = norm() if cfg.post_norm else None
    feeds = cfg.has_feedforward(kind)
    self.feedforward_norm = norm() if feeds else None
    self.feedforward = (
      FeedForward(
        cfg.feedforward,
        cfg.width,
        num_blocks=cfg.num_blocks,
        dropout=cfg.dropout,
        compute=compute,
        rngs=rngs,
      )
      if feeds
      else None
    )
    self.feedforward_post_norm = norm() if feeds and cfg.post_norm else None

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    state: Any = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Any]:
    """The residual stream after the block, and the mixer's state."""
    keys = (None, None)
    if dropout_key is not None:
      keys = jax.vmap(jax.random.split, out_axes=1)(dropout_key)
    y_BTD, state = self.mixer(
      pinned(self.norm(x_BTD)),
      segments_BT=segments_BT,
      state=state,
      dropout_key=keys[0],
    )
    x_BTD = x_BTD + pinned(_normed(self.mixer_post_norm, y_BTD))
    if self.feedforward is not None and self.feedforward_norm is not None:
      y_BTD = self.feedforward(
        pinned(self.feedforward_norm(x_BTD)), dropout_key=keys[1]
      )
      x_BTD = x_BTD + pinned(_normed(self.feedforward_post_norm, y_BTD))
    return pinned(x_BTD), state


def pinned(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """Pins the residual stream's sharding: every device has all channels.

  This is needed at both ends of every weight matmul. If XLA (jax 0.12.0) is
  free to split the result's channels over "tensor", it silently computes
  x[B: data fsdp, F: tensor] @ W[D: fsdp, F: tensor]^T wrongly, as it did in
  backward passes.
  """
  return constrain(x_BTD, "batch", "time", None)


def _normed(norm: Norm | None, x_BTD):
  return x_BTD if norm is None else norm(x_BTD)
