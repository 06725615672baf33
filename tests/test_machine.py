"""Machines that are not what was asked for are told in a sentence."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax import jax_internals, machine
from xlstm_jax.errors import exit_code

ROOT = Path(__file__).parent.parent


def refused(main, capsys):
  """What a command says as it ends with status 2, in one line."""
  assert exit_code(main, less_memory="Take less.") == 2
  told = capsys.readouterr().err
  assert told.startswith("error: ")
  assert told.count("\n") == 1
  return told


def run(code, **environment):
  return subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    capture_output=True,
    text=True,
    errors="surrogateescape",
    timeout=900,
    check=False,
  )


ASKS_JAX = """
import sys
import jax
from xlstm_jax.errors import exit_code
sys.exit(exit_code(lambda: {}))
"""


@pytest.mark.parametrize(
  ("name", "value", "first"),
  [
    ("JAX_PLATFORMS", "nonsense", "jax.devices()"),
    # JAX has the first one by the time it fails; it cuts this traceback.
    ("JAX_PLATFORMS", "cpu,nonsense", "jax.jit(lambda: 1)()"),
    ("JAX_PLATFORM_NAME", "nonsense", "jax.process_index()"),
  ],
)
def test_a_platform_that_is_not_there_is_named(name, value, first):
  # Asking for all would look for TPUs.
  there = "jax.config.update('jax_platforms', 'cpu') or "
  asked = first if name == "JAX_PLATFORMS" else there + first
  done = run(ASKS_JAX.format(asked), **{"JAX_PLATFORMS": "", name: value})
  assert done.returncode == 2, done.stderr
  last = done.stderr.splitlines()[-1]
  expected = (
    f"error: {name}={value}, but JAX finds no such device here (it has "
  )
  assert last.startswith(expected)
  assert "nonsense" in last.removeprefix(expected)
  assert "Traceback" not in done.stderr


def test_a_plugin_that_does_not_load_is_named():
  done = run(
    ASKS_JAX.format("jax.devices()"),
    PJRT_NAMES_AND_LIBRARY_PATHS="toy:/nowhere/toy.so",
  )
  assert done.returncode == 2, done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: A plugin of JAX does not load on this machine")
  assert "/nowhere/toy.so" in last


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
  """JAX has no words for it: it fails an assertion while it starts."""
  starting = {"__name__": jax_internals.STARTS_BACKENDS}
  exec("def backends(): assert False", starting)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setattr(machine, "_platforms", lambda: ["cpu"])
  told = refused(starting["backends"], capsys)
  assert told.startswith(
    "error: JAX_PLATFORMS=cuda, but JAX finds no such device here (it has cpu)"
    ": there is no NVIDIA GPU that it can see. "
  )


def test_a_machine_that_fails_unasked_is_told(monkeypatch, capsys):
  def main():
    raise RuntimeError(
      "Unable to initialize backend 'cuda': no driver. (you may need to "
      "uninstall the failing plugin package, or set JAX_PLATFORMS=cpu.)"
    )

  monkeypatch.delenv("JAX_PLATFORMS")
  assert refused(main, capsys) == (
    "error: JAX cannot start the devices of this machine: Unable to initialize "
    "backend 'cuda': no driver. JAX_PLATFORMS=cpu runs without them.\n"
  )


def test_memory_of_a_device_that_runs_out_is_told(capsys):
  told = refused(lambda: print(jnp.zeros(2**44)), capsys)
  assert told.startswith("error: A device ran out of memory (RESOURCE_EXHAUST")
  assert told.endswith("). Take less.\n")


def test_memory_of_the_process_that_runs_out_is_told(capsys):
  told = refused(lambda: print(np.ones(2**50)), capsys)
  assert told.startswith("error: The machine has no memory left for this pro")
  assert "Unable to allocate" in told

  def main():
    raise MemoryError

  assert "for this process: end what" in refused(main, capsys)


@pytest.mark.parametrize(
  "error",
  [
    AssertionError("of ours"),
    RuntimeError("of ours"),
    # Another process did not come: this one may start again.
    RuntimeError("Unable to initialize backend 'tpu': DEADLINE_EXCEEDED: ..."),
    # A kernel asks for more than the memory on the chip.
    jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"
    ),
  ],
)
def test_other_errors_are_defects(error):
  def main():
    raise error

  with pytest.raises(type(error)):
    exit_code(main)


PRINTS = """
import sys
from xlstm_jax.errors import exit_code
sys.exit(exit_code(lambda: print("f\\xfcr \\u4e2d \\udcff")))
"""


@pytest.mark.parametrize(
  ("environment", "shown"),
  [
    ({"PYTHONIOENCODING": "ascii"}, "f\\xfcr \\u4e2d \\udcff"),
    ({"PYTHONIOENCODING": "latin-1"}, "f\udcfcr \\u4e2d \\udcff"),
    ({"PYTHONIOENCODING": "utf-8"}, "f\xfcr \u4e2d \\udcff"),
    (
      {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
      "f\\xfcr \\u4e2d \\udcff",
    ),
  ],
)
def test_what_stdout_cannot_show_is_escaped(environment, shown):
  done = run(PRINTS, **environment)
  assert done.returncode == 0, done.stderr
  assert done.stdout == shown + "\n"
