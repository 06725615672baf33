"""The mLSTM on TPUs."""
