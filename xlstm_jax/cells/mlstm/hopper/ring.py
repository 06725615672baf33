"""Rings of buffers between the warpgroup that loads and those that compute.

```
  loads:     room(step)  fill(slot, ...)         waits for `free`, starts copies
                 |            |
                 |            v  the copies, when done, arrive at `full`
  buffers:   [slot 0] [slot 1] ... [slot size-1]     step i uses slot i % size
                 ^            |
                 |            v
  computes:  release(step)  take(step)           arrives at `free`, waits for
                                                 `full`
```

Both sides count the same steps in the same order, each for itself. Products
run asynchronously: a buffer is released once the product that reads it is done,
while the next is running.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.mlstm.hopper.tiles import F32


@dataclasses.dataclass(frozen=True)
class Ring:
  """Buffers that one warpgroup fills by TMA and the others read, in turn.

  Attributes:
    full: A barrier for each buffer, at which its copies arrive.
    free: Another, at which those that have read it arrive.
    size: How many buffers there are.
  """

  full: Any
  free: Any
  size: int

  def room(self, step):
    """The buffer for that step, once it is free."""
    slot = lax.rem(step, self.size)

    @pl.when(step >= self.size)
    def _wait():
      plgpu.barrier_wait(self.free.at[slot])

    return slot

  def fill(self, slot, source, target, together=None):
    """Starts a copy that will count for the buffer.

    Where `together` names an axis of the cluster, its blocks each copy a part
    for all of them.
    """
    plgpu.copy_gmem_to_smem(
      source, target, self.full.at[slot], collective_axes=together
    )

  def take(self, step):
    """The buffer of that step, once it is full."""
    slot = lax.rem(step, self.size)
    plgpu.barrier_wait(self.full.at[slot])
    return slot

  def release(self, step):
    """Tells the warpgroup that loads that the step's buffer has been read."""
    plgpu.barrier_arrive(self.free.at[lax.rem(step, self.size)])


def accumulate(total, carried, add, interpret) -> Any:
  """`total` plus all products that `add` makes, and what it makes of `carried`.

  `add(multiply, carried)` calls `multiply(left, right_ref)` for every product.
  Interpret mode knows no product into a given accumulator.
  """
  if interpret:
    products = [total]
    carried = add(
      lambda left, right_ref: products.append(_multiply(left, right_ref)),
      carried,
    )
    return sum(products), carried

  def run(refs):
    total_ref, carried_ref = refs
    made = add(
      functools.partial(plgpu.wgmma, total_ref),
      None if carried_ref is None else carried_ref[...],
    )
    if carried_ref is not None:
      carried_ref[...] = made

  return pl.run_state(run)((plgpu.WGMMAAccumulatorRef.init(total), carried))


def stream(ring: Ring, step, count: int, total, carried, use, interpret) -> Any:
  """`total` plus the products of the next `count` buffers of a ring.

  `use(multiply, slot, j, carried)` makes the product of the j-th of them and
  returns the next `carried`.

  Returns:
    The total, what is carried, and the step after these.
  """

  def add(multiply, carried):
    for j in range(count):
      slot = ring.take(step + j)
      carried = use(multiply, slot, j, carried)
      if j:
        plgpu.wgmma_wait(1)
        ring.release(step + j - 1)
    return carried

  total, carried = accumulate(total, carried, add, interpret)
  ring.release(step + count - 1)
  return total, carried, step + count


def _multiply(left, right_ref):
  left = left if isinstance(left, jax.Array) else left[...]
  return jnp.dot(left, right_ref[...], preferred_element_type=F32)
