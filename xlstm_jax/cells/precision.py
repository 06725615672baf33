"""The precision of the arithmetic inside the cells.

Gates, their sums and exponents, stabilisers, normalisers and states have the
accumulator type. Only the operands of matrix products have the type of the
inputs, and these products sum in the accumulator type. The same holds in the
backward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


def accumulator(dtype: DTypeLike) -> jnp.dtype:
  """The type in which values that came in as `dtype` are summed."""
  return jnp.promote_types(dtype, jnp.float32)


def multiplication(dtype: DTypeLike) -> jax.lax.Precision:
  """The precision with which matrix products keep operands in `dtype` exact.

  By default, accelerators round float32 operands to bfloat16 or TF32.
  """
  if dtype == accumulator(dtype):
    return jax.lax.Precision.HIGHEST
  return jax.lax.Precision.DEFAULT


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(
  spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: DTypeLike
) -> Float[Array, "..."]:
  """`einsum` of two arrays with operands in `dtype` and a wider sum.

  Every letter of `spec` must stand in at least two of its three terms. Autodiff
  of an einsum would multiply the wide cotangent by the narrow operand in the
  wide type. Here the cotangent is rounded like any other operand.
  """
  return multiplied(spec, x, y, dtype)


def multiplied(
  spec: str,
  x: Float[Array, "..."],
  y: Float[Array, "..."],
  dtype: DTypeLike,
  *,
  parts: tuple[int, int] = (1, 1),
) -> Float[Array, "..."]:
  """`product` with plain autodiff, and with operands in 1 or 2 parts.

  An operand in two parts is the sum of two numbers in `dtype`; the second is
  what rounding took from the first. With bfloat16 that gives 16 bits instead of
  8. Each part takes a product of its own.
  """
  wide = accumulator(dtype)

  def narrow(x, y):
    products = [
      jnp.einsum(
        spec,
        x_part.astype(dtype),
        y_part.astype(dtype),
        preferred_element_type=wide,
        precision=multiplication(dtype),
      )
      for x_part in _split(x, dtype, parts[0])
      for y_part in _split(y, dtype, parts[1])
    ]
    return sum(products[1:], products[0])

  def wide_product(x, y):
    x, y = (
      sum(_split(operand.astype(wide), dtype, count))
      for operand, count in zip((x, y), parts, strict=True)
    )
    return jnp.einsum(spec, x, y)

  if dtype == wide:
    return narrow(x, y)
  # XLA's CPU backend lacks some products of bfloat16 operands with a float32
  # sum ("Unsupported element type for DotThunk::Execute").
  return jax.lax.platform_dependent(x, y, cpu=wide_product, default=narrow)


def _split(x, dtype: DTypeLike, count: int):
  """At most `count` arrays of the precision of `dtype` whose sum is x."""
  if x.dtype == dtype:
    return [x]
  parts = []
  for _ in range(count):
    parts.append(rounded(x, dtype))
    x = x - parts[-1]
  return parts


def rounded(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
  """Rounds to the precision of `dtype`; XLA may drop a pair of casts."""
  to = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, to.nexp, to.nmant)


def _product_forward(spec, x, y, dtype):
  # The operands are kept in the type in which they are multiplied. An empty
  # array remembers the type in which each one came.
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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quotient(
  numerator_V: Float[Array, "*rows V"],
  denominator: Float[Array, "*rows"],
  dtype: DTypeLike,
) -> Float[Array, "*rows V"]:
  """A row divided by a number.

  The numerator's cotangent is rounded to `dtype`, because it is an operand of
  the products that made the numerator. The denominator's cotangent is computed
  from the rounded numbers. Where all values are alike the two cancel, and their
  rounding errors have to cancel too.
  """
  del dtype
  return numerator_V / denominator[..., None]


def _quotient_forward(numerator_V, denominator, dtype):
  h_V = quotient(numerator_V, denominator, dtype)
  return h_V, (h_V, denominator)


def _quotient_backward(dtype, kept, dh_V):
  h_V, denominator = kept
  dnumerator_V = rounded(dh_V / denominator[..., None], dtype)
  return dnumerator_V, -jnp.sum(dnumerator_V * h_V, axis=-1)


quotient.defvjp(_quotient_forward, _quotient_backward)
