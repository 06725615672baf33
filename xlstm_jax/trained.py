"""A trained model, from the workdir of its run."""

import dataclasses

import jax
from etils import epath
from jax.sharding import Mesh

from xlstm_jax import config, paths, sharding
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer as tokenizers
from xlstm_jax.data.tokenizer import Tokenizer
from xlstm_jax.errors import UserError
from xlstm_jax.models.language_model import Definition, Params


@dataclasses.dataclass(frozen=True)
class Trained:
  """A checkpoint, ready to be used.

  Attributes:
    cfg: The run's configuration.
    definition: The model, with backends chosen for this machine.
    params: The checkpoint's parameters, on the mesh.
    step: The checkpoint's step.
    tokenizer_hash: Hash of the training data's tokenizer; None for imported
      parameters that came without one.
  """

  cfg: RunConfig
  definition: Definition
  params: Params
  step: int
  tokenizer_hash: str | None


def load(workdir: epath.PathLike, *, step: str, mesh: Mesh) -> Trained:
  """Restores the parameters of a checkpoint, and nothing else, onto a mesh.

  Args:
    workdir: the run's workdir; the run may still be under way.
    step: "latest", "best" (lowest held-out loss), or a number.
    mesh: any mesh, whatever the run's was.

  Raises:
    UserError: there is no such run or checkpoint.
  """
  workdir = epath.Path(workdir).expanduser()
  cfg = config.load(workdir)
  use_compilation_cache(cfg)
  definition = Definition(cfg.model, cfg.compute.on_any_device())
  folder = workdir / "checkpoints"
  if not folder.exists():
    raise _no_checkpoint(workdir)
  checkpoints = Checkpoints(folder)
  number = _number(checkpoints, step, workdir)
  abstract = definition.abstract()
  where = sharding.shardings(mesh, definition.axes(), abstract)
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    where,
  )
  params = checkpoints.restore(number, {"params": like})["params"]
  hash = _tokenizer_hash(checkpoints, number, workdir)
  return Trained(cfg, definition, params, number, hash)


def use_compilation_cache(cfg: RunConfig) -> None:
  """Keeps compiled programs in the run's compilation cache."""
  if cfg.compilation_cache is not None:
    folder = paths.local(cfg.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", folder)


def find_tokenizer(model: Trained, workdir: epath.PathLike) -> Tokenizer:
  """The tokenizer of a run, from its workdir or otherwise from its data.

  Raises:
    UserError: neither place has a tokenizer, or it is another one.
  """
  places = [epath.Path(p) for p in (workdir, *model.cfg.data.paths)]
  for place in places:
    place = place.expanduser()
    if (place / tokenizers.SPEC_FILE).exists():
      tokenizer = tokenizers.load(place)
      check_tokenizer(model, tokenizer.hash, place)
      return tokenizer
  raise UserError(
    f"The tokenizer of the run is in none of {', '.join(map(str, places))}; "
    "run where its data paths can be found."
  )


def check_tokenizer(model: Trained, hash: str, place: epath.PathLike) -> None:
  """Refuses data whose tokenizer is not that of the training data.

  Raises:
    UserError: the hashes differ.
  """
  if model.tokenizer_hash is not None and hash != model.tokenizer_hash:
    raise UserError(
      f"{place} was prepared with another tokenizer than the model was trained "
      f"with (hash {hash[:12]}, not {model.tokenizer_hash[:12]}); prepare it "
      "with the tokenizer of the training data."
    )


def _tokenizer_hash(checkpoints, step: int, workdir) -> str | None:
  """The run's hash; for imported parameters, that beside them, if any."""
  if "progress" in checkpoints.items(step):
    progress = checkpoints.restore(step, {"progress": None})["progress"]
    return progress["tokenizer"]
  if (workdir / tokenizers.SPEC_FILE).exists():
    return tokenizers.load(workdir).hash
  return None


def _number(checkpoints: Checkpoints, step: str, workdir) -> int:
  if step.isdecimal():
    return int(step)
  if step not in ("latest", "best"):
    raise UserError(f"The step is {step!r}; give latest, best or a number.")
  number = checkpoints.latest() if step == "latest" else checkpoints.best()
  if number is None:
    raise _no_checkpoint(workdir)
  return number


def _no_checkpoint(workdir) -> UserError:
  return UserError(
    f"The run in {workdir} has no checkpoint yet; the first one is saved after "
    "config.save_every steps."
  )
