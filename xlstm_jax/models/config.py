"""The configuration of a language model: all that changes its function."""

import dataclasses
from typing import Any, Literal

from xlstm_jax.errors import UserError, shown
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.models.kinds import KINDS, Kind, Mixers, xlstm_kinds
from xlstm_jax.ranges import ranged

# Far beyond any model, and few enough to be listed.
MAX_BLOCKS = 10_000


@dataclasses.dataclass(frozen=True)
class ModelConfig(Mixers):
  """An xLSTM language model; the defaults are the paper's 125M xLSTM[1:0].

  `Mixers` has the configuration of every kind's mixer.

  Attributes:
    vocab_size: Rows of the embedding; at least the number of the tokenizer's
      ids.
    width: Channels of the residual stream.
    num_blocks: Number of blocks, of all kinds together.
    mlstm_block: Which block the mLSTM has: "paper" (pre-up-projection, no
      feed-forward) or "large" (the 7B model's, followed by a feed-forward).
    slstm_at: Indices of the blocks that are sLSTM; the others are mLSTM.
    pattern: Kinds of the blocks, repeated from the first block on, for models
      of any kinds of blocks; () for the blocks that mlstm_block and slstm_at
      name.
    feedforward: The feed-forward of the blocks that have one: sLSTM blocks if
      `slstm.feedforward` is set, and "large" mLSTM blocks.
    norm: The norm before mixers and feed-forwards, and after the last block.
    head_norm: The norm of the cells' outputs, per head.
    out_norm: Whether a norm follows the last block.
    out_norm_bias: Whether that norm has a bias if `norm` has one.
    post_norm: Whether each branch's output is normed before it joins the
      residual stream.
    tie_embeddings: Whether the embedding is the vocabulary projection too.
    logit_cap: Soft cap of the logits; None for none.
    dropout: Dropout rate of branch outputs.
    embedding_dropout: Whether `dropout` applies to the embeddings too.
  """

  vocab_size: int = 50304
  width: int = 768
  num_blocks: int = 24
  mlstm_block: Literal["paper", "large"] = "paper"
  slstm_at: tuple[int, ...] = ()
  pattern: tuple[str, ...] = ()
  feedforward: FeedForwardConfig = FeedForwardConfig()
  norm: NormConfig = NormConfig()
  head_norm: NormConfig = NormConfig()
  out_norm: bool = True
  out_norm_bias: bool = True
  post_norm: bool = False
  tie_embeddings: bool = False
  logit_cap: float | None = ranged(None, above=0)
  dropout: float = ranged(0.0, at_least=0, below=1)
  embedding_dropout: bool = False

  def __post_init__(self):
    """Refuses values that no model can have.

    Raises:
      UserError: a size is below 1 or not an integer; an sLSTM position is not
        an integer or lies outside the model; or a pattern has unknown kinds,
        is longer than the model, or comes with another choice of blocks.
    """
    for field in ("vocab_size", "width", "num_blocks"):
      value = getattr(self, field)
      if type(value) is not int or value < 1:
        raise UserError(
          f"model.{field} is {shown(value)}; it must be an integer, at least 1."
        )
    if type(self.slstm_at) is not tuple or any(
      type(at) is not int for at in self.slstm_at
    ):
      raise UserError(
        f"model.slstm_at is {shown(self.slstm_at)}; it must be a tuple of "
        "integers, such as (1,)."
      )
    if self.num_blocks > MAX_BLOCKS:
      raise UserError(
        f"model.num_blocks is {self.num_blocks}; it must be at most "
        f"{MAX_BLOCKS}."
      )
    outside = [at for at in self.slstm_at if not 0 <= at < self.num_blocks]
    if outside:
      raise UserError(
        f"model.slstm_at names the blocks {outside}, but a model of "
        f"{self.num_blocks} blocks has indices 0 to {self.num_blocks - 1}."
      )
    if self.pattern:
      self._check_pattern()

  def _check_pattern(self):
    unknown = [kind for kind in self.pattern if kind not in KINDS]
    if unknown:
      raise UserError(
        f"model.pattern names {shown(unknown[0])}; the kinds of blocks are "
        f"{', '.join(KINDS)}."
      )
    if len(self.pattern) > self.num_blocks:
      raise UserError(
        f"model.pattern has {len(self.pattern)} blocks, but model.num_blocks "
        f"is {self.num_blocks}: shorten the pattern, or raise num_blocks."
      )
    if self.slstm_at or self.mlstm_block != "paper":
      raise UserError(
        f"model.pattern is {shown(self.pattern)} and names the kinds of all "
        "blocks: leave model.slstm_at and model.mlstm_block at their defaults."
      )

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kind of every block, first to last."""
    if not self.pattern:
      return xlstm_kinds(self.mlstm_block, self.slstm_at, self.num_blocks)
    period = len(self.pattern)
    return tuple(self.pattern[at % period] for at in range(self.num_blocks))

  @property
  def kinds_used(self) -> dict[str, tuple[Kind, Any]]:
    """The row of each kind of block in the model, and its configuration."""
    return {
      kind: (KINDS[kind], getattr(self, kind))
      for kind in sorted(set(self.kinds))
    }

  def has_feedforward(self, kind: str) -> bool:
    """Whether a feed-forward follows the mixer in blocks of this kind."""
    return KINDS[kind].feedforward(getattr(self, kind))


@dataclasses.dataclass(frozen=True)
class Stack:
  """Consecutive blocks that repeat: the blocks of `unit`, `repeats` times.

  Attributes:
    start: Index of the first block.
    unit: Kinds of the blocks of one repetition.
    repeats: Number of repetitions.
  """

  start: int
  unit: tuple[str, ...]
  repeats: int


def stacks(kinds: tuple[str, ...]) -> tuple[Stack, ...]:
  """The model as stacks: one of the repeating pattern, or one per kind.

  A model whose blocks repeat as a whole is one stack. Any other model has one
  for every stretch of blocks of one kind. This alone decides the shape of the
  parameter tree: the parameters of the `repeats` blocks at one place of a stack
  are stacked along a leading axis.
  """
  for period in range(1, len(kinds) // 2 + 1):
    repeats = len(kinds) // period
    if kinds == kinds[:period] * repeats:
      return (Stack(0, kinds[:period], repeats),)
  found = []
  for at, kind in enumerate(kinds):
    if found and found[-1].unit == (kind,):
      found[-1] = dataclasses.replace(found[-1], repeats=found[-1].repeats + 1)
    else:
      found.append(Stack(at, (kind,), 1))
  return tuple(found)
