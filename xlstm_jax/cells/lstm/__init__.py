"""The LSTM of the textbooks, its recurrent matrices one per head."""

from xlstm_jax.cells.lstm.backends import BACKENDS, lstm, lstm_step
from xlstm_jax.cells.lstm.recurrent import State, empty_state

__all__ = ["BACKENDS", "State", "empty_state", "lstm", "lstm_step"]
