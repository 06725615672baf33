"""The sLSTM and the LSTM on TPUs."""
