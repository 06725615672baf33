"""How far a run is: what a checkpoint holds besides its arrays."""

import dataclasses
from typing import Any, Self

from xlstm_jax import files
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.data.pipeline import DataConfig

# The item of a checkpoint; one that holds imported parameters has none.
ITEM = "progress"


@dataclasses.dataclass(frozen=True)
class WindowOrder:
  """The settings that order the windows of given datasets.

  Attributes:
    context: Tokens of a window.
    shuffle: Whether every epoch has an order of its own.
    seed: The seed of these orders.
    weights: The share of each dataset; None for shares by size.
  """

  context: int
  shuffle: bool
  seed: int
  weights: list[float] | None

  @classmethod
  def of(cls, cfg: DataConfig) -> Self:
    """The order that a configuration asks for."""
    weights = None if cfg.weights is None else list(cfg.weights)
    return cls(cfg.context, cfg.shuffle, cfg.seed, weights)


@dataclasses.dataclass(frozen=True)
class LossHistory:
  """What is remembered of the losses so far, to judge the next ones.

  Attributes:
    skipped: Updates skipped in a row.
    losses: The last finite losses, at most a window of them.
    fresh: How many of these no level counts yet.
    levels: Mean and variance of past windows of losses, the newest last.
  """

  skipped: int = 0
  losses: list[float] = dataclasses.field(default_factory=list)
  fresh: int = 0
  levels: list[list[float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """How far a run is, with what it must not change.

  Attributes:
    step: Steps made.
    windows: Windows of the data that were read or left out, in their order.
    skipped: Updates that were skipped; None in the checkpoints of versions
      that did not save it, whose optimizer counts its updates.
    seed: The seed of the initial parameters and of dropout.
    tokenizer: The hash of the tokenizer.
    data: The hash of every dataset.
    order: What orders their windows; None in the checkpoints of versions that
      did not save it, whose configuration says it.
    health: What the losses so far leave behind.
    owes_evaluation: Whether the evaluation at this step was begun and not
      finished.
  """

  step: int
  windows: int
  skipped: int | None = None
  seed: int
  tokenizer: str
  data: list[str]
  order: WindowOrder | None = None
  health: LossHistory
  owes_evaluation: bool

  def to_json(self) -> dict[str, Any]:
    """The saved form."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, saved: Any, path: files.StrPath) -> Self:
    """What `to_json` saved, of this version or another one.

    Args:
      saved: The item of a checkpoint.
      path: Of the checkpoint, for messages.

    Raises:
      UserError: it is not what a checkpoint holds.
    """
    advice = "Restore the checkpoint from a copy, or move it away."
    return files.convert(saved, cls, path, advice=advice)


def exists(checkpoints: Checkpoints, step: int) -> bool:
  """Whether a run saved the checkpoint of a step; imported ones have none."""
  return ITEM in checkpoints.items(step)


def read(checkpoints: Checkpoints, step: int) -> Progress:
  """The progress in the checkpoint of a step."""
  saved = checkpoints.restore(step, {ITEM: None})[ITEM]
  return Progress.from_json(saved, checkpoints.directory / str(step))
