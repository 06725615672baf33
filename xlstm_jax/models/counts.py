"""The number of a model's parameters, and of FLOPs per token.

One multiply-accumulate is two FLOPs. Matrix products count, those of the mLSTM
cell included; norms and activations do not. Training counts as three forward
passes, whatever is recomputed.
"""

import math

import jax

from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.kinds import KINDS
from xlstm_jax.models.language_model import Definition


def parameters(cfg: ModelConfig) -> int:
  """The number of parameters."""
  leaves = jax.tree.leaves(Definition(cfg).abstract())
  return sum(math.prod(leaf.shape) for leaf in leaves)


def train_flops_per_token(
  cfg: ModelConfig, context: int, *, chunk: int | None = 64
) -> float:
  """FLOPs per token of a training step.

  Args:
    cfg: the model.
    context: tokens per sequence, which matter only to the parallel form.
    chunk: tokens per chunk of the chunkwise mLSTM; 64 wherever models are
      compared. None counts the parallel form. Only the causal half counts.
  """
  head = 2 * cfg.width * cfg.vocab_size
  blocks = sum(_block(cfg, kind, context, chunk) for kind in cfg.kinds)
  return 3.0 * (head + blocks)


def _block(cfg: ModelConfig, kind: str, context: int, chunk: int | None):
  flops = KINDS[kind].flops(
    getattr(cfg, kind), cfg.width, context=context, chunk=chunk
  )
  if cfg.has_feedforward(kind):
    flops += 6 * cfg.width * cfg.feedforward.hidden(cfg.width)
  return flops
