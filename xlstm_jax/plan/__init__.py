"""The training step compiled for machines one does not have."""
