"""Plans by the compilers of machines that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = f"--config={EXPERIMENTS / 'quickstart.py'}"

pytestmark = pytest.mark.slow

for_tpus = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
for_gpus = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs jax-cuda13-plugin",
)


def plan(tmp_path, *arguments):
  """Status, printed page, error text and JSON of the command."""
  file = tmp_path / "plan.json"
  done = subprocess.run(
    [sys.executable, "-m", "xlstm_jax.plan", f"--json={file}", *arguments],
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  written = json.loads(file.read_text()) if file.exists() else None
  return done.returncode, done.stdout, done.stderr, written


@for_tpus
def test_125m_on_16_tpu_chips(tmp_path):
  status, out, err, found = plan(
    tmp_path,
    f"--config={EXPERIMENTS / 'xlstm_125m.py'}",
    "--topology=v5e:4x4",
    "--config.accumulation=16",
  )
  assert status == 0, err
  assert "16 x TPU v5 lite" in out
  assert found["parameters"] == 163_806_144
  # Parameters whole on every chip, and two moments.
  assert found["parameter_bytes"] == 4 * found["parameters"]
  assert found["peak_bytes"] < found["memory"] == int(15.75 * 2**30)
  # Gradients are summed over the replicas.
  assert found["collectives"]["all-reduce"]["bytes"] > found["parameters"]


@for_tpus
def test_256_tpu_chips(tmp_path):
  status, _, err, found = plan(
    tmp_path,
    SMALL,
    "--topology=v5e:16x16",
    "--config.batch_size=256",
    "--config.mesh.data=32",
    "--config.mesh.fsdp=8",
  )
  assert status == 0, err
  assert found["devices"] == 256
  assert found["collectives"]["all-gather"]["times"] > 0


@for_tpus
def test_a_step_that_does_not_fit_a_tpu_says_so(tmp_path):
  status, out, err, found = plan(
    tmp_path,
    SMALL,
    "--topology=v5e:2x2",
    f"--config.batch_size={2**18}",
  )
  assert status == 1, err
  assert "IT DOES NOT FIT" in out
  assert found["peak_bytes"] > found["memory"]


@for_gpus
def test_64_gpus_of_8_nodes(tmp_path):
  status, _, err, found = plan(
    tmp_path,
    SMALL,
    "--topology=h200:64",
    "--config.batch_size=64",
    "--config.mesh.data=8",
    "--config.mesh.fsdp=8",
  )
  assert status == 0, err
  assert found["device_kind"] == "NVIDIA H200"
  assert found["collectives"]["reduce-scatter"]["times"] > 0
