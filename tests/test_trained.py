"""What all that use a trained model share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Counts what the persistent cache answers, for a program of no time at all.
PROGRAM = """
import sys
import jax
from xlstm_jax import trained
from xlstm_jax.config import RunConfig

hits = []
jax.monitoring.register_event_listener(
  lambda event, **_: hits.append(event) if "cache_hits" in event else None
)
trained.use_compilation_cache(RunConfig(compilation_cache=sys.argv[1] or None))
jax.jit(lambda x: x + 1)(1.0)
print(len(hits))
"""


def hits(cache):
  return int(
    subprocess.run(
      [sys.executable, "-c", PROGRAM, str(cache)],
      env=os.environ
      | {
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      },
      capture_output=True,
      text=True,
      check=True,
    ).stdout
  )


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
  assert hits(tmp_path / "cache") == 0
  assert list((tmp_path / "cache").iterdir())
  assert hits(tmp_path / "cache") >= 1
  assert hits(tmp_path / "other") == 0
