"""The plan of a step, and the search for the best."""

import dataclasses
import json
import types

import jax
import pytest

from xlstm_jax.cells.hopper_gpus import device_refusal
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.plan import __main__ as command
from xlstm_jax.plan import machines, program
from xlstm_jax.plan.collectives import Traffic
from xlstm_jax.sharding import MeshConfig, make_mesh
from xlstm_jax.train import state as states

CFG = RunConfig(
  model=ModelConfig(vocab_size=64, width=32, num_blocks=2, slstm_at=(1,)),
  data=DataConfig(context=16),
  mesh=MeshConfig(data=2, fsdp=4),
)


def machine(memory: int = 2**30) -> machines.Machine:
  return machines.Machine("here", jax.devices(), memory, memory)


@pytest.fixture(scope="module")
def found() -> program.Plan:
  return program.plan(CFG, machine())


def test_a_plan_is_of_the_step_that_trains(found):
  definition = Definition(CFG.model, CFG.compute)
  mesh = make_mesh(CFG.mesh)
  state = states.init(definition, mesh, seed=0)
  device = jax.devices()[0]
  held = sum(
    shard.data.nbytes
    for x in jax.tree.leaves(state.params)
    for shard in x.addressable_shards
    if shard.device == device
  )
  assert found.parameter_bytes == held
  assert 2 * held <= found.optimizer_bytes <= 2 * held + 8
  assert found.batch_bytes == 3 * 4 * 16
  assert found.mesh == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
  assert found.backends == {"mLSTM": "chunkwise", "sLSTM": "recurrent"}
  assert found.fits
  assert found.collectives["all-gather"].times > 0
  stored = held + found.optimizer_bytes + found.batch_bytes
  assert found.peak_bytes > stored + (found.temporary_bytes or 0)


def test_what_is_too_large_does_not_fit(found):
  small = dataclasses.replace(found, memory=found.peak_bytes - 1)
  assert not small.fits
  assert "IT DOES NOT FIT: 100%" in command.describe(small)
  gave_up = dataclasses.replace(found, temporary_bytes=None, peak_bytes=1)
  assert not gave_up.fits
  assert "unknown" in command.describe(gave_up)


def test_what_compilers_say_when_memory_is_short():
  tpu = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    "the total memory required for HLO temporaries (15.96G) exceeds available "
    "HBM (15.75G). HLO module: jit_train_step."
  )
  assert program.out_of_memory(tpu) == int(15.96 * 2**30)
  older = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.25G of "
    "15.75G hbm. Exceeded hbm capacity by 15.50G."
  )
  assert program.out_of_memory(older) == int(31.25 * 2**30)
  assert program.out_of_memory("INTERNAL: something else (2.0G)") is None


@pytest.mark.parametrize(
  "message",
  [
    "Ran out of memory in memory space vmem. Used 25.00M of 16.00M vmem.",
    "E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem "
    "while allocating on stack for %k. Scoped allocation with size 128.00M and "
    "limit 16.00M exceeded scoped vmem limit by 112.00M.",
  ],
)
def test_a_lack_of_other_memory_is_no_plan(monkeypatch, message):
  def refuse(self):
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
  with pytest.raises(jax.errors.JaxRuntimeError, match="space vmem"):
    program.plan(CFG, machine())


def test_the_search_ends_with_the_largest_batch(monkeypatch):
  """With memory per row that recomputation lowers: 5, 5, and 2."""
  monkeypatch.setattr(program, "plan", pretend)
  plans = list(program.search(CFG, machine(memory=11)))
  assert [(p.remat, p.batch_size) for p in plans] == [
    ("none", 8),
    ("none", 16),
    ("none", 32),
    ("none", 24),
    ("matmuls", 24),
    ("block", 24),
    ("block", 48),
    ("block", 32),
    ("block", 40),
  ]
  best = [p for p in plans if p.fits][-1]
  assert (best.remat, best.batch_size) == ("block", 40)


@pytest.mark.parametrize("memory", [0, 1, 5, 6, 1000, 12_345])
def test_the_search_misses_no_batch_and_tries_few(monkeypatch, memory):
  monkeypatch.setattr(program, "plan", pretend)
  plans = list(program.search(CFG, machine(memory)))
  largest = {r: memory // p for r, p in PER_ROW.items()}
  sizes = [p.batch_size // 8 for p in plans if p.fits]
  assert max(sizes, default=0) == max(largest.values())
  assert sizes == sorted(sizes)
  assert len(plans) <= 3 + 4 * max(largest.values()).bit_length()


# Bytes per 8 rows.
PER_ROW = {"none": 5, "matmuls": 5, "block": 2}


def pretend(cfg, machine):
  """A plan in which a row takes what `PER_ROW` says."""
  return dataclasses.replace(
    TEMPLATE,
    batch_size=cfg.batch_size,
    remat=cfg.compute.remat,
    peak_bytes=PER_ROW[cfg.compute.remat] * cfg.batch_size // 8,
    memory=machine.memory,
    device_memory=machine.memory,
  )


TEMPLATE = program.Plan(
  topology="here",
  platform="cpu",
  device_kind="cpu",
  devices=8,
  mesh={"data": 2, "fsdp": 4},
  batch_size=8,
  context=16,
  accumulation=1,
  remat="none",
  backends={"mLSTM": "chunkwise", "sLSTM": "recurrent"},
  kernels=(),
  without_kernel=("sLSTM",),
  parameters=1,
  flops_per_token=1.0,
  seconds_at_peak=None,
  parameter_bytes=1,
  optimizer_bytes=1,
  batch_bytes=1,
  temporary_bytes=1,
  program_bytes=1,
  peak_bytes=1,
  memory=1,
  device_memory=1,
  collectives={},
  compile_seconds=0.0,
)


def test_a_batch_that_does_not_divide_is_a_sentence():
  cfg = dataclasses.replace(CFG, batch_size=12)
  with pytest.raises(UserError, match="multiple of 8"):
    program.plan(cfg, machine())


@pytest.mark.parametrize(
  "topology",
  [
    *("v5e", "v5e:0x4", "v5e:16", "v5e:4*2", "v5e:4x4*", "v5e:4x4*0"),
    *("h200", "h200:0", "h200:8*2", "b200:8", ""),
  ],
)
def test_unknown_machines_are_refused(topology):
  with pytest.raises(UserError, match="is not known; give chips of a TPU"):
    machines.machine(topology)


@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v5e:2x2x2", "two dimensions: give it as v5e:8x8"),
    ("v6e:4x4x4*2", "two dimensions: give it as v6e:8x8"),
    ("v5p:8x8", "three dimensions: give it as v5p:8x8x8"),
  ],
)
def test_a_slice_of_other_dimensions_is_refused(topology, message):
  with pytest.raises(UserError, match=message):
    machines.machine(topology)


@pytest.mark.parametrize(
  ("environment", "fraction"),
  [
    ({}, 0.75),
    ({"XLA_CLIENT_MEM_FRACTION": ".9"}, 0.9),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
  ],
)
def test_of_a_gpu_what_jax_takes_is_available(
  monkeypatch, environment, fraction
):
  described(monkeypatch)
  for name in machines.FRACTIONS:
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  found = machines.machine("h100:8")
  assert found.device_memory == 85_017_493_504
  assert found.memory == int(fraction * found.device_memory)


@pytest.mark.parametrize("fraction", ["most", "0", "1.5", "nan"])
def test_a_share_of_memory_that_is_none_is_refused(monkeypatch, fraction):
  described(monkeypatch)
  monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", fraction)
  with pytest.raises(
    UserError, match=f"MEM_FRACTION is '{fraction}'; .*most 1"
  ):
    machines.machine("h100:8")


def described(monkeypatch):
  """Machines are described without what would compile for them."""
  monkeypatch.setattr(machines.importlib.util, "find_spec", lambda _: object())
  monkeypatch.setattr(
    machines.topologies,
    "get_topology_desc",
    lambda **_: types.SimpleNamespace(devices=[]),
  )


@pytest.mark.parametrize(
  ("kind", "reason"),
  [
    ("NVIDIA H100 80GB HBM3", None),
    ("NVIDIA GH200 480GB", None),
    ("NVIDIA A100-SXM4-80GB", "the device is NVIDIA A100-SXM4-80GB"),
  ],
)
def test_kernels_are_for_the_devices_of_the_mesh(kind, reason):
  """And not for those that are here, which only trace."""
  device = jax.sharding.AbstractDevice(kind, num_cores=132, platform="gpu")
  mesh = jax.sharding.AbstractMesh((8,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    found = device_refusal()
  assert found == reason or (reason and found and found.endswith(reason))


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(machines.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="needs the package libtpu"):
    machines.machine("v5e:4x4")


def test_the_page_says_what_was_found():
  h200 = dataclasses.replace(
    TEMPLATE,
    topology="h200:8",
    platform="gpu",
    device_kind="NVIDIA H200",
    parameters=1_234_567,
    flops_per_token=1.5e9,
    seconds_at_peak=0.25,
    parameter_bytes=3 * 2**20,
    temporary_bytes=2**30,
    peak_bytes=2**30 + 2**29,
    memory=3 * 2**30,
    device_memory=4 * 2**30,
    collectives={"all-gather": Traffic(1234, 5 * 2**20)},
    compile_seconds=93.0,
  )
  assert command.describe(h200).splitlines() == [
    "machine      8 x NVIDIA H200 (h200:8)",
    "mesh         data=2 fsdp=4",
    "model        1,234,567 parameters",
    "batch        8 rows of 16 tokens in 1 parts, remat none",
    "mLSTM        chunkwise (native form)",
    "sLSTM        recurrent (native form; there is no GPU kernel yet)",
    "FLOPs        1.5e+09 a token, without recomputation; a step takes 0.25 s "
    "at the peak of all",
    "compiled in  1m33s",
    "",
    "bytes of a device",
    "  parameters         3.0 MiB",
    "  optimizer          0.0 MiB",
    "  batch              0.0 MiB",
    "  temporaries    1,024.0 MiB",
    "  program            0.0 MiB",
    "  peak           1,536.0 MiB",
    "  available      3,072.0 MiB: 75% of 4,096.0 MiB; XLA_CLIENT_MEM_FRACTION "
    "changes it",
    "",
    "It fits: 50% of a device's memory.",
    "",
    "communication of a step      times      MiB of a device",
    "  all-gather                 1,234                  5.0",
  ]


@pytest.mark.parametrize(
  ("platform", "backend", "kernels", "without", "form"),
  [
    (
      *("tpu", "chunkwise", (), ("mLSTM",)),
      "chunkwise (native form; there is no TPU kernel yet)",
    ),
    ("gpu", "pallas_gpu", ("mLSTM",), (), "pallas_gpu (kernel)"),
    ("gpu", "parallel", (), (), "parallel (native form)"),
  ],
)
def test_the_page_says_which_form_computes_the_cells(
  platform, backend, kernels, without, form
):
  found = dataclasses.replace(
    TEMPLATE,
    platform=platform,
    backends={"mLSTM": backend},
    kernels=kernels,
    without_kernel=without,
  )
  lines = command.describe(found).splitlines()
  assert f"mLSTM        {form}" in lines
  # Libtpu leaves what it leaves: there is no share to change.
  assert lines[lines.index("") + 8] == "  available          0.0 MiB"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
  """Arguments of the command, to plan for the devices that are here."""
  file = tmp_path / "experiment.py"
  file.write_text(
    "from xlstm_jax import config\n"
    "get_config = lambda: config.to_config_dict(config.RunConfig())\n"
  )
  monkeypatch.setattr(machines, "machine", lambda _: machine(memory=11))
  return [f"--config={file}", "--topology=here"]


def test_the_command_writes_what_it_prints(
  found, experiment, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(program, "plan", lambda *_: found)
  assert command.main([*experiment, f"--json={tmp_path / 'p.json'}"]) == 0
  out = capsys.readouterr().out
  assert "It fits: " in out
  assert "all-gather" in out
  written = json.loads((tmp_path / "p.json").read_text())
  assert written["peak_bytes"] == found.peak_bytes
  assert written["fits"] is True


def test_the_command_searches(experiment, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(program, "plan", pretend)
  mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
  json_file = tmp_path / "p.json"
  arguments = [*experiment, *mesh, "--search", f"--json={json_file}"]
  assert command.main(arguments) == 0
  lines = capsys.readouterr().out.splitlines()
  table = [line.split() for line in lines[: lines.index("")]]
  assert table[0] == ["batch_size", "remat", "peak", "GiB", "compile", "s"]
  assert table[1] == ["8", "none", "0.00", "0"]
  assert table[3] == ["32", "none", "0.00", "0", "does", "not", "fit"]
  assert table[-1][:2] == ["40", "block"]
  # What stands below is the best, not the last.
  assert "batch        40 rows of 16 tokens in 1 parts, remat block" in lines
  assert json.loads(json_file.read_text())["batch_size"] == 40


def test_a_search_in_vain_shows_what_is_lacking(
  experiment, monkeypatch, capsys
):
  monkeypatch.setattr(
    program,
    "plan",
    lambda cfg, machine: dataclasses.replace(
      pretend(cfg, machine), peak_bytes=100
    ),
  )
  assert command.main([*experiment, "--search"]) == command.DOES_NOT_FIT
  out = capsys.readouterr().out
  assert out.count("does not fit") == 3
  assert "IT DOES NOT FIT: 909%" in out
