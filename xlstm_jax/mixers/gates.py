"""Gate pre-activations of the mLSTM: one scalar per head, step and gate."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute, wide
from xlstm_jax.layers.linear import Linear, soft_cap


class Gates(nnx.Module):
  """Input and forget gate pre-activations from `sources` arrays of channels.

  Weights start at zero. The forget gate's bias starts at 3 to 6 over the heads.

  Args:
    sources: number of arrays that the gates see.
    channels: number of channels of each source.
    axis: logical axis of the channels.
    num_heads: number of heads.
    headwise: whether a head's gates see only that head's slice of the channels.
    cap: soft cap of the pre-activations; None for none.
    input_bias: initial bias of the input gate; None draws it from N(0, 0.1^2).
  """

  def __init__(
    self,
    *,
    sources: int,
    channels: int,
    axis: str,
    num_heads: int,
    headwise: bool,
    cap: float | None,
    input_bias: float | None,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    H = num_heads
    self.cap = cap
    self.heads = H if headwise else None
    if headwise:
      equation, shape = "BTSHE,SHEG->BTGH", (sources, H, channels // H, 2)
      axes = (None, "heads", None, None)
    else:
      equation, shape = "BTSU,SUGH->BTGH", (sources, channels, 2, H)
      axes = (None, axis, None, None)
    self.map = Linear(
      equation,
      shape,
      axes,
      init=initializers.zeros,
      precise=True,
      compute=compute,
      rngs=rngs,
    )
    input_init = (
      initializers.normal(0.1)
      if input_bias is None
      else initializers.constant(input_bias)
    )
    forget_init = initializers.linspace(3.0, 6.0)
    self.bias = nnx.Param(
      jnp.stack(
        [
          init(rngs.params(), (H,), compute.param_dtype)
          for init in (input_init, forget_init)
        ]
      ),
      axes=(None, "heads"),
    )

  def __call__(
    self, *sources_BTU: Float[Array, "B T U"]
  ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Input and forget pre-activations, capped, in fp32."""
    x = jnp.stack(sources_BTU, axis=2)
    if self.heads is not None:
      x = x.reshape(*x.shape[:3], self.heads, -1)
    gates_BTGH = soft_cap(self.map(x) + wide(self.bias[...]), self.cap)
    return gates_BTGH[:, :, 0], gates_BTGH[:, :, 1]
