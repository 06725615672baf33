"""Token embedding and vocabulary projection."""

from flax import nnx
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.precision import product
from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute
from xlstm_jax.sharding import constrain


class Embedding(nnx.Module):
  """A weight [Z, D] used as a lookup table or as the vocabulary projection."""

  def __init__(
    self, vocab_size: int, width: int, *, compute: Compute, rngs: nnx.Rngs
  ):
    self.dtype = compute.dtype
    self.weight = nnx.Param(
      initializers.small(width)(
        rngs.params(), (vocab_size, width), compute.param_dtype
      ),
      axes=("vocabulary", "width"),
    )

  def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of `tokens`, in the compute dtype.

    They are rounded after the lookup. So the gradient of a row, a sum over all
    its tokens, is summed in the weight's type.
    """
    tokens_BT = constrain(tokens_BT, "looked_up", "time")
    x_BTD = self.weight[...][tokens_BT].astype(self.dtype)
    return constrain(x_BTD, "looked_up", "time", "columns")

  def rows(self) -> Float[Array, "Z D"]:
    """The weight in the compute dtype, for `attend`."""
    return self.weight[...].astype(self.dtype)


def attend(
  weight_ZD: Float[Array, "Z D"], x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T Z"]:
  """Inner products with every row, accumulated and returned in fp32.

  In the backward pass, cotangents are rounded to the weight's type before they
  are multiplied.
  """
  return product("BTD,ZD->BTZ", x_BTD, weight_ZD, weight_ZD.dtype)
