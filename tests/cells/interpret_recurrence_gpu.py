"""Holds the recurrent kernels to the contract, in interpret mode on any device.

    NPROC=16 python interpret_recurrence_gpu.py CELL UNITS GATE...

With MUTATION in the environment the kernels have that fault, which the contract
is to find.

A program of its own, for XLA's CPU client needs more threads than a small
machine has cores: those of a kernel wait for each other inside callbacks.
"""

import dataclasses
import functools
import os
import sys

import mlstm_contract
import test_recurrent_cells as contract
from jax.experimental.pallas import mosaic_gpu as plgpu

TIME = 7


def main(cell: str, units: int, gates: list[str]) -> None:
  registry = contract.CELLS[cell][0].BACKENDS
  backend = registry.backends["pallas_gpu"]
  registry.backends["pallas_gpu"] = dataclasses.replace(
    backend,
    run=functools.partial(backend.run, interpret=plgpu.InterpretGPUParams()),
    why_not=lambda device, shapes: None,
  )
  form = contract.Form("pallas_gpu", units, scaled=True)
  for gate in gates:
    mlstm_contract.check(
      contract.rounded_shares(
        cell, gate, TIME, dtype="bfloat16", form=form
      )
    )


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
