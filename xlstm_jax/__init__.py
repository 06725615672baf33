"""Pre-train xLSTM language models in JAX, on GPUs and TPUs."""

__version__ = "0.1.0"
