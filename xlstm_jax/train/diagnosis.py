"""How many tokens dominate the mLSTMs' memories in a run.

Where few do, rounding costs most: for some q, C^T q and n^T q are then far
smaller than the numbers that they are sums of. `parts_of_states` in
`xlstm_jax/cells/mlstm/scales.py` has the reasoning.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xlstm_jax.cells.documents import documents
from xlstm_jax.cells.mlstm.gates import log_gates
from xlstm_jax.cells.mlstm.hopper.block_sizes import CHUNKS
from xlstm_jax.cells.mlstm.scales import parts_of_states, scales
from xlstm_jax.mixers.memory import Observation, observed
from xlstm_jax.models.kinds import has_memory
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.sharding import on_mesh
from xlstm_jax.train.run import Run
from xlstm_jax.train.step import Batch


class Rule(NamedTuple):
  """How many tokens dominate the memories of a layer, and what follows.

  N is the number of chunks. At padding the first two are NaN.
  """

  tokens_BTH: Float[Array, "B T H"]  # (sum of w^2)^2 / (sum of w^4)
  divides_BTH: Float[Array, "B T H"]  # 1 where the normaliser is above 1
  two_parts_BHN: Float[Array, "B H N"]  # 1 where the Hopper kernel keeps two


def figures(run: Run, params: Params, batch: Batch) -> dict[str, float]:
  """How many tokens dominate the memories of a model while it reads a batch.

  This takes a forward pass without dropout over the first accumulation part of
  the batch, and one step per token and layer.

  Args:
    run: the run, with its model and its mesh.
    params: the model's parameters.
    batch: a batch of a training step.

  Returns:
    Figures over all mLSTM blocks and, with "/INDEX" after the name, of each:
    "memory/tokens_p01" and "memory/tokens_median", quantiles over tokens and
    heads of the effective number of tokens that dominate the memory;
    "memory/divides", the share of tokens and heads where the normaliser divides
    (0 without normaliser); "memory/two_parts", the share of states after chunks
    that the Hopper kernel keeps in two parts.
  """
  cfg, chunk = run.cfg, run.cfg.compute.mlstm_chunk
  if chunk not in CHUNKS:
    chunk = CHUNKS[-1]
  found = _figures(
    params,
    batch["inputs"],
    batch["segments"],
    definition=run.definition,
    parts=cfg.accumulation,
    chunk=chunk,
  )
  return {name: float(value) for name, value in jax.device_get(found).items()}


@functools.partial(jax.jit, static_argnames=("definition", "parts", "chunk"))
def _figures(
  params: Params,
  inputs_BT: Array,
  segments_BT: Array,
  *,
  definition: Definition,
  parts: int,
  chunk: int,
) -> dict[str, Array]:
  # The rows that a step takes as its first part.
  inputs_BT, segments_BT = inputs_BT[::parts], segments_BT[::parts]
  compute = dataclasses.replace(definition.compute, scan=False, remat="none")
  lm = dataclasses.replace(definition, compute=compute).bind(params)
  with observed() as layers:
    lm(inputs_BT, segments_BT=segments_BT)
  rules = [rule(layer, segments_BT, chunk=chunk) for layer in layers]
  found = summary(jax.tree.map(lambda *x: jnp.stack(x), *rules))
  kinds = definition.cfg.kinds
  blocks = [at for at, kind in enumerate(kinds) if has_memory(kind)]
  for at, one in zip(blocks, rules, strict=True):
    found |= {f"{name}/{at}": value for name, value in summary(one).items()}
  return {f"memory/{name}": value for name, value in found.items()}


def summary(rule: Rule) -> dict[str, Array]:
  """Quantiles and shares, of one layer or of stacked ones."""
  few, median = jnp.nanquantile(rule.tokens_BTH, jnp.array([0.01, 0.5]))
  return {
    "tokens_p01": few,
    "tokens_median": median,
    "divides": jnp.nanmean(rule.divides_BTH),
    "two_parts": jnp.mean(rule.two_parts_BHN),
  }


def rule(
  layer: Observation, segments_BT: Int[Array, "B T"], *, chunk: int
) -> Rule:
  """The `Rule` of a layer, in chunks of `chunk` tokens."""
  tokens = ("batch", None, "heads")
  return on_mesh(
    functools.partial(_rule, layer.cfg, chunk),
    layer.q_BTHK,
    layer.k_BTHK,
    layer.i_BTH,
    layer.f_BTH,
    segments_BT,
    axes=((*tokens, None), (*tokens, None), tokens, tokens, ("batch", None)),
    out_axes=Rule._make([tokens, tokens, ("batch", "heads", None)]),
  )


def _rule(cfg, chunk, q_BTHK, k_BTHK, i_BTH, f_BTH, segments_BT) -> Rule:
  batch, time, heads, key_dim = q_BTHK.shape
  before_B = jnp.zeros(batch, jnp.int32)
  doc = documents(segments_BT, before_B, time)
  i_BTH, f_BTH = (x.astype(jnp.float32) for x in (i_BTH, f_BTH))
  log_i_BTH, log_f_BTH = log_gates(
    i_BTH, f_BTH, doc.real_BT, input_gate=cfg.input_gate
  )
  tokens_BTH, log_size_BTH = followed(
    q_BTHK, k_BTHK, log_i_BTH, log_f_BTH, doc.start_BT
  )
  real_BT1 = doc.real_BT[..., None]
  divides_BTH = (log_size_BTH > 0) & cfg.normalize

  # Whole chunks, as `pallas_gpu` makes them.
  missing = [(0, 0), (0, -time % chunk)]
  s = scales(
    jnp.pad(log_i_BTH, [*missing, (0, 0)], constant_values=-jnp.inf),
    jnp.pad(log_f_BTH, [*missing, (0, 0)]),
    jnp.pad(doc.id_BT, missing, mode="edge"),
    jnp.pad(doc.start_BT, missing),
    jnp.zeros((batch, heads), jnp.float32),
    before_B,
    chunk=chunk,
    key_dim=key_dim,
    stabilize=cfg.input_gate == "exp",
  )
  parts_BHN = parts_of_states(s, jnp.zeros((batch, heads, 1, 1), jnp.float32))[
    ..., 1:
  ]
  two_parts_BHN = (parts_BHN == 2) & cfg.normalize
  return Rule(
    jnp.where(real_BT1, tokens_BTH, jnp.nan),
    jnp.where(real_BT1, divides_BTH.astype(jnp.float32), jnp.nan),
    two_parts_BHN.astype(jnp.float32),
  )


def followed(
  q_BTHK: Float[Array, "B T H K"],
  k_BTHK: Float[Array, "B T H K"],
  log_i_BTH: Float[Array, "B T H"],
  log_f_BTH: Float[Array, "B T H"],
  start_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
  """How many tokens dominate every memory, and log |n^T q| K^-0.5.

  Token s has the weight w = exp(log i_s + log f_{s+1} + ... + log f_t) in the
  memory of token t. With N tokens of equal weight, (sum of w^2)^2 / (sum of
  w^4) is N. Neither result depends on the scale of the weights. They are kept
  relative to the largest, exp(a), which unlike exp(m) is always one of them:

      a_t = max(log f_t + a_{t-1}, log i_t),  a = -inf where a document starts

  Everything is float32.
  """
  q_BTHK, k_BTHK = (x.astype(jnp.float32) for x in (q_BTHK, k_BTHK))
  batch, _, heads, key_dim = q_BTHK.shape

  def token(past, inputs):
    n_BHK, a_BH, square_BH, fourth_BH = past
    q_BHK, k_BHK, log_i_BH, log_f_BH, start_B = inputs
    carried_BH = jnp.where(start_B[:, None], -jnp.inf, a_BH + log_f_BH)
    a_BH = jnp.maximum(carried_BH, log_i_BH)
    # Before anything was written there is no largest weight.
    unit_BH = jnp.where(a_BH == -jnp.inf, 0, a_BH)
    keep_BH = jnp.exp(carried_BH - unit_BH)
    write_BH = jnp.exp(log_i_BH - unit_BH)
    n_BHK = keep_BH[..., None] * n_BHK + write_BH[..., None] * k_BHK
    square_BH = keep_BH**2 * square_BH + write_BH**2
    fourth_BH = keep_BH**4 * fourth_BH + write_BH**4
    size_BH = jnp.abs(jnp.sum(q_BHK * n_BHK, axis=-1)) * key_dim**-0.5
    results = square_BH**2 / fourth_BH, jnp.log(size_BH) + a_BH
    return (n_BHK, a_BH, square_BH, fourth_BH), results

  zeros_BH = jnp.zeros((batch, heads), jnp.float32)
  past = (
    jnp.zeros((batch, heads, key_dim), jnp.float32),
    jnp.full_like(zeros_BH, -jnp.inf),
    zeros_BH,
    zeros_BH,
  )
  inputs = (q_BTHK, k_BTHK, log_i_BTH, log_f_BTH, start_BT)
  _, results = jax.lax.scan(
    token, past, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
  )
  tokens_TBH, log_size_TBH = results
  return jnp.moveaxis(tokens_TBH, 0, 1), jnp.moveaxis(log_size_TBH, 0, 1)
