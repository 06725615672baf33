"""The benchmark command, as far as it goes without a GPU."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells.mlstm.hopper import block_sizes
from xlstm_jax.cells.mlstm.hopper.block_sizes import Blocks
from xlstm_jax.errors import UserError

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench_cells.py"
SCRIPT_NAMES = runpy.run_path(str(SCRIPT))
SHAPE = (1, 256, 2, 16, 32)


def test_a_row_has_times_and_errors():
  result = SCRIPT_NAMES["bench"]("chunkwise-64", SHAPE)
  assert min(result["forward"], result["both"]) > 0
  assert set(result["errors"]) == {"h", "dq", "dk", "dv", "di", "df"}
  assert min(result["errors"].values()) > 1e-4
  assert max(result["errors"].values()) < 1e-2  # bfloat16; 3.1e-3 measured
  assert result["peak_gib"] > 0
  text = SCRIPT_NAMES["line"]("1,256,2,16,32", "chunkwise-64", result)
  assert f"{result['forward']:.3f}" in text


@pytest.mark.parametrize("cell", ["slstm", "lstm"])
def test_a_row_of_a_recurrent_cell_has_times_and_errors(cell):
  result = SCRIPT_NAMES["bench"](f"{cell}-recurrent", (2, 16, 2, 8))
  assert min(result["forward"], result["both"]) > 0
  assert set(result["errors"]) == {"y", "dx", "dR", "db"}
  assert min(result["errors"].values()) > 1e-5
  assert max(result["errors"].values()) < 1e-2  # bfloat16
  assert result["peak_gib"] > 0


def test_rows_go_with_shapes_of_their_cells():
  assert SCRIPT_NAMES["cases_of"](
    ["8,8192,8,256,512", "16,2048,4,192"], ["pallas_gpu", "lstm-recurrent"]
  ) == [
    ("pallas_gpu", "8,8192,8,256,512"),
    ("lstm-recurrent", "16,2048,4,192"),
  ]


def test_memory_is_that_of_arguments_results_and_what_is_between():
  x = jax.ShapeDtypeStruct((1024,), jnp.float32)
  compiled = jax.jit(lambda x: jnp.sort(x)[:512]).lower(x).compile()
  assert 10 * 1024 <= SCRIPT_NAMES["peak_bytes"](compiled) <= 12 * 1024


def test_the_truth_of_simple_gla_is_a_linear_attention_that_decays():
  x = SCRIPT_NAMES["inputs"](SHAPE)
  h, dq, dk, dv, di, df = SCRIPT_NAMES["truth"]("simple_gla", x)
  q, k, v, f = (x[name][0].astype(np.float64) for name in "qkvf")
  C_HKV = np.zeros((2, 16, 32))
  for t in range(SHAPE[1]):
    decay_H = 1 / (1 + np.exp(-f[t]))
    C_HKV = decay_H[:, None, None] * C_HKV + k[t, :, :, None] * v[t, :, None]
    read_HV = np.einsum("hk,hkv->hv", q[t], C_HKV) / 4  # the root of 16 keys
    np.testing.assert_allclose(h[0, t], read_HV, rtol=1e-10, atol=1e-10)
  assert all(gradient.any() for gradient in (dq, dk, dv, df))
  assert not di.any()


def test_the_truth_of_cudnn_is_causal_attention():
  x = SCRIPT_NAMES["inputs"]((1, 64, 2, 128, 256))
  h, dq, dk, dv, di, df = SCRIPT_NAMES["truth"]("cudnn", x)
  q, k, v = (x[name][0].astype(np.float64) for name in "qkv")
  score_HTS = np.einsum("thk,shk->hts", q, k) / np.sqrt(128)
  weight_HTS = np.exp(score_HTS) * np.tri(64)
  weight_HTS /= weight_HTS.sum(-1, keepdims=True)
  expected = np.einsum("hts,shv->thv", weight_HTS, v).reshape(64, 4, 128)
  np.testing.assert_allclose(h[0], expected, rtol=1e-10, atol=1e-10)
  assert all(gradient.any() for gradient in (dq, dk, dv))
  assert not any(gradient.any() for gradient in (di, df))


def test_errors_are_of_what_a_function_depends_on():
  exact = [np.ones(4)] * 4 + [np.zeros(4)] * 2
  found = [1.5 * x for x in exact]
  expected = dict.fromkeys(("h", "dq", "dk", "dv"), 0.5)
  assert SCRIPT_NAMES["errors"](found, exact) == expected


@pytest.mark.parametrize("shape", ["3,x", "1,2,3", "1,2,3,4,0"])
def test_a_shape_that_is_none_is_named(shape):
  with pytest.raises(UserError, match=f"--shape={shape} must be"):
    SCRIPT_NAMES["parsed"](shape)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--jobs=0"], "--jobs=0 must be at least 1"),
    (["--row=cudnn", "--shape=1,2,3,4"], "takes such a shape"),
    (["--tune", "--shape=1,2,3,4"], "takes such a shape"),
    (["--tune", "--row=cudnn"], "no --row and no --json"),
    (["--tune", "--json=table.json"], "no --row and no --json"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    SCRIPT_NAMES["main"](arguments)


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path, monkeypatch):
  main, file = SCRIPT_NAMES["main"], tmp_path / "rows.json"

  def in_process(row, shape, **options):
    del shape, options
    if row == "cudnn":
      raise KeyboardInterrupt
    return {"forward": 1.5}

  monkeypatch.setitem(main.__globals__, "in_process", in_process)
  rows = ["--row=chunkwise-64", "--row=cudnn"]
  with pytest.raises(KeyboardInterrupt):
    main([*rows, "--shape=1,2,3,4,5", f"--json={file}"])
  (kept,) = json.loads(file.read_text())
  assert kept == {"shape": "1,2,3,4,5", "row": "chunkwise-64", "forward": 1.5}


def test_a_row_that_failed_says_why():
  text = SCRIPT_NAMES["line"]("s", "pallas_gpu", {"failed": "no GPU"})
  assert text.endswith("no GPU")


def test_what_a_row_lacks_is_said():
  result = {"forward": 1.5, "note": "no backward pass"}
  text = SCRIPT_NAMES["line"]("s", "simple_gla", result)
  assert text.split()[2:] == ["1.500", "-", "-", "no", "backward", "pass"]


@pytest.fixture
def table_file(tmp_path, monkeypatch):
  """A table of block sizes that stands in for the real one."""
  file = tmp_path / "table.json"
  monkeypatch.setattr(block_sizes, "TABLE", file)
  monkeypatch.setattr(
    block_sizes, "table", lambda: json.loads(file.read_text())
  )
  return file


def test_tuning_writes_the_fastest_sizes_of_every_head(table_file, capsys):
  table = {"NVIDIA H200": {"64 x 64": Blocks()._asdict()}, "other": {}}
  table_file.write_text(json.dumps(table))

  def run(cases):
    for row, shape, blocks in cases:
      assert row == "pallas_gpu"
      if blocks.gradient_columns == 128:
        yield {"failed": "no memory"}
      else:
        milliseconds = 5.0 - (shape[0] == "8") - blocks.chunk / 200
        fast = blocks.sum_columns == 128
        yield {"device": "NVIDIA H200", "both": milliseconds - fast}

  SCRIPT_NAMES["tune"](["8,8192,8,256,512", "2,512,8,500,512"], run)
  fastest = Blocks(256, 128, 128, 256)._asdict()
  assert json.loads(table_file.read_text()) == {
    "NVIDIA H200": {
      "64 x 64": Blocks()._asdict(),
      "256 x 512": fastest,
      "512 x 512": fastest,
    },
    "other": {},
  }
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].split() == [
    *("shape", "chunk", "state", "sum", "gradient", "both")
  ]
  # Of each shape two sizes are near the fastest, and timed two times more.
  assert len(printed) == 1 + 2 * 16 + 2 * 2 * 2
  assert printed[1].endswith("no memory")


def test_tuning_does_not_trust_a_single_time(table_file):
  table_file.write_text("{}")
  rounds = []

  def run(cases):
    rounds.append(cases)
    for _, _, blocks in cases:
      lucky = blocks.chunk == 128 and len(rounds) == 1
      slow = 0.05 * (blocks.chunk == 128)
      yield {"device": "NVIDIA H200", "both": 1 + slow - 0.1 * lucky}

  SCRIPT_NAMES["tune"](["32,2048,6,64,128"], run)
  heads = json.loads(table_file.read_text())["NVIDIA H200"]
  assert heads["64 x 128"]["chunk"] == 256
  assert [len(cases) for cases in rounds] == [2, 2, 2]


@pytest.mark.parametrize(
  ("dims", "number"),
  [((64, 128), 2), ((96, 192), 16), ((128, 256), 8), ((256, 512), 16)],
)
def test_block_sizes_that_come_to_the_same_are_timed_once(dims, number):
  assert len(SCRIPT_NAMES["candidates"](*dims)) == number
