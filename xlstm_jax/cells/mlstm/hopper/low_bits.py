"""The bits of h that rounding to bfloat16 takes away, packed beside it.

The gradient of the normaliser needs h with 16 bits where bfloat16 has 8. Two
numbers of 8 bits lie in 16: those of column c and of c + 64 of each 128 columns
that a block of `combine` computes.
"""

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.mlstm.hopper.block_sizes import BLOCK
from xlstm_jax.cells.mlstm.hopper.tiles import BF16, F32


def packed_dim(out_dim: int, width: int) -> int:
  """Columns of the packed bits, if a block computes `width` of h."""
  return out_dim // width * -(-width // BLOCK) * 64


def low_bits(x, rounded):
  """The bits of float32 x less those of rounded x, in 256ths, 8 of them."""
  exact_bits, rounded_bits = (
    lax.bitcast_convert_type(y, jnp.int32) for y in (x, rounded.astype(F32))
  )
  return jnp.minimum((exact_bits - rounded_bits + 128) >> 8, 127)


def packed(bits):
  """One or two matrices of `low_bits`, as bfloat16 with the same 16 bits."""
  low = bits[0] & 255
  if len(bits) == 2:
    low = low | (bits[1] << 8)
  return lax.bitcast_convert_type(low.astype(jnp.int16), BF16)


def unpacked(rounded: jax.Array, low: jax.Array, *, width: int) -> jax.Array:
  """What was rounded, in float32 that ends in 8 bits of zeros.

  `width` is how many columns a block of `combine` computed.
  """
  *rows, out_dim = rounded.shape
  pairs = low.astype(jnp.int32)
  pairs = pairs.reshape(*rows, out_dim // width, -1, 1, 64)
  shift = jnp.array([24, 16], jnp.int32)[:, None]
  rests = lax.shift_right_arithmetic(pairs << shift, 24)
  rests = rests.reshape(*rows, out_dim // width, -1)[..., :width]
  bits = lax.bitcast_convert_type(rounded, jnp.int16).astype(jnp.int32) << 16
  bits += rests.reshape(rounded.shape) << 8
  return lax.bitcast_convert_type(bits, F32)
