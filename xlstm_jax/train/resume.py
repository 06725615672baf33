"""Where a run resumes, and whether it may."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from xlstm_jax import config, metrics, progress
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer
from xlstm_jax.data.pipeline import mixing_pattern
from xlstm_jax.errors import UserError
from xlstm_jax.progress import Progress, WindowOrder
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
  if not progress.exists(run.checkpoints, step):
    raise UserError(
      f"The workdir {run.workdir} holds imported parameters and no run: train "
      f"in another one with --config.init_from={run.workdir}."
    )
  if "optim.name" in changed:
    old, new = changed["optim.name"]
    raise UserError(
      f"The workdir {run.workdir} holds a run of another optimizer "
      f"(optim.name: {old} -> {new}), whose state does not fit: continue with "
      f"--config.optim.name={old}, or train in another workdir with "
      f"--config.init_from={run.workdir}."
    )
  saved = progress.read(run.checkpoints, step)
  _check_tokenizer(run, saved.tokenizer, run.workdir)
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


def _other_tokens(run: Run, saved: Progress) -> list[str]:
  """Sentences on what would make the run continue with other tokens.

  Args:
    run: the run that is about to resume.
    saved: the progress in its checkpoint.
  """
  before, now = saved.data, [manifest.hash for manifest in run.manifests]
  changed = []
  if sorted(before) == sorted(now):
    if before != now:
      changed.append("data.paths has the same datasets in another order")
  elif len(before) == len(now):
    paths = zip(run.cfg.data.paths, before, now, strict=True)
    others = ", ".join(path for path, old, new in paths if old != new)
    changed.append(
      f"{others} was prepared again since the checkpoint, or is another dataset"
    )
  else:
    changed.append(f"data.paths has {len(now)} datasets, not {len(before)}")
  order = saved.order or WindowOrder.of(config.load(run.workdir).data)
  changed += _order_changes(run, order, same_data=before == now)
  sentences = []
  if changed:
    sentences.append(
      f"{'; '.join(changed)}: some tokens are read twice in this epoch, and "
      "others never."
    )
  size, windows = run.cfg.batch_size, saved.windows
  if skipped := size * next_batch(windows=windows, batch_size=size) - windows:
    sentences.append(
      f"config.batch_size={size} does not divide the {windows} windows "
      f"that were read: {skipped} more, of {run.cfg.data.context} tokens each, "
      "are not read in this epoch."
    )
  return sentences


def _order_changes(
  run: Run, before: WindowOrder, *, same_data: bool
) -> list[str]:
  """The settings that changed and change the order of the windows.

  Args:
    run: the run, with its present settings.
    before: the settings at the checkpoint.
    same_data: whether the datasets are the same, in the same order.
  """
  now = WindowOrder.of(run.cfg.data)
  values = {
    field.name: (getattr(before, field.name), getattr(now, field.name))
    for field in dataclasses.fields(WindowOrder)
  }
  changed = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
  if not (before.shuffle or now.shuffle):
    changed.pop("seed", None)
  if "weights" in changed and same_data:
    tokens = [one.splits["train"].total.tokens for one in run.manifests]
    drawn = [mixing_pattern(one.weights or tokens) for one in (before, now)]
    if np.array_equal(drawn[0][0], drawn[1][0]):
      del changed["weights"]
  return [_listed({f"data.{key}": pair}) for key, pair in changed.items()]


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
class LoopState:
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


def start(run: Run) -> LoopState:
  """The state of the newest checkpoint, or of a new run."""
  step = run.checkpoints.latest()
  if step is not None:
    return _restored(run, step)
  if run.cfg.init_from is None:
    say("start     new run")
    state = states.init(
      run.definition, run.mesh, run.cfg.optim, seed=run.cfg.seed
    )
  else:
    state = _initialized(run, epath.Path(run.cfg.init_from).expanduser())
  return LoopState(state, 0, 0, Health(run.cfg.health), owes_evaluation=False)


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
  if not progress.exists(checkpoints, step):
    return False
  if progress.read(checkpoints, step).owes_evaluation:
    records = [r for r in metrics.read(workdir) if r["step"] == step]
    if not any(metrics.holds(record, metrics.EVALUATED) for record in records):
      return False
  say(f"The run in {workdir} is finished: {step} of {cfg.steps} steps.")
  return True


def progress_of(run: Run, at: LoopState) -> Progress:
  """The progress that a checkpoint of this step holds."""
  return Progress(
    step=at.step,
    windows=at.position * run.cfg.batch_size,
    skipped=int(at.state.skipped),
    seed=run.cfg.seed,
    tokenizer=run.manifests[0].tokenizer.hash,
    data=[manifest.hash for manifest in run.manifests],
    order=WindowOrder.of(run.cfg.data),
    health=at.health.history(),
    owes_evaluation=at.owes_evaluation,
  )


def _initialized(run: Run, other: epath.Path) -> TrainState:
  """A fresh state with the newest parameters of another workdir."""
  checkpoints = Checkpoints(other / "checkpoints")
  step = checkpoints.latest()
  if step is None:
    raise UserError(f"config.init_from={other} is no workdir with checkpoints.")
  if (other / tokenizer.SPEC_FILE).exists():
    _check_tokenizer(run, tokenizer.load(other).hash, other)
  say(f"start     parameters of {other}, step {step}")
  like = states.abstract(run.definition, run.mesh, run.cfg.optim).params
  params = checkpoints.restore(step, {"params": like})["params"]
  checkpoints.close()
  return states.from_params(params, run.definition, run.mesh, run.cfg.optim)


def _restored(run: Run, step: int) -> LoopState:
  like = states.abstract(run.definition, run.mesh, run.cfg.optim)
  items = run.checkpoints.restore(
    step, {**states.to_items(like), progress.ITEM: None}
  )
  place = run.checkpoints.directory / str(step)
  saved = Progress.from_json(items[progress.ITEM], place)
  position = next_batch(windows=saved.windows, batch_size=run.cfg.batch_size)
  skipped = saved.skipped
  if skipped is None:
    # An older version's checkpoint; its optimizer counts its updates.
    skipped = step - int(items["optimizer"]["count"])
  say(f"start     step {step}, batch {position} of the data")
  return LoopState(
    states.from_items(
      items,
      like,
      step=step,
      position=position,
      skipped=skipped,
      mesh=run.mesh,
    ),
    step,
    position,
    Health(run.cfg.health, saved.health),
    saved.owes_evaluation,
  )


def next_batch(*, windows: int, batch_size: int) -> int:
  """The first batch whose windows all come after the first `windows`."""
  return -(-windows // batch_size)
