"""From where a run goes on, and whether it may."""

import dataclasses
from typing import Any

from etils import epath

from xlstm_jax import config, metrics
from xlstm_jax.checkpoints import EVAL_LOSS, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer
from xlstm_jax.errors import UserError
from xlstm_jax.train import state as states
from xlstm_jax.train.health import Health
from xlstm_jax.train.run import Run, say
from xlstm_jax.train.state import TrainState


def check_same_run(run: Run) -> None:
  """Refuses a workdir of another model or tokenizer; lists other changes."""
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
  for key, change in changed.items():
    say(f"changed   {_listed({key: change})}")
  hashes = [manifest.hash for manifest in run.manifests]
  # Another number of datasets is another mixture, and was listed above.
  if len(saved["data"]) == len(hashes) and saved["data"] != hashes:
    _check_data(run, saved["data"], hashes)


def _check_data(run: Run, before: list[str], now: list[str]) -> None:
  """Refuses datasets other than the checkpoint's, whatever their names."""
  changed = [
    path
    for path, old, new in zip(run.cfg.data.paths, before, now, strict=True)
    if old != new
  ]
  if not run.cfg.data.accept_changes:
    raise UserError(
      f"{', '.join(changed)} was prepared anew since the checkpoint in "
      f"{run.workdir}, or is another dataset, so the run would not go on with "
      "the same text in the same order: restore the data, or accept that with "
      "--config.data.accept_changes=true."
    )
  say(f"changed   {', '.join(changed)}: other data than the checkpoint's")


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
  """How far a run is; changes with every step.

  Attributes:
    state: what it trains.
    step: steps done.
    position: number of the next batch, if none is left out.
    health: what the losses so far say.
    owes_evaluation: whether that of this step was begun and not done.
  """

  state: TrainState
  step: int
  position: int
  health: Health
  owes_evaluation: bool


def start(run: Run) -> Progress:
  """The newest checkpoint, other parameters, or fresh ones."""
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

  It takes neither data nor devices to find that out.
  """
  folder = workdir / "checkpoints"
  if not folder.exists() or not (workdir / config.CONFIG_FILE).exists():
    return False
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
  return max(steps, default=-1) >= cfg.steps and config.load(workdir) == cfg


def is_finished(
  cfg: RunConfig, workdir: epath.Path, checkpoints: Checkpoints
) -> bool:
  """Whether no step and no evaluation is left to do; says so if it is."""
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
  """The progress in the checkpoint of a step, as `to_json` made it."""
  return checkpoints.restore(step, {"progress": None})["progress"]


def to_json(run: Run, at: Progress) -> dict[str, Any]:
  """What a checkpoint holds besides arrays."""
  return {
    "step": at.step,
    "windows": at.position * run.cfg.batch_size,
    "seed": run.cfg.seed,
    "tokenizer": run.manifests[0].tokenizer.hash,
    "data": [manifest.hash for manifest in run.manifests],
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
  """The first batch whose windows all lie behind the first `windows`."""
  return -(-windows // batch_size)
