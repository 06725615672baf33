"""Holds the Hopper kernels to the contract, in interpret mode on any device.

    NPROC=16 python interpret_pallas_gpu.py CHUNK TIME GATE...

A program of its own, for XLA's CPU client needs more threads than a small
machine has cores: those of a kernel wait for each other inside callbacks.
"""

import functools
import sys

import mlstm_contract as contract
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlstm_jax.cells.mlstm import backends, pallas_gpu


def main(chunk: int, time: int, gates: list[str]) -> None:
  pallas_gpu.device_refusal = lambda: None
  backends.KERNELS["pallas_gpu"] = functools.partial(
    pallas_gpu.pallas_gpu, interpret=plgpu.InterpretGPUParams()
  )
  form = contract.Form(
    "pallas_gpu", chunk, dtypes=("bfloat16",), dims=(64, 128)
  )
  for gate in gates:
    contract.check_rounded(form, gate, time, dtype="bfloat16")


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
