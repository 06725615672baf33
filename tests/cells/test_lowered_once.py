"""Kernels that a process lowers once, for whatever program calls them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from xlstm_jax.cells import lowered_once as module
from xlstm_jax.cells.lowered_once import lowered_once


@pytest.fixture
def kernel(monkeypatch):
  """A kernel for CPUs, and how often it was traced."""
  monkeypatch.setattr(module, "PLATFORM", "cpu")
  traced = []

  @lowered_once("power", "interpret")
  def product(x_BT, *, others, power, interpret=False):
    traced.append(interpret)
    y_BT = x_BT * others["y"] ** power
    return {"product": y_BT, "sums": [jnp.sum(y_BT, axis=1)]}

  return product, traced


def example(*rows):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(*rows, 3))) for _ in range(2))
  return x, y


def test_programs_share_what_was_lowered(kernel):
  product, traced = kernel
  x, y = example(4)

  @jax.jit
  def one(x, y):
    return product(x, others={"y": y}, power=2)["product"]

  @jax.jit
  def other(x, y):
    found = product(x, others={"y": y}, power=2)
    return found["product"] + product(x, others={"y": y}, power=2)["product"]

  np.testing.assert_allclose(one(x, y), x * y**2, rtol=1e-6)
  np.testing.assert_allclose(other(x, y), 2 * x * y**2, rtol=1e-6)
  assert len(traced) == 1
  product(x, others={"y": y}, power=3)
  product(x[:2], others={"y": y[:2]}, power=2)
  assert len(traced) == 3


@pytest.mark.parametrize("interpret", [False, True])
def test_rows_of_vmap_are_rows_of_the_kernel(kernel, interpret):
  product, traced = kernel
  x, y = example(2, 5, 4)

  def of(x, y):
    return product(x, others={"y": y}, power=2, interpret=interpret)

  found = jax.vmap(jax.vmap(of, (0, None)), (0, None))(x, y[0, 0])
  expected = x * y[0, 0] ** 2
  np.testing.assert_allclose(found["product"], expected, rtol=1e-6)
  np.testing.assert_allclose(
    found["sums"][0], expected.sum(-1), rtol=1e-5, atol=1e-6
  )
  assert set(traced) == {interpret}


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_on_a_mesh_every_device_runs_the_kernel(kernel, remat, check_vma):
  product, traced = kernel
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  x, y = example(8)
  spec = PartitionSpec("data")

  def of(x, y):
    found = product(x, others={"y": y}, power=2)["product"]
    assert jax.typeof(found).mat == jax.typeof(x).mat
    return found

  shared = jax.shard_map(
    jax.checkpoint(of) if remat else of,
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=check_vma,
  )
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(jax.jit(shared)(x, y), x * y**2, rtol=1e-6)
  np.testing.assert_allclose(of(x[:1], y[:1]), (x * y**2)[:1], rtol=1e-6)
  assert len(traced) == 1
