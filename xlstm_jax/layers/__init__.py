"""Small Flax modules that the mixers and blocks are made of."""
