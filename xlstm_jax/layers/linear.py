"""Linear maps, each defined by its einsum."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from xlstm_jax.cells.precision import multiplication
from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute, wide


class Linear(nnx.Module):
  """`einsum(equation, x, weight) + bias`.

  Args:
    equation: an einsum such as "BTD,DGU->BTGU", in which the weight's letters
      name its dimensions.
    shape: the weight's shape.
    axes: logical axis names of the weight's dimensions.
    init: initialiser of the weight.
    bias: initialiser of the bias, whose dimensions are the weight's that the
      output has; None for no bias.
    precise: whether operands and result are fp32, as gates need
      (`layers.compute`).
  """

  def __init__(
    self,
    equation: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    init: initializers.Initializer,
    bias: initializers.Initializer | None = None,
    precise: bool = False,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    operands, result = equation.split("->")
    _, names = operands.split(",")
    letters = dict(zip(names, zip(shape, axes, strict=True), strict=True))
    out = [letters[letter] for letter in result if letter in letters]
    self.equation = equation
    self.precise = precise
    self.dtype = compute.dtype

    def param(init, shape, axes):
      value = init(rngs.params(), shape, compute.param_dtype)
      return nnx.Param(value, axes=axes)

    self.weight = param(init, shape, axes)
    self.bias = None if bias is None else param(bias, *zip(*out, strict=True))

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The map of `x`, in the compute dtype (fp32 if `precise`)."""
    x = wide(x) if self.precise else x.astype(self.dtype)
    weight = self.weight[...].astype(x.dtype)
    y = self.product(x, weight)
    if self.bias is None:
      return y
    # In fp32, so that the gradient of the bias is summed in fp32.
    return (wide(y) + wide(self.bias[...])).astype(y.dtype)

  def product(self, x: jax.Array, weight: jax.Array, /) -> jax.Array:
    """The einsum of operands of one dtype."""
    return jnp.einsum(
      self.equation, x, weight, precision=multiplication(x.dtype)
    )


def dropout(
  x: Float[Array, "..."], rate: float, keys_B: jax.Array | None
) -> Float[Array, "..."]:
  """Zeroes a share `rate` of `x` and scales the rest; off if `keys_B` is None.

  Every row has a key of its own, so its mask depends on no other row.
  """
  if keys_B is None or rate == 0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(
    keys_B
  )
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
  """`cap * tanh(x / cap)`, or `x` if there is no cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)
