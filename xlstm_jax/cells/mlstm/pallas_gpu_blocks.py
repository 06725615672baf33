"""How the Hopper kernels cut their work, by the device and the heads.

The table beside this file has what `scripts/bench_cells.py --tune` found to be
fastest.
"""

import functools
import json
import pathlib
from typing import NamedTuple

CHUNKS = (128, 256)
COLUMNS = (128, 256)
TABLE = pathlib.Path(__file__).with_suffix(".json")


class Blocks(NamedTuple):
  """Sizes of parts; the largest where the table has none.

  Attributes:
    chunk: tokens of a chunk.
    state_columns: values of which a block of `scan_states` keeps the states,
      at most.
    sum_columns, gradient_columns: columns of h and of the gradients that a
      block of `combine` computes, at most.
  """

  chunk: int = CHUNKS[-1]
  state_columns: int = COLUMNS[-1]
  sum_columns: int = COLUMNS[-1]
  gradient_columns: int = COLUMNS[-1]


def best(device_kind: str, key_dim: int, value_dim: int) -> Blocks:
  """The parts for such heads on such a device."""
  heads = table().get(device_kind, {})
  return Blocks(**heads.get(name(key_dim, value_dim), {}))


def name(key_dim: int, value_dim: int) -> str:
  """What the table calls such heads."""
  return f"{padded_keys(key_dim)} x {padded(value_dim)}"


def padded(dim: int) -> int:
  """Values of a head as the kernels have them."""
  return dim + -dim % 64


def padded_keys(dim: int) -> int:
  """Keys of a head as the kernels have them."""
  return 96 if 64 < dim <= 96 else padded(dim)


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
  """Fields of `Blocks` by the kind of the device and the name of the heads."""
  return json.loads(TABLE.read_text())


def values_apart(key_dim: int) -> bool:
  """Whether dv is summed before the gradients of the scores are made.

  These may then lie where the weights of pairs of tokens were, which at 64 x
  128 and 96 x 192 are as large as the values or larger. At 64 x 128 forward and
  backward take a tenth more time.
  """
  return key_dim < 128
