"""What stays the same during a run."""

import dataclasses

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
    cfg: its configuration.
    workdir: its folder.
    definition: the model.
    mesh: of all devices.
    manifests: of its datasets.
    heldout: their held-out splits, if it evaluates.
    checkpoints: in its workdir.
  """

  cfg: RunConfig
  workdir: epath.Path
  definition: Definition
  mesh: Mesh
  manifests: list[Manifest]
  heldout: list[Split]
  checkpoints: Checkpoints
