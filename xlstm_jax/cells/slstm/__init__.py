"""The sLSTM: a scalar memory per unit, mixed within heads over time."""

from xlstm_jax.cells.slstm.recurrent import (
  State,
  empty_state,
  slstm,
  slstm_step,
)

__all__ = ["State", "empty_state", "slstm", "slstm_step"]
