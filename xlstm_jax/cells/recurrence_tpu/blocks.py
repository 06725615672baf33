"""How the kernels cut their arrays: what fits into VMEM, of which chip."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from xlstm_jax.cells.precision import accumulator
from xlstm_jax.cells.recurrence import Shapes

LANES, SUBLANES = 128, 8
# Rows of all steps of a block: as many hide what starting one costs, and with
# fewer than the least the products that restore raw would wait for R.
ROWS, LEAST_ROWS = 512, 128
# Of a program; more would share each use of R, but need room.
MOST_ROWS = 64
# Of VMEM, what blocks may take. The rest is for what the compiler spills.
SHARE = 0.75
GATES = 4
# Numbers of an sLSTM's state; an LSTM has fewer.
UNITS = 4


class Chip(NamedTuple):
  """A generation of TPUs.

  Attributes:
    vmem: Bytes of a core.
    cores: Of a device; programs run on them side by side.
  """

  vmem: int
  cores: int = 1


# By JAX's names of devices: v5e, v5p, v6e and v7x.
CHIPS = {
  "TPU v5 lite": Chip(128 * 2**20),
  "TPU v5": Chip(64 * 2**20, cores=2),
  "TPU v6 lite": Chip(128 * 2**20),
  "TPU7x": Chip(64 * 2**20),
}
# In whose blocks the kernels are interpreted on other devices.
SMALLEST = Chip(64 * 2**20)


class Blocks(NamedTuple):
  """What a program has of the arrays at a time.

  Attributes:
    H: Heads.
    B: Rows.
    T: Steps.
  """

  H: int
  B: int
  T: int


def choose(shapes: Shapes, chip: Chip) -> Blocks | None:
  """The blocks of both kernels; None where none fit.

  With all heads in one program, products of one head run beside another's
  pointwise part. Two cores want a program each.
  """
  groups = math.ceil(shapes.B / MOST_ROWS)
  rows = up(math.ceil(shapes.B / groups), SUBLANES)
  together = [
    heads
    for heads in range(shapes.H, 0, -1)
    if shapes.H % heads == 0
    and (heads == 1 or shapes.H // heads * groups >= chip.cores)
  ]
  most = 2 ** int(math.log2(ROWS / rows))
  for least in (LEAST_ROWS, 1):
    for heads in together:
      for steps in _halves(min(most, up(shapes.T, SUBLANES))):
        blocks = Blocks(heads, rows, steps)
        fits = max(taken(shapes, blocks)) <= SHARE * chip.vmem
        if fits and rows * steps >= least:
          return blocks
  return None


def _halves(steps: int) -> Iterator[int]:
  while steps:
    yield steps
    steps //= 2


def taken(shapes: Shapes, blocks: Blocks) -> tuple[int, int]:
  """What the forward and the backward kernel of an sLSTM have in VMEM.

  Every block is there twice: one is in use while the next is copied.
  """
  D = up(shapes.D, LANES)
  of_x = jnp.dtype(shapes.dtype).itemsize
  of_R = jnp.dtype(shapes.matrix_dtype).itemsize
  wide = accumulator(shapes.dtype).itemsize
  kept = of_R + (UNITS - 1) * wide
  units = blocks.H * blocks.B * D
  common = blocks.H * D * GATES * D * of_R + 2 * UNITS * units * wide
  common += blocks.T * blocks.B * LANES * 4  # the tokens' flags
  forward = blocks.T * units * (GATES * of_x + of_x + kept)
  gates = GATES * (of_x + wide + of_R)  # x, and gradients in two types
  backward = blocks.T * units * (gates + of_x + kept) + GATES * units * wide
  # The product that restores raw of a head's block.
  product = blocks.T * blocks.B * GATES * D * wide
  return 2 * (common + forward), 2 * (common + backward) + product


def up(size: int, multiple: int) -> int:
  """The next multiple."""
  return size + -size % multiple
