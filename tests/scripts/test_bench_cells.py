"""The benchmark command, as far as it goes without a GPU."""

import pathlib
import runpy

import pytest

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
  text = SCRIPT_NAMES["line"]("1,256,2,16,32", "chunkwise-64", result)
  assert f"{result['forward']:.3f}" in text


@pytest.mark.parametrize("shape", ["3,x", "1,2,3,4", "1,2,3,4,0"])
def test_a_shape_that_is_none_is_named(shape):
  with pytest.raises(UserError, match=f"--shape={shape} must be"):
    SCRIPT_NAMES["parsed"](shape)


def test_a_row_that_failed_says_why():
  text = SCRIPT_NAMES["line"]("s", "pallas_gpu", {"failed": "no GPU"})
  assert text.endswith("no GPU")


def test_what_a_row_lacks_is_said():
  result = {"forward": 1.5, "note": "no backward pass"}
  text = SCRIPT_NAMES["line"]("s", "simple_gla", result)
  assert text.split()[2:] == ["1.500", "-", "-", "no", "backward", "pass"]
