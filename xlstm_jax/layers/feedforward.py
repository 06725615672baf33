"""The gated feed-forward layer."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.linear import Linear, dropout
from xlstm_jax.ranges import ranged
from xlstm_jax.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "squared_relu": lambda x: jax.nn.relu(x) ** 2,
  "sigmoid": jax.nn.sigmoid,
  "selu": jax.nn.selu,
}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
  """The gated feed-forward layer of post-up-projection blocks.

  Attributes:
    factor: Hidden units per channel, before rounding.
    round_to: The number of hidden units is a multiple of this.
    rounding: "ceil" rounds factor * width up. "floor" is the public PyTorch
      and Hugging Face rule `(int(factor * width + round_to - 1) // round_to)
      * round_to`, which rounds values just above a multiple down.
    activation: Activation of the gate half; "gelu" is the exact (erf) one.
    bias: Whether both projections have biases.
    dropout: Dropout rate of the output; None for the model's.
  """

  factor: float = ranged(1.3, above=0)
  round_to: int = ranged(64, at_least=1)
  rounding: Literal["ceil", "floor"] = "ceil"
  activation: Literal[
    "gelu", "gelu_tanh", "silu", "relu", "squared_relu", "sigmoid", "selu"
  ] = "gelu"
  bias: bool = False
  dropout: float | None = ranged(None, at_least=0, below=1)

  def hidden(self, width: int) -> int:
    """Hidden units at this width."""
    return round_up(self.factor * width, self.round_to, self.rounding)


def round_up(
  size: float, multiple: int, rounding: Literal["ceil", "floor"] = "ceil"
) -> int:
  """`size` as a multiple of `multiple` (see FeedForwardConfig.rounding)."""
  if rounding == "ceil":
    return math.ceil(size / multiple) * multiple
  return int(size + multiple - 1) // multiple * multiple


class FeedForward(nnx.Module):
  """`down(activation(gate(x)) * up(x))`."""

  def __init__(
    self,
    cfg: FeedForwardConfig,
    width: int,
    *,
    num_blocks: int,
    dropout: float,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    hidden = cfg.hidden(width)
    bias = initializers.zeros if cfg.bias else None
    self.cfg = cfg
    self.dropout = dropout if cfg.dropout is None else cfg.dropout
    # Along G: the gate half, then the up half.
    self.up = Linear(
      "BTD,DGF->BTGF",
      (width, 2, hidden),
      ("width", None, "feedforward"),
      init=initializers.small(width),
      bias=bias,
      compute=compute,
      rngs=rngs,
    )
    self.down = Linear(
      "BTF,FD->BTD",
      (hidden, width),
      ("feedforward", "width"),
      init=initializers.wang(width, num_blocks),
      bias=bias,
      compute=compute,
      rngs=rngs,
    )

  def __call__(
    self, x_BTD: Float[Array, "B T D"], *, dropout_key: jax.Array | None = None
  ) -> Float[Array, "B T D"]:
    """The layer's output, without the residual."""
    up_BTGF = constrain(self.up(x_BTD), "batch", "time", None, "feedforward")
    act = ACTIVATIONS[self.cfg.activation]

    # The backward pass keeps only the input of this, and recomputes its steps.
    @jax.checkpoint
    def gated(up_BTGF):
      return act(up_BTGF[..., 0, :]) * up_BTGF[..., 1, :]

    h_BTF = gated(up_BTGF)
    return dropout(self.down(h_BTF), self.dropout, dropout_key)
