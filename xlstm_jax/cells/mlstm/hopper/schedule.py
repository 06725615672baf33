"""Which block computes what, and in which order."""

import dataclasses

from jax import lax


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Items that blocks, as many as run at once, take in turn.

  The items of a chunk follow each other, then those of the same tokens in other
  heads. They differ in work: a block must not meet the same place every time.

  Attributes:
    per_chunk: Items of a chunk.
    most_blocks: Blocks that run at once.
  """

  batch: int
  heads: int
  chunks: int
  per_chunk: int
  most_blocks: int

  @property
  def items(self) -> int:
    return self.batch * self.heads * self.chunks * self.per_chunk

  @property
  def blocks(self) -> int:
    return min(self.most_blocks, self.items)

  def count(self, block):
    """How many items a block computes."""
    return (self.items - block + self.blocks - 1) // self.blocks

  def item(self, block, k):
    """Row, head, chunk and place in it of the k-th item of a block."""
    index = block + k * self.blocks
    index, place = index // self.per_chunk, lax.rem(index, self.per_chunk)
    lap = max(self.blocks // self.per_chunk, 1)
    place = lax.rem(place + index // lap, self.per_chunk)
    index, h = index // self.heads, lax.rem(index, self.heads)
    return index // self.chunks, h, lax.rem(index, self.chunks), place
