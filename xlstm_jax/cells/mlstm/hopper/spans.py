"""States and their gradients, also of rows too few to fill the GPU.

Where they are too few, `scan_states` runs over spans of chunks side by side.
Each starts from what all spans before it leave, which takes a first pass that
keeps only their ends.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.cells.mlstm.hopper.block_sizes import (
  Blocks,
  scan_blocks,
  span_count,
)
from xlstm_jax.cells.mlstm.hopper.scan import scan_states
from xlstm_jax.cells.mlstm.scales import Scales

States = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def states(
  k_BTHK: jax.Array,
  v_BTHV: jax.Array,
  s: Scales,
  parts_BHN: jax.Array,
  C_BHKV: jax.Array,
  n_BHK: jax.Array,
  *,
  blocks: Blocks,
  interpret: Any,
) -> States:
  """C and n before every chunk, as `scan_states` writes them, and the last.

  A token writes k v^T into C, and k into n, with the same weight.
  """
  return _in_spans(
    *(k_BTHK, v_BTHV, s.write_BHT, s.write_BHT, s.keep_BHN, parts_BHN),
    *(C_BHKV, n_BHK),
    blocks=blocks,
    reverse=False,
    interpret=interpret,
  )


def state_gradients(
  q_BTHK: jax.Array,
  dh_BTHV: jax.Array,
  read_BHT: jax.Array,
  bias_BHT: jax.Array,
  keep_BHN: jax.Array,
  parts_BHN: jax.Array,
  dC_BHKV: jax.Array,
  dn_BHK: jax.Array,
  *,
  blocks: Blocks,
  interpret: Any,
) -> States:
  """D and dn after every chunk, and those of the first state.

  A token adds read q dh^T to D and read bias q to dn. `parts_BHN` is of the
  gradients.
  """
  return _in_spans(
    *(q_BTHK, dh_BTHV, read_BHT, read_BHT * bias_BHT, keep_BHN, parts_BHN),
    *(dC_BHKV, dn_BHK),
    blocks=blocks,
    reverse=True,
    interpret=interpret,
  )


def _in_spans(
  k, v, write, write_n, keep, parts, C, n, *, blocks, reverse, interpret
) -> States:
  spans_of = partial(
    scan_states,
    *(k, v, write, write_n, keep, parts),
    chunk=blocks.chunk,
    columns=blocks.state_columns,
    reverse=reverse,
    interpret=interpret,
  )
  batch, heads, chunks = keep.shape
  of_head = scan_blocks(k.shape[-1], v.shape[-1], blocks.state_columns)
  spans = span_count(chunks, batch * heads * math.prod(of_head))
  if spans > 1:
    zeros = jnp.zeros_like(C)[:, :, None].repeat(spans, axis=2)
    zeros_n = jnp.zeros_like(n)[:, :, None].repeat(spans, axis=2)
    _, _, ends, ends_n = spans_of(zeros, zeros_n, save=False)
    kept = keep[..., ::-1] if reverse else keep
    kept = jnp.prod(kept.reshape(batch, heads, spans, -1), axis=-1)
    C, n = (entering(kept, x, left) for x, left in ((C, ends), (n, ends_n)))
  else:
    C, n = C[:, :, None], n[:, :, None]
  C_BHPKV, n_BHNK, ends, ends_n = spans_of(C, n)
  return C_BHPKV, n_BHNK, ends[:, :, -1], ends_n[:, :, -1]


def entering(kept_BHR, first, ends_BHR):
  """The states that enter the R spans, given what each leaves of nothing."""
  spans = kept_BHR.shape[-1]
  # The state that enters span r is a sum over sources: the first state, and
  # what the spans before it leave. Spans u from the source on have kept it.
  r, source, u = np.ogrid[:spans, :spans, :spans]
  factor_BHRS = jnp.prod(
    jnp.where((source <= u) & (u < r), kept_BHR[..., None, None, :], 1), axis=-1
  )
  factor_BHRS = jnp.where(source[..., 0] <= r[..., 0], factor_BHRS, 0)
  sources = jnp.concatenate([first[:, :, None], ends_BHR[:, :, :-1]], axis=2)
  return jnp.einsum(
    "bhrs,bhs...->bhr...", factor_BHRS, sources, precision="highest"
  )
