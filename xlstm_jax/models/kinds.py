"""The kinds of blocks, with all that the framework asks about each of them.

A new kind is a file in `mixers/`, and here a field of `Mixers` and a row of
`KINDS` with the same name. `model.pattern` then builds models with it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from xlstm_jax.cells.backends import Cell
from xlstm_jax.mixers.memory import memory_cell
from xlstm_jax.mixers.mlstm import MLSTM, MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLarge, MLSTMLargeConfig
from xlstm_jax.mixers.slstm import SLSTM, SLSTMConfig, slstm_cell


@dataclasses.dataclass(frozen=True)
class Mixers:
  """The configuration of every kind's mixer, under the kind's name.

  Attributes:
    mlstm: The mixer of "paper" mLSTM blocks.
    mlstm_large: The mixer of "large" mLSTM blocks.
    slstm: The mixer of sLSTM blocks.
  """

  mlstm: MLSTMConfig = MLSTMConfig()
  mlstm_large: MLSTMLargeConfig = MLSTMLargeConfig()
  slstm: SLSTMConfig = SLSTMConfig()


def _no_problems(cfg: Any, width: int, *, tensor: int) -> Iterator[str]:
  del cfg, width, tensor
  return iter(())


@dataclasses.dataclass(frozen=True)
class Kind:
  """What the framework asks about a kind of block.

  The functions take the kind's configuration first.

  Attributes:
    mixer: `mixer(cfg, width, *, depth, head_norm, dropout, compute, rngs)`
      builds the mixer.
    feedforward: `feedforward(cfg)` says whether a feed-forward follows the
      mixer.
    flops: `flops(cfg, width, *, context, chunk)` is the number of FLOPs per
      token of the mixer's forward pass, in rows of `context` tokens; `chunk` is
      as in `counts.train_flops_per_token`.
    heads: The field of the configuration with the number of heads, over which
      tensor parallelism splits the mixer; None if every device of that axis
      computes the whole mixer.
    time_overlap: `time_overlap(cfg)` is the number of tokens before its own
      that a device needs if time is split over devices, such as those in the
      window of a convolution. None if time cannot be split.
    cell: `cell(cfg, share, compute)` is the cell that a device runs, which may
      have kernels; None if the mixer has no cell.
    problems: `problems(cfg, width, *, tensor)` yields a sentence for each thing
      that does not fit the width, or `tensor` devices that split the heads.
  """

  mixer: Callable[..., nnx.Module]
  feedforward: Callable[[Any], bool]
  flops: Callable[..., float]
  heads: str | None
  time_overlap: Callable[[Any], int] | None
  cell: Callable[..., Cell] | None
  problems: Callable[..., Iterator[str]] = _no_problems


KINDS: dict[str, Kind] = {
  "mlstm": Kind(
    mixer=MLSTM,
    feedforward=lambda cfg: False,
    flops=MLSTMConfig.flops,
    heads="num_heads",
    time_overlap=lambda cfg: max(cfg.conv_window - 1, 0),
    cell=memory_cell,
    problems=MLSTMConfig.problems,
  ),
  "mlstm_large": Kind(
    mixer=MLSTMLarge,
    feedforward=lambda cfg: True,
    flops=MLSTMLargeConfig.flops,
    heads="num_heads",
    time_overlap=lambda cfg: 0,
    cell=memory_cell,
    problems=MLSTMLargeConfig.problems,
  ),
  "slstm": Kind(
    mixer=SLSTM,
    feedforward=lambda cfg: cfg.feedforward,
    flops=SLSTMConfig.flops,
    heads="num_heads",
    time_overlap=None,
    cell=slstm_cell,
  ),
}


def has_memory(kind: str) -> bool:
  """Whether blocks of the kind have an mLSTM's memory."""
  return KINDS[kind].cell is memory_cell


def xlstm_kinds(
  mlstm_block: str, slstm_at: tuple[int, ...], num_blocks: int
) -> tuple[str, ...]:
  """The kinds of an xLSTM's blocks: sLSTM at `slstm_at`, mLSTM elsewhere."""
  mlstm = {"paper": "mlstm", "large": "mlstm_large"}[mlstm_block]
  return tuple("slstm" if at in slstm_at else mlstm for at in range(num_blocks))
