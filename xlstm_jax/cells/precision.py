"""The arithmetic of the cells: where they accumulate and what they multiply.

Gates, their sums and exponents, stabilisers, normalisers and states are kept
in the accumulator type. Only the operands of matrix products are in the type
of the inputs, and what these products sum is again in the accumulator type,
in the backward pass too.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


def accumulator(dtype: DTypeLike) -> jnp.dtype:
  """The type in which values that came in as `dtype` are summed."""
  return jnp.promote_types(dtype, jnp.float32)


def multiplication(dtype: DTypeLike) -> jax.lax.Precision:
  """How matrix products treat operands in `dtype`: as what they are.

  By default accelerators round float32 operands to bfloat16 or TF32.
  """
  if dtype == accumulator(dtype):
    return jax.lax.Precision.HIGHEST
  return jax.lax.Precision.DEFAULT


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(
  spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: DTypeLike
) -> Float[Array, "..."]:
  """`einsum` of two arrays with operands in `dtype` and a wider sum.

  Every letter of `spec` stands in at least two of its three terms. Autodiff
  of an einsum would multiply the wide cotangent by the narrow operand, in the
  wide type; here the cotangent is an operand like any other.
  """
  wide = accumulator(dtype)

  def narrow(x, y):
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(
      spec,
      x,
      y,
      preferred_element_type=wide,
      precision=multiplication(dtype),
    )

  def wide_product(x, y):
    x, y = rounded(x.astype(wide), dtype), rounded(y.astype(wide), dtype)
    return jnp.einsum(spec, x, y)

  if dtype == wide:
    return narrow(x, y)
  # XLA's CPU backend lacks some products of bfloat16 operands with a float32
  # sum ("Unsupported element type for DotThunk::Execute").
  return jax.lax.platform_dependent(x, y, cpu=wide_product, default=narrow)


def rounded(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
  """Rounds to the precision of `dtype`, which a pair of casts need not do."""
  to = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, to.nexp, to.nmant)


def _product_forward(spec, x, y, dtype):
  # The operands are kept as they are multiplied. An empty array remembers
  # the type in which each came.
  kept = (x.astype(dtype), y.astype(dtype), x[:0], y[:0])
  return product(spec, x, y, dtype), kept


def _product_backward(spec, dtype, kept, dz):
  x, y, like_x, like_y = kept
  terms, z_term = spec.split("->")
  x_term, y_term = terms.split(",")
  dx = product(f"{z_term},{y_term}->{x_term}", dz, y, dtype)
  dy = product(f"{x_term},{z_term}->{y_term}", x, dz, dtype)
  return dx.astype(like_x.dtype), dy.astype(like_y.dtype)


product.defvjp(_product_forward, _product_backward)
