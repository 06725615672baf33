"""Sums of log gates, against NumPy and against cancellation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells.mlstm import gates


@pytest.mark.parametrize("length", [1, 2, 16, 17, 32, 48, 272, 301])
def test_sums(length):
  x = np.random.default_rng(0).integers(-9, 9, (2, length)).astype(np.float32)
  t, s = np.tril_indices(length)
  upto = np.cumsum(x, axis=-1)
  between = upto[:, t] - upto[:, s]
  x = jnp.asarray(x)
  np.testing.assert_array_equal(gates.sums_upto(x), upto)
  np.testing.assert_array_equal(gates.sums_after(x), upto[:, -1:] - upto)
  np.testing.assert_array_equal(gates.sums_between(x)[:, t, s], between)


@pytest.mark.parametrize("length", [513, 1030])
def test_sums_after_in_long_rows(length):
  x = np.random.default_rng(0).integers(-9, 9, (2, length)).astype(np.float32)
  upto = np.cumsum(x, axis=-1)
  ours = gates.sums_after(jnp.asarray(x))
  np.testing.assert_array_equal(ours, upto[:, -1:] - upto)


def test_sums_between_do_not_cancel():
  """A reset of -1e4 leaves the sums beside it exact to float32's rounding."""
  rng = np.random.default_rng(0)
  x = -np.exp(rng.normal(size=(4, 256)))
  x[:, ::40] = -1e4
  x = x.astype(np.float32)
  t, s = np.tril_indices(256, -1)
  upto = np.cumsum(np.float64(x), axis=-1)
  between = upto[:, t] - upto[:, s]
  ours = gates.sums_between(jnp.asarray(x))[:, t, s]
  np.testing.assert_allclose(ours, between, rtol=2e-6)
  naive = np.cumsum(x, axis=-1, dtype=np.float32)
  worst = np.max(np.abs((naive[:, t] - naive[:, s]) / between - 1))
  assert worst > 1e-3


def test_larger_gives_the_past_all_of_the_gradient():
  past, present = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 2.0])
  _, pullback = jax.vjp(gates.larger, past, present)
  dpast, dpresent = pullback(jnp.ones(3))
  np.testing.assert_array_equal(dpast, [0, 1, 1])
  np.testing.assert_array_equal(dpresent, [1, 0, 0])


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_log_gates(input_gate):
  i = jnp.array([[[-120.0], [0.0], [120.0], [5.0]]])
  real = jnp.array([[True, True, True, False]])
  log_i, log_f = gates.log_gates(i, i, real, input_gate=input_gate)
  log_sigmoid = np.array([-120.0, -np.log(2), 0.0])
  expected = np.array([-120.0, 0.0, 120.0])
  if input_gate == "sigmoid":
    expected = log_sigmoid
  np.testing.assert_allclose(log_i[0, :, 0], [*expected, -np.inf], atol=1e-30)
  np.testing.assert_allclose(log_f[0, :, 0], [*log_sigmoid, 0.0], atol=1e-30)


def test_the_largest_gives_all_its_gradient_to_the_first_of_equals():
  x = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -jnp.inf], [2, 1, 0]])
  np.testing.assert_array_equal(gates.largest(x), [3, -jnp.inf, 2])
  grad = jax.grad(lambda x: jnp.sum(gates.largest(x) * jnp.array([1.0, 2, 3])))(
    x
  )
  np.testing.assert_array_equal(grad, [[0, 1, 0], [2, 0, 0], [3, 0, 0]])
