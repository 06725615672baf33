"""One of two processes that talk to each other: INDEX PORT."""

import sys
import time

import jax

from xlstm_jax.config import LimitsConfig
from xlstm_jax.runtime import peers, processes
from xlstm_jax.runtime.interrupt import Interrupt

# Seconds on a machine that is busy with others.
PATIENCE = 600

index, port = map(int, sys.argv[1:])
processes.join(
  processes.Processes(f"localhost:{port}", 2, index),
  LimitsConfig(join_seconds=PATIENCE, heartbeat_seconds=PATIENCE),
)
client = peers._client()


def meet(name):
  client.wait_at_barrier(name, 1000 * PATIENCE)


stopped = Interrupt()
# No end by the grace on a machine that is busy with others.
stopped.grace = 1e6
talking = peers.Peers(
  passed=lambda: stopped.passed, doing=lambda: "step", heard=stopped.note
)
for _ in range(3 + index):
  assert not stopped.reached()

# The one that passed less is told by name, and then agrees with the other.
deadline = time.monotonic() + PATIENCE
wanted = "process 0 is 1 behind, at step"
while (behind := talking.behind()) != wanted:
  assert time.monotonic() < deadline, behind
  time.sleep(0.05)
meet("told")
stopped.connect(talking.agree)
if index == 0:
  stopped.note("SIGTERM")
while stopped._stop_at is None:
  assert time.monotonic() < deadline
  time.sleep(0.05)
print("passes", sum(not stopped.reached() for _ in range(9)), flush=True)
stopped.close()

# Process 1 falls silent, and does not come.
meet("agreed")
if index == 1:
  talking.close()
else:
  while "process 1 is silent for" not in (behind := talking.behind()):
    assert time.monotonic() < deadline, behind
    time.sleep(0.5)
  try:
    peers.meet("rollback 1", seconds=0.5)
  except peers.Missing as error:
    print(error, flush=True)
  talking.close()
meet("end")
jax.distributed.shutdown()
