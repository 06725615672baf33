"""A run looks at its kernel before the first step."""

import dataclasses
from typing import Any, cast

import jax
import pytest
import small_run
from etils import epath

from xlstm_jax import sharding
from xlstm_jax.cells.mlstm import KERNELS, backends, self_test
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models import presets
from xlstm_jax.models.language_model import Definition
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import kernels, loop
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


def test_the_kernel_is_tested_as_it_will_run(monkeypatch, capsys):
  tested = []
  monkeypatch.setattr(
    self_test, "check", lambda *args, **options: tested.append((args, options))
  )
  kernels.check(run(CFG))
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
    )
  ]
  assert "pallas_gpu agrees" in capsys.readouterr().out


def test_what_auto_chooses_is_tested(monkeypatch):
  tested = []
  monkeypatch.setattr(
    self_test, "check", lambda *args, **_: tested.append(args[0])
  )
  chosen = dataclasses.replace(CFG, compute=Compute())
  kernels.check(run(chosen))
  assert not tested
  monkeypatch.setattr(backends, "device_refusal", lambda: None)
  kernels.check(run(chosen))
  assert tested == ["pallas_gpu"]


def test_where_auto_leaves_the_kernel_out_the_run_says_why(monkeypatch, capsys):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  kernels.check(run(dataclasses.replace(CFG, compute=Compute())))
  told = capsys.readouterr().out
  assert told.startswith("kernels   native mLSTM, not pallas_gpu: it needs a ")
  named = Compute(mlstm_backend="chunkwise")
  kernels.check(run(dataclasses.replace(CFG, compute=named)))
  assert not capsys.readouterr().out


def test_the_native_form_and_models_without_it_are_not_tested(monkeypatch):
  monkeypatch.setattr(
    self_test, "check", lambda *_, **__: pytest.fail("tested")
  )
  native = dataclasses.replace(CFG, compute=Compute(mlstm_backend="chunkwise"))
  kernels.check(run(native))
  recurrent = presets.every(0, 1, CFG.model.num_blocks)
  model = dataclasses.replace(CFG.model, slstm_at=recurrent)
  kernels.check(run(dataclasses.replace(CFG, model=model)))


def test_a_kernel_that_cannot_run_here_stops_the_run():
  assert "pallas_gpu" in KERNELS
  small = dataclasses.replace(CFG, model=presets.large("165M"), batch_size=16)
  small = dataclasses.replace(small, data=DataConfig(context=64))
  with pytest.raises(UserError, match="pallas_gpu' cannot run"):
    kernels.check(run(small))


def test_training_looks_before_the_first_step(tmp_path, monkeypatch):
  prepared = small_run.prepared(tmp_path, "data", "--tokenizer=byte")
  monkeypatch.setattr(kernels, "check", refuse)
  cfg = RunConfig(data=DataConfig(paths=(prepared,), context=16))
  with pytest.raises(UserError, match="wrong on this device"):
    loop.train(cfg, tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def refuse(run):
  raise UserError("wrong on this device")
