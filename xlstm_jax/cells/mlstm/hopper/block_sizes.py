"""How the Hopper kernels cut their work: sizes, without Pallas.

`block_sizes.json` has what `scripts/bench_cells.py --tune` found to be fastest
for a device and heads.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

CHUNKS = (128, 256)
COLUMNS = (128, 256)
TABLE = pathlib.Path(__file__).with_suffix(".json")
MAX_DIM = 1280  # keys or values of a head
MULTIPROCESSORS = 132  # of an H100 and an H200
ROWS = 64  # of a warpgroup's matrix product
TOKENS = 64  # of a tile that `scan_states` loads
BLOCK = 128  # tokens of a thread block: two warpgroups of rows
SHARED_MEMORY = 227 * 1024  # bytes that a thread block may have
RESERVED = 4096  # of these, for vectors and barriers
MAX_COPY = 256  # numbers that TMA copies along a dimension


class Blocks(NamedTuple):
  """Sizes of parts; the largest where the table has none.

  Attributes:
    chunk: Tokens of a chunk.
    state_columns: Most columns of C that a block of `scan_states` keeps.
    sum_columns: Most columns of h that a block of `combine` computes.
    gradient_columns: Most columns of a gradient that it computes.
  """

  chunk: int = CHUNKS[-1]
  state_columns: int = COLUMNS[-1]
  sum_columns: int = COLUMNS[-1]
  gradient_columns: int = COLUMNS[-1]


def best(device_kind: str, key_dim: int, value_dim: int) -> Blocks:
  """The sizes for such heads on such a device."""
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


def swizzled_columns(*dims: int) -> int:
  """Columns of the tiles in which TMA copies arrays with so many columns."""
  return 64 if all(dim % 64 == 0 for dim in dims) else 32


def out_width(columns: int, *out_dims: int) -> int:
  """How many of its result's columns a block computes, at most `columns`.

  Results of all these dimensions, multiples of 64 or else of 32, are cut into
  such parts.
  """
  widths = range(columns, 0, -swizzled_columns(*out_dims))
  return next(w for w in widths if all(dim % w == 0 for dim in out_dims))


def scan_blocks(key_dim: int, value_dim: int, columns: int) -> tuple[int, int]:
  """Into how many blocks `scan_states` splits the keys and values of a head.

  A block has 64, 96 or 128 keys.
  """
  block_keys = key_dim if key_dim < BLOCK else math.gcd(key_dim, BLOCK)
  width = out_width(columns, value_dim)
  return key_dim // block_keys, value_dim // width


def span_count(chunks: int, blocks: int) -> int:
  """Into how many spans the chunks are cut, given the blocks of one span.

  Of the powers of 2 that fill the GPU at most once it is the one whose blocks
  run over the fewest chunks one after the other, a first pass included.
  """

  def way(spans):
    waves = -(-spans * blocks // MULTIPROCESSORS)
    return (1 if spans == 1 else 2) * waves / spans

  choices = [1]
  while choices[-1] * blocks < MULTIPROCESSORS and (
    chunks % (2 * choices[-1]) == 0
  ):
    choices.append(2 * choices[-1])
  return min(choices, key=way)


def combine_depth(*dims: int) -> int:
  """How many summands of these sizes a buffer of `combine` holds."""
  return BLOCK if all(dim % BLOCK == 0 for dim in dims) else 64


def combine_buffers(width: int, depth: int) -> tuple[int, int]:
  """Buffers of the ring of `combine`, and those of a warpgroup's results."""
  stores = 2 if width <= 192 else 1
  left = SHARED_MEMORY - RESERVED - stores * 4 * ROWS * 64
  return min(left // (2 * depth * (BLOCK + width)), 8), stores


def copies(dim: int) -> list[tuple[int, int]]:
  """Starts and sizes of the copies of a vector of `dim` numbers."""
  return [
    (start, min(MAX_COPY, dim - start)) for start in range(0, dim, MAX_COPY)
  ]
