"""Plans by the compilers of machines that are not there."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small_7b
from jax.experimental import pallas as pl

from xlstm_jax import sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models import counts
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.plan import machines, program
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = f"--config={EXPERIMENTS / 'quickstart.py'}"
SMALL_7B = f"--config={small_7b.__file__}"

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
    # What is compiled for a machine that is not there cannot be kept.
    env=os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    capture_output=True,
    text=True,
    check=False,
  )
  written = json.loads(file.read_text()) if file.exists() else None
  return done.returncode, done.stdout, done.stderr, written


# Of what a device has: room for other versions of the compiler, and for what
# JAX allocates besides.
MOST = 0.9


@pytest.mark.parametrize(
  ("experiment", "topology", "overrides"),
  [
    # Of the other sizes [7:1] takes many minutes to compile.
    pytest.param("xlstm_125m.py:7:1", None, (), marks=for_gpus),
    pytest.param("xlstm_125m.py", None, (), marks=for_gpus),
    pytest.param("xlstm_350m.py", None, (), marks=for_gpus),
    pytest.param("xlstm_1b.py", None, (), marks=for_gpus),
    pytest.param("xlstm_7b.py", None, (), marks=for_gpus),
    pytest.param(
      "xlstm_7b.py",
      "v5p:8x8x8",
      ("mesh.data=64", "mesh.fsdp=8", "accumulation=1"),
      marks=for_tpus,
    ),
  ],
)
def test_an_experiment_fits_the_machine_that_it_names(
  tmp_path, monkeypatch, experiment, topology, overrides
):
  """Or another one, with what its docstring says to override."""
  for name in machines.FRACTIONS:
    monkeypatch.delenv(name, raising=False)
  file = EXPERIMENTS / experiment.partition(":")[0]
  topology = topology or runpy.run_path(str(file))["MACHINE"]
  status, _, err, found = plan(
    tmp_path,
    f"--config={EXPERIMENTS / experiment}",
    f"--topology={topology}",
    *(f"--config.{override}" for override in overrides),
  )
  assert status == 0, err
  assert found["topology"] == topology
  assert found["peak_bytes"] <= MOST * found["memory"]


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
@pytest.mark.parametrize(
  ("topology", "devices", "slices", "kind", "gib"),
  [
    ("v5p:2x2x4", 16, 1, "TPU v5", 95.73),
    ("v6e:4x4", 16, 1, "TPU v6 lite", 31.24),
    ("v5e:2x2*3", 12, 3, "TPU v5 lite", 15.75),
  ],
)
def test_tpus_are_described(topology, devices, slices, kind, gib):
  found = machines.machine(topology)
  assert len(found.devices) == devices
  assert {d.device_kind for d in found.devices} == {kind}
  assert {getattr(d, "slice_index", 0) for d in found.devices} == set(
    range(slices)
  )
  assert found.memory == found.device_memory == int(gib * 2**30)


@for_gpus
def test_h100s_are_described(monkeypatch):
  for name in machines.FRACTIONS:
    monkeypatch.delenv(name, raising=False)
  found = machines.machine("h100:12")
  assert len(found.devices) == 12
  assert {d.device_kind for d in found.devices} == {"NVIDIA H100 80GB HBM3"}
  assert found.memory == int(0.75 * 85_017_493_504)


@for_tpus
def test_two_slices_are_joined_by_replicas(tmp_path):
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
  arguments = (SMALL_7B, "--topology=v5e:2x2*2", *mesh)
  status, _, err, found = plan(tmp_path, *arguments)
  assert status == 2
  assert found is None
  assert "are in 2 slices" in err
  assert "set mesh.slices=2" in err
  status, out, err, found = plan(tmp_path, *arguments, "--config.mesh.slices=2")
  assert status == 0, err
  assert "8 x TPU v5 lite (v5e:2x2*2)" in out
  assert "mLSTM        pallas_tpu (kernel)" in out
  assert found["collectives"]["all-gather"]["times"] > 0
  # Of every gradient each replica has a quarter on a device.
  shares = 2 * found["parameters"] / 4
  assert found["collectives"]["all-reduce"]["bytes"] > 0.9 * shares


@for_tpus
def test_a_lack_of_vmem_is_not_taken_for_one_of_hbm():
  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  device = machines.machine("v5e:2x2").devices[0]
  x = jax.ShapeDtypeStruct(
    (8192, 2048),
    jnp.float32,
    sharding=jax.sharding.SingleDeviceSharding(device),
  )
  lowered = jax.jit(pl.pallas_call(double, out_shape=x)).lower(x)
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    lowered.compile()
  assert "Ran out of memory in memory space vmem" in str(error.value)
  assert program.out_of_memory(str(error.value)) is None


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
    SMALL_7B,
    "--topology=h200:64",
    "--config.batch_size=64",
    "--config.mesh.data=8",
    "--config.mesh.fsdp=8",
  )
  assert status == 0, err
  assert found["device_kind"] == "NVIDIA H200"
  # Replicas sum the eighth of every gradient that a device keeps, which an
  # all-reduce moves twice: in bfloat16, the embedding's in float32.
  moved = {kind: of["bytes"] for kind, of in found["collectives"].items()}
  assert moved["reduce-scatter"] == pytest.approx(scattered(), rel=0.02)
  model = small_7b.CFG.model
  embedding = model.vocab_size * model.width
  sums = 2 * (2 * found["parameters"] + 2 * embedding) / 8
  assert moved["all-reduce"] == pytest.approx(sums, rel=0.02)


@for_gpus
def test_a_deterministic_step_sums_no_gradient_by_atomic_additions():
  """As that of the embedding is otherwise, in the order in which they come."""
  machine = machines.machine("h200:1")
  sorted_by = {}
  for deterministic in (False, True):
    compute = Compute(dtype="float32", deterministic=deterministic)
    cfg = RunConfig(
      model=ModelConfig(vocab_size=64, width=32, num_blocks=1),
      data=DataConfig(context=32),
      compute=compute,
      batch_size=2,
    )
    definition = Definition(cfg.model, compute)
    mesh = sharding.make_mesh(cfg.mesh, machine.devices)
    with jax.set_mesh(mesh):
      lowered = steps.compiled(definition, cfg, mesh).lower(
        states.abstract(definition, mesh, cfg.optim),
        steps.abstract_batch(cfg, mesh),
      )
    lines = lowered.compile().as_text().splitlines()
    sorted_by[deterministic] = [
      "indices_are_sorted=true, unique_indices=true" in line
      for line in lines
      if " scatter(" in line
    ]
  assert sorted_by == {False: [False], True: [True]}


@for_gpus
def test_gpus_reduce_and_scatter_every_gradient_once(tmp_path):
  status, _, err, found = plan(tmp_path, SMALL_7B, "--topology=h200:8")
  assert status == 0, err
  moved = {kind: of["bytes"] for kind, of in found["collectives"].items()}
  assert moved["reduce-scatter"] == pytest.approx(scattered(), rel=0.02)
  assert moved["all-reduce"] < 0.02 * moved["reduce-scatter"]


def scattered() -> int:
  """Bytes of the gradients but for the embedding's, which has its columns."""
  model = small_7b.CFG.model
  return 2 * (counts.parameters(model) - model.vocab_size * model.width)


@for_gpus
def test_nothing_is_communicated_for_a_kernel(tmp_path):
  """Nothing that the native form would not communicate as well."""
  moved = {}
  for backend in ("chunkwise", "pallas_gpu"):
    status, out, err, found = plan(
      tmp_path,
      SMALL_7B,
      "--topology=h200:8",
      "--config.mesh.fsdp=4",
      "--config.mesh.tensor=2",
      f"--config.compute.mlstm_backend={backend}",
    )
    assert status == 0, err
    moved[backend] = {k: t["bytes"] for k, t in found["collectives"].items()}
  assert "mLSTM        pallas_gpu (kernel)" in out
  for kind, size in moved["pallas_gpu"].items():
    assert size <= 1.02 * moved["chunkwise"].get(kind, 0), kind
