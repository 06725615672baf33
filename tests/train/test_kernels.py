"""A run looks at its kernel before the first step."""

import dataclasses
import json
from typing import Any, cast

import jax
import pytest
import small_run
from etils import epath

from xlstm_jax import sharding
from xlstm_jax.cells import mlstm, recurrence, recurrent_self_test, slstm
from xlstm_jax.cells.backends import Backend
from xlstm_jax.cells.mlstm import self_test
from xlstm_jax.cells.mlstm.chunkwise import chunkwise
from xlstm_jax.cells.slstm.recurrent import cell
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.models import presets
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.runtime.status import Status
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import kernels, loop, memory
from xlstm_jax.train import step as steps
from xlstm_jax.train.run import Run

CFG = RunConfig(
  model=presets.large("7B"),
  data=DataConfig(context=8192),
  mesh=MeshConfig(data=2, fsdp=2, tensor=2),
  compute=Compute(mlstm_backend="pallas_gpu", mlstm_chunk=128),
  batch_size=64,
  accumulation=4,
)


def run(cfg) -> Run:
  return Run(
    cfg,
    epath.Path("nowhere"),
    Definition(cfg.model, cfg.compute),
    sharding.make_mesh(cfg.mesh),
    [],
    [],
    cast(Any, None),
  )


class Step:
  """A step that compiles to a word."""

  def lower(self, state, batch):
    assert state.step.shape == ()
    assert batch["inputs"].shape == (64, 8192)
    return self

  def compile(self):
    return "compiled"


def install(monkeypatch, registry, name, **changes):
  """Changes a backend, or adds one with these attributes before the others."""
  found = registry.backends
  if name in found:
    changed = dataclasses.replace(found[name], **changes)
    monkeypatch.setitem(found, name, changed)
  else:
    added = {name: Backend(name, **changes)} | found
    monkeypatch.setattr(registry, "backends", added)


def can(device, shapes):
  return None


@pytest.fixture
def tested(monkeypatch):
  """What comparisons were prepared, and how often they ran."""
  found = []

  def prepared(*args, **options):
    found.append((args, options))
    return lambda: found.append("compared")

  monkeypatch.setattr(steps, "compiled", lambda *_: Step())
  monkeypatch.setattr(self_test, "prepared", prepared)
  monkeypatch.setattr(recurrent_self_test, "prepared", prepared)
  return found


def checked_step(cfg):
  this = run(cfg)
  with jax.set_mesh(this.mesh):
    return kernels.checked_step(this)


def test_the_kernel_is_tested_as_it_will_run(tested, monkeypatch, capsys):
  install(monkeypatch, mlstm.BACKENDS, "pallas_gpu", why_not=can)
  assert checked_step(CFG) == "compiled"
  assert tested == [
    (
      ("pallas_gpu", (4, 8192, 4, 256, 512)),
      {
        "dtype": "bfloat16",
        "chunk": 128,
        "input_gate": "exp",
        "normalize": True,
        "eps": 1e-6,
      },
    ),
    "compared",
  ]
  assert "pallas_gpu agrees" in capsys.readouterr().out


def test_what_auto_chooses_is_tested(tested, monkeypatch):
  chosen = dataclasses.replace(CFG, compute=Compute())
  assert checked_step(chosen) == "compiled"
  assert not tested
  install(monkeypatch, mlstm.BACKENDS, "pallas_gpu", why_not=can)
  checked_step(chosen)
  assert tested[0][0][0] == "pallas_gpu"


def test_the_kernels_of_all_cells_are_tested(tested, monkeypatch, capsys):
  install(monkeypatch, mlstm.BACKENDS, "pallas_gpu", why_not=can)
  install(monkeypatch, slstm.BACKENDS, "fast", run=cell, platform="cpu")
  both = dataclasses.replace(CFG.model, slstm_at=(1, 3))
  checked_step(dataclasses.replace(CFG, model=both))
  # The sLSTM has 4 heads of 1024 units, 2 of them on each device.
  shapes = recurrence.Shapes(4, 8192, 2, 1024, "float32", "bfloat16")
  # One may be compared while the next is prepared.
  assert tested.count("compared") == 2
  assert [call[0] for call in tested if call != "compared"] == [
    ("pallas_gpu", (4, 8192, 4, 256, 512)),
    (slstm.slstm, slstm.BACKENDS, "fast", shapes),
  ]
  told = capsys.readouterr().out
  for name in ("mLSTM backend pallas_gpu", "sLSTM backend fast"):
    assert f"kernels   {name} agrees with the native form" in told


def test_where_auto_leaves_the_kernel_out_the_run_says_why(
  tested, monkeypatch, capsys
):
  # As on a GPU, whose platform the kernel is written for.
  install(monkeypatch, mlstm.BACKENDS, "pallas_gpu", platform="cpu")
  checked_step(dataclasses.replace(CFG, compute=Compute()))
  told = capsys.readouterr().out
  assert told.startswith("kernels   native mLSTM, not pallas_gpu: it needs a ")
  named = Compute(mlstm_backend="chunkwise")
  checked_step(dataclasses.replace(CFG, compute=named))
  assert not capsys.readouterr().out
  assert not tested


def test_the_native_form_and_models_without_it_are_not_tested(tested):
  native = dataclasses.replace(CFG, compute=Compute(mlstm_backend="chunkwise"))
  checked_step(native)
  recurrent = presets.every(0, 1, CFG.model.num_blocks)
  model = dataclasses.replace(CFG.model, slstm_at=recurrent)
  checked_step(dataclasses.replace(CFG, model=model))
  assert not tested


def test_a_kernel_that_cannot_run_here_stops_the_run():
  small = dataclasses.replace(CFG, model=presets.large("165M"), batch_size=16)
  small = dataclasses.replace(small, data=DataConfig(context=64))
  with pytest.raises(UserError, match="pallas_gpu' cannot run"):
    checked_step(small)


@pytest.fixture
def short_run(tmp_path):
  """A run of two steps with an mLSTM backend of that name."""
  prepared = small_run.prepared(tmp_path, "data", "--tokenizer=byte")
  model = ModelConfig(
    vocab_size=257,
    width=16,
    num_blocks=1,
    mlstm=MLSTMConfig(num_heads=2, round_to=16),
  )
  return lambda backend, steps=2: RunConfig(
    model=model,
    data=DataConfig(paths=(prepared,), context=32),
    compute=Compute(mlstm_backend=backend),
    batch_size=8,
    steps=steps,
    compilation_cache=None,
  )


@pytest.mark.slow
def test_a_run_with_a_sound_kernel_trains_and_continues(
  short_run, tmp_path, monkeypatch, capsys
):
  install(monkeypatch, mlstm.BACKENDS, "sound", run=chunkwise, platform="cpu")
  losses = []
  for backend, told in (("sound", 2), ("chunkwise", 0)):
    workdir = tmp_path / backend
    for until in (2, 4):
      assert loop.train(short_run(backend, until), workdir) == Status.DONE
    said = capsys.readouterr().out
    assert said.count("sound agrees with the native form") == told
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses.append([record.get("loss") for record in map(json.loads, lines)])
  assert losses[0] == losses[1]
  assert len(losses[0]) >= 4


@pytest.mark.parametrize("backend", ["pallas_gpu", "chunkwise"])
def test_the_memory_of_the_step_is_checked(tested, monkeypatch, backend):
  def check(compiled):
    tested.append(compiled)
    raise UserError("The step does not fit.")

  monkeypatch.setattr(memory, "check", check)
  install(monkeypatch, mlstm.BACKENDS, "pallas_gpu", why_not=can)
  named = Compute(mlstm_backend=backend, mlstm_chunk=128)
  with pytest.raises(UserError, match="does not fit"):
    checked_step(dataclasses.replace(CFG, compute=named))
  # Before anything is computed.
  assert tested[-1] == "compiled"
  assert "compared" not in tested


def test_a_run_with_a_wrong_kernel_stops_before_the_first_step(
  short_run, tmp_path, monkeypatch
):
  def doubled(*args, **options):
    h, state = chunkwise(*args, **options)
    return 2 * h, state

  install(monkeypatch, mlstm.BACKENDS, "doubled", run=doubled, platform="cpu")
  with pytest.raises(UserError, match="'doubled' computes wrongly on cpu"):
    loop.train(short_run("doubled"), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
