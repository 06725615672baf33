"""What a language model is: every choice that changes the function."""

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
    vocab_size: rows of the embedding; at least the tokenizer's.
    width: channels of the residual stream.
    num_blocks: blocks, of all kinds.
    mlstm_block: "paper" (pre-up-projection, no feed-forward) or "large" (the
      7B model's, with a feed-forward after it).
    slstm_at: indices of the blocks that are sLSTM; the others are mLSTM.
    pattern: Kinds of the blocks, from the first on and over again, for models
      of any kinds of blocks; () for those that mlstm_block and slstm_at name.
    feedforward: of the blocks that have one: sLSTM blocks where
      `slstm.feedforward` is set, and "large" mLSTM blocks.
    norm: before mixers and feed-forwards, and after the last block.
    head_norm: of the cells' outputs, per head.
    out_norm: norm after the last block.
    out_norm_bias: that norm has a bias where `norm` has one.
    post_norm: norm each branch's output before it joins the residual stream.
    tie_embeddings: the vocabulary projection is the embedding.
    logit_cap: soft cap of the logits; None for none.
    dropout: of branch outputs.
    embedding_dropout: apply `dropout` to the embeddings too.
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
    """Refuses what no model can be.

    Raises:
      UserError: a size below 1 or no integer, sLSTM positions that are no
        integers or outside the model, or a pattern of unknown kinds, of more
        blocks than there are, or beside another choice of blocks.
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
class BlockRun:
  """Consecutive blocks that repeat: `unit` stands `repeats` times.

  Attributes:
    start: index of the first block.
    unit: kinds of the blocks of one repetition.
    repeats: how often it stands.
  """

  start: int
  unit: tuple[str, ...]
  repeats: int


def runs(kinds: tuple[str, ...]) -> tuple[BlockRun, ...]:
  """The model as runs: of the repeating pattern, else of one kind each.

  This alone decides the shape of the parameter tree: the parameters of the
  `repeats` blocks at one place of a run are stacked along a leading axis.
  """
  for period in range(1, len(kinds) // 2 + 1):
    repeats = len(kinds) // period
    if kinds == kinds[:period] * repeats:
      return (BlockRun(0, kinds[:period], repeats),)
  found = []
  for at, kind in enumerate(kinds):
    if found and found[-1].unit == (kind,):
      found[-1] = dataclasses.replace(found[-1], repeats=found[-1].repeats + 1)
    else:
      found.append(BlockRun(at, (kind,), 1))
  return tuple(found)
