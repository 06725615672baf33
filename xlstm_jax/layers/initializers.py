"""Initial distributions of the published models (xLSTM paper, appendix)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]


class Depth(NamedTuple):
  """The place of a block: its index `at`, which may be traced, of `blocks`."""

  at: int | jax.Array
  blocks: int


zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def normal(std: float) -> Initializer:
  """N(0, std^2)."""
  return jax.nn.initializers.normal(std)


def small(width: int) -> Initializer:
  """N(0, 2 / (5 width)) (Nguyen and Salazar, 2019)."""
  return normal(math.sqrt(2 / (5 * width)))


def wang(width: int, num_blocks: int) -> Initializer:
  """N(0, (2 / (num_blocks sqrt(width)))^2) (Wang and Komatsuzaki, 2021).

  `width` is the model's width and `num_blocks` counts all its blocks, whatever
  the weight's own fan-in is.
  """
  return normal(2 / (num_blocks * math.sqrt(width)))


def uniform(bound: float) -> Initializer:
  """U(-bound, bound)."""

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def constant(value: float) -> Initializer:
  """The same value everywhere."""
  return jax.nn.initializers.constant(value)


def linspace(start: float, stop: float) -> Initializer:
  """Equal steps from start to stop along the last dimension."""

  def init(key, shape, dtype):
    del key
    return jnp.broadcast_to(jnp.linspace(start, stop, shape[-1]), shape).astype(
      dtype
    )

  return init
