"""Recurrent cells: arrays in, arrays out, on one device, no parameters."""
