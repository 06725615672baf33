"""Reads what the public implementations compute for single cells.

A reduced set (scripts/reduce_goldens.py) is committed; all of them lie beside
the repository.
"""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

REDUCED = pathlib.Path(__file__).parents[1] / "goldens"
FULL = REDUCED.parents[2] / "shared" / "goldens"

Tensors = dict[str, np.ndarray]


def cases(kind: str, *, without: str = ".json") -> list:
  """Files of `kind` as test parameters; those of the full set are slow.

  Left out are names with `without`: "__" stands before initial states.
  """
  reduced, full = (
    sorted(
      path
      for path in (folder / kind).glob("*.safetensors")
      if without not in path.name
    )
    for folder in (REDUCED, FULL)
  )
  assert reduced, f"no goldens in {REDUCED / kind}"
  return [pytest.param(path, id=f"reduced-{path.stem}") for path in reduced] + [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow) for path in full
  ]


def load(path: pathlib.Path) -> Tensors:
  """The tensors of a file, each with the error of the reference's float32."""
  tensors = load_file(path)
  for name in [name for name in tensors if name.startswith("fp32/")]:
    truth = tensors.get(name.replace("fp32/", "fp64/", 1))
    if truth is not None:
      error = np.linalg.norm(tensors[name] - truth)
      tensors[name.replace("fp32/", "fp32_error/", 1)] = error
  return tensors


def inputs(tensors: Tensors) -> Tensors:
  """The inputs by their name, in float64."""
  return {
    name.removeprefix("in/"): x.astype(np.float64)
    for name, x in tensors.items()
    if name.startswith("in/")
  }


def check(
  results: Tensors,
  tensors: Tensors,
  group: str,
  *,
  dtype: str,
  error: str,
  slack: dict[str, float] | None = None,
) -> None:
  """Compares results with `fp64/{group}/...`.

  In float64 to 1e-10. In float32 to 5 times what the reference loses (4.1 is
  the worst measured), or 8 ulp where that was luck. Where it has NaN, gates
  are of size 100 and so are exponents: 50 ulp. Devices flush numbers below
  the smallest normal one to 0. `slack` adds to what is allowed.
  """
  single = np.finfo(np.float32)
  for name, x in results.items():
    truth = tensors[f"fp64/{group}/{name}".replace("//", "/")]
    assert x.shape == truth.shape, name
    norm = np.linalg.norm(truth)
    allowed = slack.get(name, 0.0) if slack else 0.0
    if dtype == "float64":
      allowed += 1e-10 * norm
    else:
      reference = tensors[f"fp32_error/{error}/{name}".replace("//", "/")]
      if np.isnan(reference):
        reference = 10 * single.eps * norm
      allowed += 5 * reference + 8 * single.eps * norm + 1000 * single.tiny
    loss = np.linalg.norm(x - truth)
    assert loss <= allowed, (group, name, loss / allowed)
