"""The benchmark of whole steps, as far as it goes without a GPU."""

import json
import pathlib
import runpy
import types

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


@pytest.fixture
def experiment(tmp_path):
  file = tmp_path / "small.py"
  file.write_text(
    "from xlstm_jax import config\n"
    "from xlstm_jax.data.pipeline import DataConfig\n"
    "from xlstm_jax.models.config import ModelConfig\n"
    "def get_config(blocks='1'):\n"
    "  return config.to_config_dict(config.RunConfig(\n"
    "    model=ModelConfig(vocab_size=64, width=16, num_blocks=int(blocks)),\n"
    "    data=DataConfig(context=32), batch_size=16, accumulation=2))\n"
  )
  return str(file)


@pytest.mark.slow
def test_the_step_of_an_experiment_is_timed(experiment, monkeypatch):
  bench = BENCH["bench_recipe"]
  monkeypatch.setitem(bench.__globals__, "RECIPE_SECONDS", 0.0)
  recipe = BENCH["Recipe"](f"{experiment}:2 --config.compute.remat=block")
  result = bench(recipe)
  assert (result["rows"], result["parts"], result["remat"]) == (16, 2, "block")
  assert result["tokens_per_second"] == pytest.approx(
    16 * 32 / result["ms"] * 1e3
  )
  # One round after the warm-up is enough of no time.
  assert result["spread"] == 0
  assert result["planned_gib"] > 0
  text = BENCH["recipe_line"](recipe, result)
  assert text.split()[:4] == ["small.py:2", "16", "2", "block"]


def test_experiments_are_timed_as_they_are(experiment, monkeypatch, capsys):
  """And in the memory that training has, not in nearly all."""
  main, seen = BENCH["main"], []

  def run(command, *, env, **_):
    seen.append((command, env.get("XLA_PYTHON_CLIENT_MEM_FRACTION")))
    return types.SimpleNamespace(returncode=1, stderr="no GPU", stdout="")

  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  monkeypatch.setattr(main.__globals__["subprocess"], "run", run)
  more = f"{experiment} --config.accumulation=4"
  main([f"--config={experiment}:3", f"--config={more}"])
  assert [command[2:] for command, _ in seen] == [
    [f"--config={experiment}:3", "--here"],
    [f"--config={more}", "--here"],
  ]
  assert [fraction for _, fraction in seen] == [None, None]
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split()[0] == "experiment"
  assert [line.split() for line in lines[1:]] == [
    ["small.py:3", "no", "GPU"],
    ["small.py", "no", "GPU"],
  ]


def test_a_mistake_in_an_experiment_is_told_before_any_is_timed(
  experiment, monkeypatch
):
  main = BENCH["main"]
  monkeypatch.setitem(main.__globals__, "in_process", None)
  with pytest.raises(UserError, match=r"nearest key is config\.accumulation"):
    main([f"--config={experiment}", f"--config={experiment} --config.acc=4"])
