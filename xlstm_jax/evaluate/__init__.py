"""Exact perplexity and bits per byte of a trained model."""
