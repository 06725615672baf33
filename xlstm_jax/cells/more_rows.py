"""Kernels under `jax.vmap`: what it maps over are more batch rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def more_rows(kernel: Callable) -> Callable:
  """Decorates a kernel whose arrays, and results, have rows in front.

  Both may be trees. Arrays go by place; what goes by name is static.
  """

  @functools.wraps(kernel)
  def call(*arrays: Any, **static: Any) -> Any:
    leaves, tree = jax.tree.flatten(arrays)

    @jax.custom_batching.custom_vmap
    def rows(*leaves):
      return kernel(*jax.tree.unflatten(tree, leaves), **static)

    @rows.def_vmap
    def _mapped(size, batched, *leaves):
      wide = (
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip(leaves, batched, strict=True)
      )
      results = rows(*(x.reshape(-1, *x.shape[2:]) for x in wide))
      results = jax.tree.map(
        lambda y: y.reshape(size, -1, *y.shape[1:]), results
      )
      return results, jax.tree.map(lambda _: True, results)

    return rows(*leaves)

  return call
