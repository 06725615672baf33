"""Holds the recurrent kernels to the contract, in interpret mode on any device.

    NPROC=16 python interpret_recurrence_gpu.py CELL UNITS GATE... [FAULT...]

The contract has to hold at every gate, and to find every fault at the first.

A program of its own, for XLA's CPU client needs more threads than a small
machine has cores: those of a kernel wait for each other inside callbacks.
"""

import dataclasses
import functools
import sys
from unittest import mock

import mlstm_contract
import test_recurrent_cells as contract
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlstm_jax.cells.recurrence_gpu import arrays, backend

TIME = 7


def no_starts(marks):
  """Documents go on from the state of those before them."""
  return (marks & 0) != 0


def no_padding(marks):
  """Padding changes the state."""
  return (marks & 0) != 0


def back_without_memories(local, dh, dmemories, back=backend.SLSTM.back):
  """The memories' gradients end at the step that they reach."""
  dgates, dbefore = back(local, dh, dmemories)
  return dgates, tuple(0 * x for x in dbefore)


FAULTS = {
  "no_starts": mock.patch.object(arrays, "starts", no_starts),
  "no_padding": mock.patch.object(arrays, "is_padding", no_padding),
  "back_without_memories": mock.patch.object(
    backend, "SLSTM", backend.SLSTM._replace(back=back_without_memories)
  ),
}


def main(cell: str, units: int, names: list[str]) -> None:
  registry = contract.CELLS[cell][0].BACKENDS
  form = registry.backends["pallas_gpu"]
  registry.backends["pallas_gpu"] = dataclasses.replace(
    form,
    run=functools.partial(form.run, interpret=plgpu.InterpretGPUParams()),
    why_not=lambda device, shapes: None,
  )
  gates = [name for name in names if name not in FAULTS]

  def shares(gate, time=TIME):
    kernel = contract.Form("pallas_gpu", units, scaled=True)
    return contract.rounded_shares(
      cell, gate, time, dtype="bfloat16", form=kernel
    )

  mlstm_contract.check(shares(gates[0], time=1))
  for gate in gates:
    mlstm_contract.check(shares(gate))
  for name in names[len(gates) :]:
    contract.program.cache_clear()
    with FAULTS[name]:
      worst = max(shares(gates[0]).values())
    assert worst > 1, f"{name} is not found: {worst}"


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
