"""Blocks, the language model, named sizes, parameter and FLOP counts."""
