"""The configuration file of a workdir."""

import dataclasses
from typing import Any

from etils import epath

from xlstm_jax import files
from xlstm_jax.config import conversion
from xlstm_jax.config.run import RunConfig
from xlstm_jax.errors import UserError

CONFIG_FILE = "config.json"
_MAX_BYTES = 2**24


def save(workdir: epath.PathLike, cfg: RunConfig) -> None:
  """Writes the resolved configuration; readers see the old or the new file."""
  path = epath.Path(workdir) / CONFIG_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, dataclasses.asdict(cfg))


def load(workdir: epath.PathLike) -> RunConfig:
  """The configuration of the run in a workdir.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = epath.Path(workdir) / CONFIG_FILE
  if not path.exists():
    raise UserError(
      f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}."
    )
  advice = "Restore the file, or use another workdir."
  values = files.read_json(
    path, dict[str, Any], limit=_MAX_BYTES, advice=advice
  )
  try:
    return conversion.from_mapping(RunConfig, values)
  except UserError as error:
    raise UserError(
      f"{path} is not as a run of this version wrote it: {error} Restore the "
      "file, or use another workdir."
    ) from error


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
  """The keys whose values differ, with both values."""
  return {
    key: (conversion.value_of(old, key), conversion.value_of(new, key))
    for key in conversion.keys(RunConfig)
    if conversion.value_of(old, key) != conversion.value_of(new, key)
  }
