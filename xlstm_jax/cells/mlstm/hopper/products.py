"""Inner products of states and their gradients, for the gradient of log f."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlstm_jax.cells.gpu_internals import pl, plgpu
from xlstm_jax.cells.lowered_once import lowered_once
from xlstm_jax.cells.mlstm.hopper.tiles import COMPILER, F32

# Numbers that a warpgroup loads at once, 16 bytes a thread: whole lines of
# memory. And how many such loads run before their products are needed.
STEP, LOADS = 1024, 2


@lowered_once("interpret")
def inner_products(
  C_BHPKV: jax.Array,
  D_BHPKV: jax.Array,
  C_parts_BHN: jax.Array,
  D_parts_BHN: jax.Array,
  *,
  interpret: Any = None,
) -> jax.Array:
  """The sum of C D over K and V, of states as `scan_states` writes them.

  Second parts are read where there are any, but their product is left out. XLA
  would always read them.
  """
  batch, heads, chunks = C_parts_BHN.shape
  size = math.prod(C_BHPKV.shape[3:])
  layout = plgpu.Layout.WG_STRIDED((STEP,), vec_size=8)

  def mlstm_products(C_ref, D_ref, C_parts_ref, D_parts_ref, sums_ref):
    b, h, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    C_parts, D_parts = C_parts_ref[b, h, n], D_parts_ref[b, h, n]

    def load(ref, part, place):
      at = part * chunks + n
      x = plgpu.load(ref.at[b, h, at, place], layout=layout, optimized=False)
      return x.astype(F32)

    def pair_of_parts(pair, sums):
      # First times first, then second times first, where there is a second.
      second = jnp.minimum(pair, 1)
      C_part = jnp.where(pair == 1, C_parts - 1, 0)
      D_part = second - C_part

      def several(i, sums):
        for j in range(LOADS):
          place = pl.ds((i * LOADS + j) * STEP, STEP)
          sums += load(C_ref, C_part, place) * load(D_ref, D_part, place)
        return sums

      return lax.fori_loop(0, size // (LOADS * STEP), several, sums)

    zeros = plgpu.layout_cast(jnp.zeros((STEP,), F32), layout)
    sums_ref.at[b, h, n][...] = lax.fori_loop(
      0, C_parts + D_parts - 1, pair_of_parts, zeros
    )

  sums = plgpu.kernel(
    mlstm_products,
    out_type=jax.ShapeDtypeStruct((batch, heads, chunks, STEP), F32),
    grid=(chunks, heads, batch),
    grid_names=("chunk", "head", "batch"),
    compiler_params=COMPILER,
    interpret=interpret,
  )(
    C_BHPKV.reshape(*C_BHPKV.shape[:3], -1),
    D_BHPKV.reshape(*D_BHPKV.shape[:3], -1),
    C_parts_BHN,
    D_parts_BHN,
  )
  return jnp.sum(sums, axis=-1)
