"""Holds the Hopper kernels to the contract, in interpret mode on any device.

    NPROC=16 python interpret_mlstm_hopper.py CHUNK TIME KEYS VALUES \
      INPUT_GATE GATE...

With MUTATION in the environment the backend has that fault, which the contract
is to find.

A program of its own, for XLA's CPU client needs more threads than a small
machine has cores: those of a kernel wait for each other inside callbacks.
"""

import dataclasses
import functools
import os
import sys

import jax.numpy as jnp
import mlstm_contract as contract
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlstm_jax.cells.mlstm import backends, hopper
from xlstm_jax.cells.mlstm.hopper import vjp


def leak(*args, scales=vjp.scales, **options):
  """Tokens of a chunk see documents before their own."""
  found = scales(*args, **options)
  return found._replace(first_BT=jnp.zeros_like(found.first_BT))


def constant_normaliser(*args, readout=vjp._readout_backward):
  """The normaliser counts as a constant, as in other kernels."""
  bias, reading = readout(*args)
  return jnp.zeros_like(bias), reading


def late_read(*args, scales=vjp.scales, **options):
  """Gradients of a chunk see documents after their own."""
  found = scales(*args, **options)
  last = options["chunk"] - 1
  return found._replace(final_BT=jnp.full_like(found.final_BT, last))


def one_part(*args, parts=vjp.parts_of_states, **options):
  """C is rounded to 8 bits where few tokens rule it, too, and n is not."""
  return jnp.ones_like(parts(*args, **options))


def mutate(name: str) -> None:
  match name:
    case "one_part":
      vjp.parts_of_states = one_part
    case "constant_normaliser":
      vjp._readout_backward = constant_normaliser
    case "leak":
      vjp.scales = leak
    case "late_read":
      vjp.scales = late_read
    case _:
      raise ValueError(name)


def main(
  chunk: int,
  time: int,
  dims: tuple[int, int],
  input_gate: str,
  gates: list[str],
):
  forms = backends.BACKENDS.backends
  forms["pallas_gpu"] = dataclasses.replace(
    forms["pallas_gpu"],
    run=functools.partial(
      hopper.pallas_gpu, interpret=plgpu.InterpretGPUParams()
    ),
    why_not=lambda device, shapes: None,
  )
  if "MUTATION" in os.environ:
    mutate(os.environ["MUTATION"])
  form = contract.Form("pallas_gpu", chunk, dtypes=("bfloat16",), dims=dims)
  for gate in gates:
    options = contract.Options(input_gate=input_gate)
    contract.check_rounded(form, gate, time, options, dtype="bfloat16")


if __name__ == "__main__":
  chunk, time, keys, values = map(int, sys.argv[1:5])
  main(chunk, time, (keys, values), sys.argv[5], sys.argv[6:])
