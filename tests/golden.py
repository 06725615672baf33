"""Reads the models' goldens: what the public implementations compute.

A reduced set, written by scripts/reduce_goldens.py, is committed: cases of
each family, with row 0 of what has many numbers in a row. All of them lie
beside the repository, as "full/NAME" and slow.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from xlstm_jax.interop import large, paper
from xlstm_jax.interop.names import NameMap
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.language_model import Definition, Params

REDUCED = pathlib.Path(__file__).parent / "goldens"
FULL = REDUCED.parents[2] / "shared" / "goldens"


@dataclasses.dataclass(frozen=True)
class Model:
  """A model golden: names and layouts are the reference's.

  Attributes:
    name: of the case.
    folder: of its files.
    family: "paper", "large", "large_docreset" or "hf".
    meta: the rest of meta.json.
    weights: of the checkpoint.
    io: inputs and outputs. By "NAME_fp32_error" the L2 distance of the
      reference's float32 result from NAME_fp64.
    grads_fp64: of the loss with respect to `weights`, or to some of them.
  """

  name: str
  folder: pathlib.Path
  family: str
  meta: dict
  weights: dict[str, np.ndarray]
  io: dict[str, np.ndarray]
  grads_fp64: dict[str, np.ndarray]


def folder_of(name: str) -> pathlib.Path:
  """Where a case lies."""
  if name.startswith("full/"):
    return FULL / name.removeprefix("full/")
  return REDUCED / name


def model_names(*families: str) -> list[str]:
  """The cases of some families, or all; there is at least one of each."""
  reduced = [path.parent.name for path in REDUCED.glob("*/meta.json")]
  full = [f"full/{path.parent.name}" for path in FULL.glob("*/meta.json")]
  names = [
    name
    for name in sorted(reduced) + sorted(full)
    if not families or model(name).family in families
  ]
  assert names, f"no goldens of {families} in {REDUCED}"
  return names


def cases(*families: str, having: Callable[["Model"], bool] | None = None):
  """Test parameters of `model_names`, the full set being slow."""
  return [
    pytest.param(name, marks=pytest.mark.slow if "/" in name else ())
    for name in model_names(*families)
    if having is None or having(model(name))
  ]


@functools.cache
def model(name: str) -> Model:
  """One model case."""
  folder = folder_of(name)
  meta = json.loads((folder / "meta.json").read_text())
  weights = {}
  pattern = "weights.safetensors"
  if meta["family"] == "hf":
    pattern = f"{hugging_face_folder(name).name}/*.safetensors"
  for path in folder.glob(pattern):
    weights |= reference_tensors(path)
  io = load_file(folder / "io.safetensors")
  for key in [key for key in io if key.endswith("_fp32")]:
    truth = io[key.replace("fp32", "fp64")]
    io[f"{key}_error"] = np.linalg.norm(np.float64(io[key]) - truth)
  return Model(
    name,
    folder,
    meta["family"],
    meta,
    weights,
    io,
    reference_tensors(folder / "grads_fp64.safetensors"),
  )


def hugging_face_folder(name: str) -> pathlib.Path:
  """A float32 checkpoint folder of a case of that family."""
  folders = [folder_of(name) / f for f in ("checkpoint", "checkpoint_sharded")]
  return next(folder for folder in folders if folder.exists())


def reference_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Tensors by the reference's name, without the goldens' own renderings."""
  return {
    name: value
    for name, value in load_file(path).items()
    if not name.startswith("canonical/")
  }


@functools.cache
def converted(name: str, dtype: str) -> tuple[Definition, NameMap, Params]:
  """A golden as a model of ours, computed in `dtype`."""
  case = model(name)
  if case.family == "paper":
    cfg = paper.model_config(case.meta["config"])
    form = paper.tensor_format()
  else:
    cfg = large.model_config(case.meta["config"])
    form = large.tensor_format(
      embedding=large.embedding_name(case.weights), weight_mode="single"
    )
  definition = Definition(cfg, Compute(dtype=dtype, param_dtype=dtype))
  with jax.enable_x64(dtype == "float64"):
    names = NameMap(form, cfg, definition.abstract())
    params = names.load(case.weights.__getitem__)
  assert set(names.pieces) == set(case.weights)
  return definition, names, params
