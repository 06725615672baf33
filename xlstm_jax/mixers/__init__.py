"""Sequence mixers with parameters: (x, state, segments) -> (y, state)."""
