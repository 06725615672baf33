"""The sLSTM: a scalar memory per unit, mixed within heads over time."""

from xlstm_jax.cells.slstm.backends import BACKENDS, slstm, slstm_step
from xlstm_jax.cells.slstm.recurrent import State, empty_state

__all__ = ["BACKENDS", "State", "empty_state", "slstm", "slstm_step"]
