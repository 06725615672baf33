"""The plan of a step, and the search for the best."""

import dataclasses
import json

import jax
import pytest

from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.plan import __main__ as command
from xlstm_jax.plan import machines, program
from xlstm_jax.sharding import MeshConfig, make_mesh
from xlstm_jax.train import state as states

CFG = RunConfig(
  model=ModelConfig(vocab_size=64, width=32, num_blocks=2, slstm_at=(1,)),
  data=DataConfig(context=16),
  mesh=MeshConfig(data=2, fsdp=4),
)


def machine(memory: int = 2**30) -> machines.Machine:
  return machines.Machine("here", jax.devices(), memory)


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
  assert found.mlstm == "chunkwise"
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
  assert program.out_of_memory("INTERNAL: something else (2.0G)") is None


def test_the_search_ends_with_the_largest_batch(monkeypatch):
  """With memory per row that recomputation lowers: 5, 5, and 2."""
  per_row = {"none": 5, "matmuls": 5, "block": 2}
  tried = []

  def pretend(cfg, machine):
    tried.append((cfg.compute.remat, cfg.batch_size))
    peak = per_row[cfg.compute.remat] * cfg.batch_size // 8
    return dataclasses.replace(
      TEMPLATE,
      batch_size=cfg.batch_size,
      remat=cfg.compute.remat,
      peak_bytes=peak,
      memory=machine.memory,
    )

  monkeypatch.setattr(program, "plan", pretend)
  plans = list(program.search(CFG, machine(memory=11)))
  assert tried == [
    ("none", 8),
    ("none", 16),
    ("none", 32),
    ("matmuls", 32),
    ("block", 32),
    ("block", 64),
  ]
  best = [p for p in plans if p.fits][-1]
  assert (best.remat, best.batch_size) == ("block", 32)


TEMPLATE = program.Plan(
  topology="here",
  device_kind="cpu",
  devices=8,
  mesh={"data": 2, "fsdp": 4},
  batch_size=8,
  context=16,
  accumulation=1,
  remat="none",
  mlstm="chunkwise",
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
  collectives={},
  compile_seconds=0.0,
)


def test_a_batch_that_does_not_divide_is_a_sentence():
  cfg = dataclasses.replace(CFG, batch_size=12)
  with pytest.raises(UserError, match="multiple of 8"):
    program.plan(cfg, machine())


@pytest.mark.parametrize(
  "topology", ["v5e", "v5e:0x4", "v5e:16", "h200", "h200:0", "b200:8", ""]
)
def test_unknown_machines_are_refused(topology):
  with pytest.raises(UserError, match="is not known; give chips of a TPU"):
    machines.machine(topology)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(machines.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="needs the package libtpu"):
    machines.machine("v5e:4x4")


def test_the_command_writes_what_it_prints(
  found, tmp_path, monkeypatch, capsys
):
  experiment = tmp_path / "experiment.py"
  experiment.write_text(
    "from xlstm_jax import config\n"
    "get_config = lambda: config.to_config_dict(config.RunConfig())\n"
  )
  monkeypatch.setattr(machines, "machine", lambda _: machine())
  monkeypatch.setattr(program, "plan", lambda *_: found)
  arguments = [f"--config={experiment}", "--topology=here"]
  assert command.main([*arguments, f"--json={tmp_path / 'p.json'}"]) == 0
  out = capsys.readouterr().out
  assert "It fits: " in out
  assert "all-gather" in out
  written = json.loads((tmp_path / "p.json").read_text())
  assert written["peak_bytes"] == found.peak_bytes
  assert written["fits"] is True
