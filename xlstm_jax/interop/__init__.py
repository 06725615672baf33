"""Checkpoints of other implementations, read and written as safetensors."""
