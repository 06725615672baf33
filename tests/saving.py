"""One of two processes that save together: INDEX PORT FOLDER.

Of the steps 1 to 4, the first process cannot commit step 2, and the second
cannot write its part of step 3.
"""

import os
import sys
import time

import jax
import numpy as np

from xlstm_jax import checksums
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints, _Barriers

index, port = map(int, sys.argv[1:3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
mesh = jax.make_mesh((2,), ("x",))
where = jax.NamedSharding(mesh, jax.P("x"))
x = jax.make_array_from_callback(
  (4,), where, lambda at: np.arange(4, dtype=np.float32)[at]
)
step = 1
write, wait = checksums.write, _Barriers.__call__


def full(*args):
  if step == 2:
    raise OSError(28, "No space left on device")
  write(*args)


def broken(self, *, key, timeout_ms):
  if step == 3 and index == 1 and "async_write_complete" in key:
    raise OSError(5, "Input/output error")
  wait(self, key=key, timeout_ms=timeout_ms)


checksums.write, _Barriers.__call__ = full, broken
# The descriptor by which the folder is reached is another one on each.
others = [os.dup(0) for _ in range(index)]
checkpoints = Checkpoints(
  sys.argv[3], CheckpointConfig(keep_latest=1, keep_best=0)
)
begun = time.monotonic()
for step in range(1, 5):
  checkpoints.save(step, {"params": {"x": x}, "progress": {"step": step}})
  print(step, checkpoints.failure(wait=True), checkpoints.steps(), flush=True)
checkpoints.close()
# Orbax would wait for twenty minutes.
assert time.monotonic() - begun < 600
jax.distributed.shutdown()
