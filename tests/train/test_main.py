"""How the command leaves, of several processes too."""

import os
import subprocess
import sys

from small_run import PATIENCE, free_port

from xlstm_jax.train import __main__ as command

# A thread that Python would wait for, and a process that JAX would.
ENDING = """
import sys, threading
from xlstm_jax.config import LimitsConfig
from xlstm_jax.train import __main__ as command
from xlstm_jax.runtime import peers, processes

index, port = map(int, sys.argv[1:])
processes.join(
  processes.Processes(f"localhost:{port}", 2, index),
  LimitsConfig(join_seconds=600),
)
threading.Thread(target=threading.Event().wait).start()
client = peers._client()
client.wait_at_barrier("both", 600_000)
# Far longer than the other one needs on a machine that is busy with others.
command._LAST_SECONDS = 15.0
print("said last", end="")
if index == 0:
  client.key_value_set("first", "")
  command.end(4)
client.blocking_key_value_get("first", 600_000)
command.end(3)
"""


def test_processes_end_with_their_own_status_whatever_waits():
  port = str(free_port())
  hosts = [
    subprocess.Popen(
      [sys.executable, "-c", ENDING, str(index), port],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"XLA_FLAGS": ""},
    )
    for index in range(2)
  ]
  ends = [host.communicate(timeout=PATIENCE) for host in hosts]
  # JAX would make them 134, the second one's at once.
  assert [host.returncode for host in hosts] == [4, 3], ends
  assert [output for output, _ in ends] == ["said last"] * 2


def test_the_first_process_waits_for_the_others():
  assert 1 < command._LAST_SECONDS < 10
