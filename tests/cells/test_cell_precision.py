"""Where the cells round, and where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells.precision import accumulator, product


@pytest.mark.parametrize(
  ("dtype", "wide"),
  [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_accumulator(dtype, wide):
  with jax.enable_x64(True):
    assert accumulator(dtype) == wide


def rounded(x):
  return np.float64(x.astype(jnp.bfloat16))


@pytest.mark.parametrize("narrow_input", [False, True])
def test_products_round_their_operands_alone(narrow_input):
  """Forward and backward: the cotangent is an operand, sums are float32."""
  rng = np.random.default_rng(0)
  x, y, dz = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((2, 5, 3, 64), (2, 3, 64, 6), (2, 5, 3, 6))
  )
  if narrow_input:
    x = x.astype(jnp.bfloat16)

  @jax.jit
  def run(x, y, dz):
    spec = "BTHK,BHKV->BTHV"
    z, pullback = jax.vjp(lambda x, y: product(spec, x, y, jnp.bfloat16), x, y)
    return z, *pullback(dz)

  z, dx, dy = run(x, y, dz)
  x_, y_, dz_ = rounded(x), rounded(y), rounded(dz)
  exact = np.einsum("bthk,bhkv->bthv", x_, y_)
  np.testing.assert_allclose(z, exact, atol=1e-5)
  assert (z.dtype, dx.dtype, dy.dtype) == ("float32", x.dtype, "float32")
  dx_ = np.einsum("bthv,bhkv->bthk", dz_, y_)
  dy_ = np.einsum("bthv,bthk->bhkv", dz_, x_)
  np.testing.assert_allclose(dy, dy_, atol=1e-5)
  np.testing.assert_allclose(
    np.float64(dx), dx_, **({"rtol": 2**-8} if narrow_input else {"atol": 1e-5})
  )
