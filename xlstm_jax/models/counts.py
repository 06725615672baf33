"""How many parameters a model has and how many FLOPs a token costs.

One multiply-accumulate is two FLOPs. Matrix products count, and the mLSTM
cell's; norms and activations do not. Training is three forward passes,
whatever is recomputed.
"""

import math

import jax

from xlstm_jax.models.config import BlockKind, ModelConfig
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
    context: tokens per sequence; it matters to the parallel form alone.
    chunk: of the chunkwise mLSTM, counted as 64 wherever models are compared;
      None counts the parallel form. Both count the causal half alone.
  """
  head = 2 * cfg.width * cfg.vocab_size
  blocks = sum(_block(cfg, kind, context, chunk) for kind in cfg.kinds)
  return 3.0 * (head + blocks)


def _block(cfg: ModelConfig, kind: BlockKind, context: int, chunk: int | None):
  d = cfg.width
  feedforward = 0
  if cfg.has_feedforward(kind):
    feedforward = 6 * d * cfg.feedforward.hidden(d)
  match kind:
    case "mlstm":
      m, inner = cfg.mlstm, cfg.mlstm.inner(d)
      gates = 2 * (3 if m.gate_input == "qkv" else 1) * inner * 2
      return (
        6 * d * inner
        + 6 * inner * (m.qkv_block or inner)
        + gates * (1 if m.gate_headwise else m.num_heads)
        + 2 * m.conv_window * inner
        + _mlstm_cell(m.num_heads, *m.head_channels(d), context, chunk)
      )
    case "mlstm_large":
      m = cfg.mlstm_large
      qk, v = int(d * m.qk_factor), int(d * m.v_factor)
      H = m.num_heads
      return (
        2 * d * (2 * qk + 2 * v + 2 * H)
        + 2 * v * d
        + feedforward
        + _mlstm_cell(H, *m.head_channels(d), context, chunk)
      )
    case _:
      s = cfg.slstm
      return 2 * 8 * d * d / s.num_heads + 2 * s.conv_window * d + feedforward


def _mlstm_cell(H: int, K: int, V: int, context: int, chunk: int | None):
  if chunk is None:
    return H * context * (K + V)
  return H * (chunk * (K + V) + 4 * K * V + 4 * K + 2 * K * V / chunk)
