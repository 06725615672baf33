"""Trains like `python -m xlstm_jax.train`; a save fails at once in PROCESS.

    python failing_save.py PROCESS STEP [as xlstm_jax.train]

Before it meets the others there, so that these wait for it.
"""

import runpy
import sys

import jax
import orbax.checkpoint as ocp

process, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
save = ocp.CheckpointManager.save


def failing(self, at, *args, **options):
  if at == step and jax.process_index() == process:
    raise OSError(28, "No space left on device")
  return save(self, at, *args, **options)


if __name__ == "__main__":
  ocp.CheckpointManager.save = failing
  runpy.run_module("xlstm_jax.train", run_name="__main__", alter_sys=True)
