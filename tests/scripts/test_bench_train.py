"""The benchmark of whole steps, as far as it goes without a GPU."""

import json
import pathlib
import runpy

import pytest

from xlstm_jax.errors import UserError
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models import counts
from xlstm_jax.models.config import ModelConfig

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench_train.py"
BENCH = runpy.run_path(str(SCRIPT))
SMALL = ModelConfig(
  vocab_size=64,
  width=16,
  num_blocks=1,
  mlstm_block="large",
  mlstm_large=MLSTMLargeConfig(num_heads=2),
)


def row(mesh, backend="auto"):
  return BENCH["Row"]("165M", 32, backend, mesh, batch=2, remat="matmuls")


@pytest.mark.slow
def test_meshes_train_the_same_rows_per_device():
  plain, one, two = (
    BENCH["bench"](row(mesh), SMALL) for mesh in ("none", "data=1", "data=2")
  )
  assert (plain["rows"], one["rows"], two["rows"]) == (2, 2, 4)
  assert plain["loss"] == pytest.approx(one["loss"], rel=1e-3)
  for result in (plain, one, two):
    tokens = result["rows"] * 32
    assert result["tokens_per_second"] == pytest.approx(
      tokens / result["ms"] * 1e3
    )
  assert f"{two['ms']:.1f}" in BENCH["line"](row("data=2"), two)


def test_the_models_are_those_of_the_published_rows():
  sizes = {name: counts.parameters(m) for name, m in BENCH["MODELS"].items()}
  assert sizes["165M"] == 164_073_312
  assert sizes["1.3B"] == 1_420_839_104
  assert sizes["125M-paper"] == 163_806_144
  heads = BENCH["MODELS"]["165M-6heads"].mlstm_large.head_channels(768)
  assert heads == (64, 128)
  heads = BENCH["MODELS"]["1.3B-8heads"].mlstm_large.head_channels(2048)
  assert heads == (128, 256)


@pytest.mark.parametrize("mesh", ["data", "rows=2", "data=0", "data=2,fsdp=x"])
def test_a_mesh_that_is_none_is_named(mesh):
  with pytest.raises(UserError, match=f"--mesh={mesh} must be"):
    BENCH["main"]([f"--mesh={mesh}"])


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path, monkeypatch):
  main, file = BENCH["main"], tmp_path / "rows.json"

  def in_process(row):
    if row.context == 8192:
      raise KeyboardInterrupt
    return {"failed": "no GPU"}

  monkeypatch.setitem(main.__globals__, "in_process", in_process)
  with pytest.raises(KeyboardInterrupt):
    main(["--model=165M", f"--json={file}"])
  (kept,) = json.loads(file.read_text())
  assert (kept["context"], kept["failed"]) == (2048, "no GPU")


def test_too_few_devices_are_told():
  with pytest.raises(UserError, match="data=512 needs 512 devices; there are"):
    BENCH["bench"](row("data=512"), SMALL)


def test_a_row_that_failed_says_why():
  text = BENCH["line"](row("none"), {"failed": "out of memory"})
  assert text.endswith("out of memory")


@pytest.mark.parametrize(
  ("kernel", "kind"),
  [
    ("body_mosaic_gpu_kernel", "mLSTM kernels"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
    ("input_reduce_fusion_3", "reductions"),
    ("loop_convert_fusion_12", "elementwise"),
    ("MemcpyD2D", "copies"),
    ("something", "other"),
  ],
)
def test_kinds_of_kernels(kernel, kind):
  assert BENCH["kind"](kernel) == kind


def test_a_profile_without_a_gpu_is_refused():
  asked = BENCH["Row"](
    "165M", 32, "auto", "data=1", batch=2, remat="matmuls", profile=True
  )
  with pytest.raises(UserError, match="--profile needs a GPU"):
    BENCH["bench"](asked, SMALL)
