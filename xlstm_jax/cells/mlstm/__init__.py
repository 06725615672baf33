"""The mLSTM: a matrix memory with one input and one forget gate per head."""

from xlstm_jax.cells.mlstm.backends import BACKENDS, Shapes, mlstm, mlstm_step
from xlstm_jax.cells.mlstm.state import State, empty_state

__all__ = ["BACKENDS", "Shapes", "State", "empty_state", "mlstm", "mlstm_step"]
