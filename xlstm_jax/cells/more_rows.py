"""Kernels under `jax.vmap`: what it maps over are more batch rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def more_rows(kernel: Callable[..., tuple]) -> Callable[..., tuple]:
  """Decorates a kernel whose arrays, and results, have rows in front.

  Arrays go by place, in trees or not; what goes by name is static.
  """

  @functools.wraps(kernel)
  def call(*arrays: Any, **static: Any) -> tuple:
    leaves, tree = jax.tree.flatten(arrays)

    @jax.custom_batching.custom_vmap
    def rows(*leaves):
      return tuple(kernel(*jax.tree.unflatten(tree, leaves), **static))

    @rows.def_vmap
    def _mapped(size, batched, *leaves):
      wide = (
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip(leaves, batched, strict=True)
      )
      results = rows(*(x.reshape(-1, *x.shape[2:]) for x in wide))
      results = tuple(y.reshape(size, -1, *y.shape[1:]) for y in results)
      return results, (True,) * len(results)

    return rows(*leaves)

  return call
