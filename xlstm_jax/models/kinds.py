"""The kinds of blocks: of each, all that the rest of the framework asks.

A new kind is a file in `mixers/`, and here a field of `Mixers` and a row of
`KINDS` of the same name. `model.pattern` then builds models of it.
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
    mlstm: the mixer of "paper" mLSTM blocks.
    mlstm_large: the mixer of "large" mLSTM blocks.
    slstm: the mixer of sLSTM blocks.
  """

  mlstm: MLSTMConfig = MLSTMConfig()
  mlstm_large: MLSTMLargeConfig = MLSTMLargeConfig()
  slstm: SLSTMConfig = SLSTMConfig()


def _no_problems(cfg: Any, width: int, *, tensor: int) -> Iterator[str]:
  del cfg, width, tensor
  return iter(())


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is asked about a kind of block.

  The functions take the kind's configuration first.

  Attributes:
    mixer: Builds the mixer: `mixer(cfg, width, *, depth, head_norm, dropout,
      compute, rngs)`.
    feedforward: `feedforward(cfg)`: whether a feed-forward follows the mixer.
    flops: `flops(cfg, width, *, context, chunk)`: FLOPs per token of the
      mixer's forward pass, in rows of `context` tokens; `chunk` as in
      `counts.train_flops_per_token`.
    heads: The field of the configuration with the number of heads, over which
      tensor parallelism splits the mixer; None if every device of that axis
      computes all of it.
    time_overlap: `time_overlap(cfg)`: the tokens before its own that a device
      needs where time is split over devices, such as those in the window of a
      convolution. None if time cannot be split.
    cell: `cell(cfg, share, compute)`: the cell as a device runs it, which may
      have kernels; None if the mixer has none.
    problems: `problems(cfg, width, *, tensor)`: a sentence on each thing that
      does not fit the width, or `tensor` devices that split the heads.
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
  """The kinds of an xLSTM's blocks: mLSTM, but for sLSTM at some places."""
  mlstm = {"paper": "mlstm", "large": "mlstm_large"}[mlstm_block]
  return tuple("slstm" if at in slstm_at else mlstm for at in range(num_blocks))
