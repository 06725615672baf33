"""Workdirs made from other formats, and the parameters read back from them."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from xlstm_jax import config, sharding
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer as tokenizers
from xlstm_jax.errors import UserError
from xlstm_jax.interop import tokenizer_files
from xlstm_jax.interop.names import Format, NameMap
from xlstm_jax.interop.tensor_files import StoredTensor, read_json, write_json
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.sharding import MeshConfig

CHECKPOINTS = "checkpoints"
_KEPT = "imported.json"
# Parameters are split over all devices, so that the largest models fit.
_MESH = MeshConfig(data=1, fsdp=-1)


def create(
  workdir: pathlib.Path,
  source: pathlib.Path,
  cfg: ModelConfig,
  form: Format,
  stored: dict[str, StoredTensor],
  *,
  end_of_text: int | None = None,
  kept: Mapping[str, Any] | None = None,
  kept_files: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a workdir with the parameters of a checkpoint as step 0.

  Each tensor is read from the mapped file straight into a device's shard.

  Args:
    workdir: a folder that is empty or missing.
    source: the checkpoint's folder; its tokenizer is copied.
    cfg: the checkpoint's model.
    form: the checkpoint's format.
    stored: the checkpoint's tensors.
    end_of_text: id of the token that ends a text; None for the tokenizer's
      usual one.
    kept: JSON that `read_kept` returns, with the hash of the tokenizer.
    kept_files: the tokenizer's files in `source`.

  Raises:
    UserError: the checkpoint is of another model, its tokenizer is unusable, or
      `workdir` is in use.
  """
  require_empty(workdir)
  run = RunConfig(model=cfg, mesh=_MESH)
  definition = Definition(cfg, run.compute)
  names = NameMap(form, cfg, definition.abstract())
  names.check(stored)
  tokenizer = read_tokenizer(source, end_of_text)
  params = names.load(lambda name: stored[name].map(), _shardings(definition))
  # Host copies of a 7B model's parameters would be 27 GB.
  checkpoints = Checkpoints(
    workdir / CHECKPOINTS, CheckpointConfig(), copies_gb=1
  )
  checkpoints.save(0, {"params": params})
  checkpoints.close()
  if tokenizer is not None:
    tokenizer.save(workdir)
  if kept is not None:
    hash = None if tokenizer is None else tokenizer.hash
    write_json(workdir / _KEPT, {**kept, "tokenizer": hash})
  tokenizer_files.write(workdir / tokenizer_files.KEPT, kept_files or {})
  # Written last, because it makes the folder a workdir.
  config.save(workdir, run)


def restore(
  workdir: pathlib.Path, run: RunConfig, step: int | None = None
) -> Params:
  """The parameters of a run, at its latest step by default.

  Raises:
    UserError: there is no such step.
  """
  definition = Definition(run.model, run.compute)
  checkpoints = Checkpoints(workdir / CHECKPOINTS)
  step = checkpoints.latest() if step is None else step
  if step is None:
    raise UserError(f"{workdir} holds no checkpoint yet.")
  abstract = jax.tree.map(
    lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
    definition.abstract(),
    _shardings(definition),
  )
  params = checkpoints.restore(step, {"params": abstract})["params"]
  checkpoints.close()
  return params


def read_kept(workdir: pathlib.Path) -> dict[str, Any]:
  """What the import that made this workdir kept; empty if none did.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / _KEPT
  return read_json(path) if path.exists() else {}


def require_empty(folder: pathlib.Path) -> None:
  """Refuses a folder that holds something.

  Raises:
    UserError: the path holds something, or is no folder.
  """
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} is not empty; name a new or an empty folder.")


def read_tokenizer(
  folder: pathlib.Path, end_of_text: int | None = None
) -> tokenizers.Tokenizer | None:
  """The tokenizer in a folder of either kind, if there is one.

  Raises:
    UserError: it is damaged, or does not know how a text ends.
  """
  for place in (folder / tokenizer_files.TRAINING, folder):
    if (place / tokenizers.SPEC_FILE).exists():
      return tokenizers.load(place)
  path = folder / tokenizers.HUGGING_FACE_FILE
  if not path.exists():
    return None
  return tokenizers.HuggingFaceTokenizer(path.read_bytes(), path, end_of_text)


def _shardings(definition: Definition) -> Any:
  mesh = sharding.make_mesh(_MESH)
  return sharding.shardings(mesh, definition.axes(), definition.abstract())
