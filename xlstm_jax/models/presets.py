"""Named sizes, as published (xLSTM paper, table 10; xLSTM-7B paper)."""

from xlstm_jax.errors import UserError
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models.config import ModelConfig

# Width, blocks, and sLSTM positions of the [7:1] model. The positions for 48
# blocks stand in public configurations; those for 24 are recalled, not
# published.
PAPER = {
  "125M": (768, 24, (3, 20)),
  "350M": (1024, 48, (3, 5, 7, 40, 42, 44)),
  "760M": (1536, 48, (3, 5, 7, 40, 42, 44)),
  "1.3B": (2048, 48, (3, 5, 7, 40, 42, 44)),
  "2.7B": (2560, 64, None),
}

# Width, blocks, heads.
LARGE = {
  "165M": (768, 12, 4),
  "400M": (1024, 24, 4),
  "1.3B": (2048, 24, 4),
  "2.7B": (2560, 32, 5),
  "7B": (4096, 32, 8),
}


def paper(size: str, ratio: str = "1:0") -> ModelConfig:
  """A model of the xLSTM paper.

  Args:
    size: a key of `PAPER`.
    ratio: "1:0" for mLSTM blocks only, "7:1" for sLSTM at the paper's places.

  Raises:
    UserError: there is no such model.
  """
  width, num_blocks, slstm_at = _lookup(PAPER, size)
  if ratio not in ("1:0", "7:1") or (ratio == "7:1" and slstm_at is None):
    raise UserError(
      f"There is no published xLSTM[{ratio}] of {size}; use '1:0', or '7:1' up "
      "to 1.3B, or place sLSTM blocks with `every`."
    )
  return ModelConfig(
    width=width,
    num_blocks=num_blocks,
    slstm_at=slstm_at if ratio == "7:1" else (),
  )


def large(size: str) -> ModelConfig:
  """A model of the 7B architecture.

  Args:
    size: a key of `LARGE`.

  Raises:
    UserError: there is no such model.
  """
  width, num_blocks, num_heads = _lookup(LARGE, size)
  return ModelConfig(
    width=width,
    num_blocks=num_blocks,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=num_heads),
    feedforward=FeedForwardConfig(factor=2.667, activation="silu"),
    norm=NormConfig("rms", 1e-6, "direct"),
    head_norm=NormConfig("layer", 1e-6, "direct"),
    logit_cap=30.0,
  )


def every(mlstm: int, slstm: int, num_blocks: int) -> tuple[int, ...]:
  """sLSTM positions of xLSTM[mlstm:slstm] when the pattern simply repeats.

  >>> every(7, 1, 16)
  (7, 15)
  """
  period = mlstm + slstm
  return tuple(at for at in range(num_blocks) if at % period >= mlstm)


def _lookup(table, size):
  if size not in table:
    raise UserError(f"There is no size {size!r}; choose from {list(table)}.")
  return table[size]
