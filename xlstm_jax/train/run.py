"""What stays the same during a run, and how it prints."""

import dataclasses

import jax
from etils import epath
from jax.sharding import Mesh

from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data.format import Manifest
from xlstm_jax.data.shards import Split
from xlstm_jax.models.language_model import Definition


@dataclasses.dataclass(frozen=True)
class Run:
  """A run in its workdir.

  Attributes:
    cfg: The run's configuration.
    workdir: The run's folder.
    definition: The model.
    mesh: The mesh of all devices.
    manifests: The manifests of its datasets.
    heldout: Their held-out splits, if the run evaluates.
    checkpoints: The checkpoints in its workdir.
  """

  cfg: RunConfig
  workdir: epath.Path
  definition: Definition
  mesh: Mesh
  manifests: list[Manifest]
  heldout: list[Split]
  checkpoints: Checkpoints


def say(line: str) -> None:
  """Prints a line, on process 0 only."""
  if jax.process_index() == 0:
    print(line, flush=True)
