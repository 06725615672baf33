"""Where a run resumes, and whether it may."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from xlstm_jax import config, metrics
from xlstm_jax.checkpoints import EVAL_LOSS, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer
from xlstm_jax.data.pipeline import DataConfig, mixing_pattern
from xlstm_jax.errors import UserError
from xlstm_jax.runtime.output import say
from xlstm_jax.train import state as states
from xlstm_jax.train.health import Health
from xlstm_jax.train.run import Run
from xlstm_jax.train.state import TrainState


def check_same_run(run: Run) -> None:
  """Refuses a workdir of another model or tokenizer; lists other changes.

  A change to the tokens that come next has to be accepted by the user.
  """
  step = run.checkpoints.latest()
  if step is None or not (run.workdir / config.CONFIG_FILE).exists():
    return
  changed = config.changes(config.load(run.workdir), run.cfg)
  of_model = {k: v for k, v in changed.items() if k.startswith("model.")}
  if of_model:
    raise UserError(
      f"The workdir {run.workdir} holds a run of another model "
      f"({_listed(of_model)}): use another workdir, or the model it was begun "
      "with."
    )
  if "progress" not in run.checkpoints.items(step):
    raise UserError(
      f"The workdir {run.workdir} holds imported parameters and no run: train "
      f"in another one with --config.init_from={run.workdir}."
    )
  saved = progress(run.checkpoints, step)
  _check_tokenizer(run, saved["tokenizer"], run.workdir)
  other_tokens = _other_tokens(run, saved)
  if other_tokens and not run.cfg.data.accept_changes:
    raise UserError(
      f"The run in {run.workdir} would read other tokens than those that come "
      f"next. {' '.join(other_tokens)} Restore what changed, begin another run "
      f"with --config.init_from={run.workdir}, or accept that with "
      "--config.data.accept_changes=true."
    )
  for key, change in changed.items():
    say(f"changed   {_listed({key: change})}")
  for sentence in other_tokens:
    say(f"accepted  {sentence}")


def _other_tokens(run: Run, saved: dict[str, Any]) -> list[str]:
  """Sentences on what would make the run continue with other tokens.

  Args:
    run: the run that is about to resume.
    saved: the progress in its checkpoint.
  """
  before, now = saved["data"], [manifest.hash for manifest in run.manifests]
  changed = []
  if sorted(before) == sorted(now):
    if before != now:
      changed.append("data.paths has the same datasets in another order")
  elif len(before) == len(now):
    paths = zip(run.cfg.data.paths, before, now, strict=True)
    others = ", ".join(path for path, old, new in paths if old != new)
    changed.append(
      f"{others} was prepared anew since the checkpoint, or is another dataset"
    )
  else:
    changed.append(f"data.paths has {len(now)} datasets, not {len(before)}")
  order = saved.get("order")
  if order is None:
    # An older version's checkpoint.
    order = _order(config.load(run.workdir).data)
  changed += _order_changes(run, order, same_data=before == now)
  sentences = []
  if changed:
    sentences.append(
      f"{'; '.join(changed)}: some tokens are read twice in this epoch, and "
      "others never."
    )
  size, windows = run.cfg.batch_size, saved["windows"]
  if skipped := size * next_batch(windows=windows, batch_size=size) - windows:
    sentences.append(
      f"config.batch_size={size} does not divide the {windows} windows "
      f"that were read: {skipped} more, of {run.cfg.data.context} tokens each, "
      "are not read in this epoch."
    )
  return sentences


def _order(cfg: DataConfig) -> dict[str, Any]:
  """The settings that order the windows of given datasets, for JSON."""
  return {
    "context": cfg.context,
    "shuffle": cfg.shuffle,
    "seed": cfg.seed,
    "weights": None if cfg.weights is None else list(cfg.weights),
  }


def _order_changes(
  run: Run, before: dict[str, Any], *, same_data: bool
) -> list[str]:
  """The settings that changed and change the order of the windows.

  Args:
    run: the run, with its present settings.
    before: the result of `_order` for the checkpoint's settings.
    same_data: whether the datasets are the same, in the same order.
  """
  now = _order(run.cfg.data)
  changed = [key for key in now if before[key] != now[key]]
  if "seed" in changed and not (before["shuffle"] or now["shuffle"]):
    changed.remove("seed")
  if "weights" in changed and same_data:
    tokens = [one.splits["train"].total.tokens for one in run.manifests]
    drawn = [mixing_pattern(one["weights"] or tokens) for one in (before, now)]
    if np.array_equal(drawn[0][0], drawn[1][0]):
      changed.remove("weights")
  return [_listed({f"data.{k}": (before[k], now[k])}) for k in changed]


def _check_tokenizer(run: Run, hash: str, workdir: epath.Path) -> None:
  ours = run.manifests[0].tokenizer.hash
  if hash != ours:
    raise UserError(
      f"The model in {workdir} was trained with another tokenizer than that of "
      f"{run.cfg.data.paths[0]} (hash {hash[:12]}, not {ours[:12]}): use data "
      "prepared with its tokenizer."
    )


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
  return ", ".join(f"{k}: {old} -> {new}" for k, (old, new) in changed.items())


@dataclasses.dataclass
class Progress:
  """How far a run is; this changes with every step.

  Attributes:
    state: The training state.
    step: Number of steps done.
    position: Number of the next batch, if none is left out.
    health: What the losses so far say.
    owes_evaluation: Whether the evaluation of this step was started but not
      finished.
  """

  state: TrainState
  step: int
  position: int
  health: Health
  owes_evaluation: bool


def start(run: Run) -> Progress:
  """The progress of the newest checkpoint, or of a new run."""
  step = run.checkpoints.latest()
  if step is not None:
    return _restored(run, step)
  if run.cfg.init_from is None:
    say("start     new run")
    state = states.init(run.definition, run.mesh, seed=run.cfg.seed)
  else:
    state = _initialized(run, epath.Path(run.cfg.init_from).expanduser())
  return Progress(state, 0, 0, Health(run.cfg.health), owes_evaluation=False)


def seems_finished(cfg: RunConfig, workdir: epath.Path) -> bool:
  """Whether the run in `workdir` has this configuration and its last step.

  This needs neither data nor devices.
  """
  folder = workdir / "checkpoints"
  if not folder.exists() or not (workdir / config.CONFIG_FILE).exists():
    return False
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
  return max(steps, default=-1) >= cfg.steps and config.load(workdir) == cfg


def is_finished(
  cfg: RunConfig, workdir: epath.Path, checkpoints: Checkpoints
) -> bool:
  """Whether no step and no evaluation is left to do; prints it if so."""
  step = checkpoints.latest()
  if step is None or step < cfg.steps:
    return False
  if "progress" not in checkpoints.items(step):
    return False
  if progress(checkpoints, step)["owes_evaluation"]:
    records = [r for r in metrics.read(workdir) if r["step"] == step]
    if not any(EVAL_LOSS in record for record in records):
      return False
  say(f"The run in {workdir} is finished: {step} of {cfg.steps} steps.")
  return True


def progress(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
  """The progress in a step's checkpoint, as `to_json` wrote it."""
  return checkpoints.restore(step, {"progress": None})["progress"]


def to_json(run: Run, at: Progress) -> dict[str, Any]:
  """What a checkpoint holds apart from arrays."""
  return {
    "step": at.step,
    "windows": at.position * run.cfg.batch_size,
    "seed": run.cfg.seed,
    "tokenizer": run.manifests[0].tokenizer.hash,
    "data": [manifest.hash for manifest in run.manifests],
    "order": _order(run.cfg.data),
    "health": at.health.to_json(),
    "owes_evaluation": at.owes_evaluation,
  }


def _initialized(run: Run, other: epath.Path) -> TrainState:
  """A fresh state with the newest parameters of another workdir."""
  checkpoints = Checkpoints(other / "checkpoints")
  step = checkpoints.latest()
  if step is None:
    raise UserError(f"config.init_from={other} is no workdir with checkpoints.")
  if (other / tokenizer.SPEC_FILE).exists():
    _check_tokenizer(run, tokenizer.load(other).hash, other)
  say(f"start     parameters of {other}, step {step}")
  like = states.abstract(run.definition, run.mesh).params
  params = checkpoints.restore(step, {"params": like})["params"]
  checkpoints.close()
  return states.from_params(params, run.definition, run.mesh)


def _restored(run: Run, step: int) -> Progress:
  like = states.to_items(states.abstract(run.definition, run.mesh))
  items = run.checkpoints.restore(step, {**like, "progress": None})
  saved = items["progress"]
  position = next_batch(windows=saved["windows"], batch_size=run.cfg.batch_size)
  say(f"start     step {step}, batch {position} of the data")
  return Progress(
    states.from_items(items, step=step, position=position, mesh=run.mesh),
    step,
    position,
    Health(run.cfg.health, saved["health"]),
    saved["owes_evaluation"],
  )


def next_batch(*, windows: int, batch_size: int) -> int:
  """The first batch whose windows all come after the first `windows`."""
  return -(-windows // batch_size)
