"""How a head's units and its matrix R are divided."""

from typing import NamedTuple

from jaxtyping import Array, Float

ROWS = 8  # of a cluster, the N of its matrix products
LANES = 32  # units of a warpgroup
TILE = 64  # rows of a matrix product

# Marks of a token: it starts a document, it is padding.
START, PADDING = 1, 2


class Blocks(NamedTuple):
  """How a cluster divides a head.

  Attributes:
    blocks: Blocks of the cluster.
    warpgroups: Warpgroups of a block.
    forward: Which of the two tiles of R^T that a warpgroup has in the forward
      pass stay in registers; the others stay in shared memory.
    backward: How many of the tiles that it has in the backward pass stay in
      registers.
  """

  blocks: int
  warpgroups: int
  forward: tuple[bool, bool]
  backward: int

  @property
  def units(self) -> int:
    """Of the head."""
    return self.blocks * self.warpgroups * LANES


# By units of a head. All that fits stays in registers, and more blocks make a
# shorter step.
BLOCKS = {
  64: Blocks(2, 1, (True, True), 1),
  128: Blocks(4, 1, (True, True), 2),
  192: Blocks(6, 1, (True, True), 3),
  256: Blocks(8, 1, (True, True), 4),
  384: Blocks(12, 1, (True, False), 2),
  512: Blocks(16, 1, (True, False), 3),
}


def forward_tiles(
  R_GHDE: Float[Array, "G H D D"], cut: Blocks
) -> Float[Array, "H S W 2 64 D"]:
  """R^T by block, warpgroup and tile.

  Rows 16 k + j of the first tile are gate i, and rows 16 k + 8 + j gate f, of
  unit 8 k + j; the second tile has z and o.
  """
  _, H, D, _ = R_GHDE.shape
  # Two tiles of two gates each; units in 4 times 8.
  x = R_GHDE.reshape(2, 2, H, D, cut.blocks, cut.warpgroups, 4, 8)
  x = x.transpose(2, 4, 5, 0, 6, 1, 7, 3)
  return x.reshape(H, cut.blocks, cut.warpgroups, 2, TILE, D)


def backward_tiles(
  R_GHDE: Float[Array, "G H D D"], cut: Blocks
) -> Float[Array, "H S W tiles 64 4*W*32"]:
  """R by block, warpgroup and tile.

  Rows are all units that a gate reads, divided among the warpgroups; columns
  the block's own gates, by warpgroup, gate and unit.
  """
  G, H, D, _ = R_GHDE.shape
  S, W, tiles = cut.blocks, cut.warpgroups, D // TILE // cut.warpgroups
  x = R_GHDE.reshape(G, H, D, S, W, LANES).transpose(1, 3, 2, 4, 0, 5)
  return x.reshape(H, S, W, tiles, TILE, G * W * LANES)


def forward_gates(sums: Float[Array, "64 N"]) -> list[Float[Array, "32 N"]]:
  """The two gates in the rows of a product with a tile of `forward_tiles`."""
  x = sums.reshape(4, 2, 8, -1)
  return [x[:, gate].reshape(LANES, -1) for gate in (0, 1)]
