"""Holds the Hopper kernels to the contract, in interpret mode on any device.

    NPROC=16 python interpret_pallas_gpu.py CHUNK TIME KEYS VALUES \
      INPUT_GATE GATE...

A program of its own, for XLA's CPU client needs more threads than a small
machine has cores: those of a kernel wait for each other inside callbacks.
"""

import functools
import sys

import mlstm_contract as contract
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlstm_jax.cells.mlstm import backends, pallas_gpu


def main(
  chunk: int,
  time: int,
  dims: tuple[int, int],
  input_gate: str,
  gates: list[str],
):
  pallas_gpu.device_refusal = lambda: None
  backends.KERNELS["pallas_gpu"] = functools.partial(
    pallas_gpu.pallas_gpu, interpret=plgpu.InterpretGPUParams()
  )
  form = contract.Form("pallas_gpu", chunk, dtypes=("bfloat16",), dims=dims)
  for gate in gates:
    options = contract.Options(input_gate=input_gate)
    contract.check_rounded(form, gate, time, options, dtype="bfloat16")


if __name__ == "__main__":
  chunk, time, keys, values = map(int, sys.argv[1:5])
  main(chunk, time, (keys, values), sys.argv[5], sys.argv[6:])
