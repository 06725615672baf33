"""One of two processes that the grace ends: INDEX PORT EARLY."""

import sys
import threading

from xlstm_jax.config import LimitsConfig
from xlstm_jax.runtime import peers, processes
from xlstm_jax.runtime.interrupt import Interrupt

index, port, early = map(int, sys.argv[1:])
processes.join(
  processes.Processes(f"localhost:{port}", 2, index),
  LimitsConfig(join_seconds=600),
)
stopped = Interrupt()
stopped.grace, stopped.early = 20.0, early
talking = peers.Peers(
  passed=lambda: stopped.passed, doing=lambda: "data", heard=stopped.note
)
stopped.connect(talking.agree)
peers._client().wait_at_barrier("both", 600_000)
if index == 0:
  stopped.note("SIGTERM")
# As in a wait for what does not come.
threading.Event().wait()
