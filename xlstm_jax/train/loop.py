"""The training loop, from the command to the last checkpoint."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from xlstm_jax import config, metrics, sharding, trained
from xlstm_jax.checkpoints import EVAL_LOSS, Checkpoints, SaveTimer
from xlstm_jax.config import LimitsConfig, RunConfig
from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError
from xlstm_jax.models.language_model import Definition
from xlstm_jax.runtime import accounting, lock
from xlstm_jax.runtime.interrupt import Interrupt, Stopped
from xlstm_jax.runtime.output import say
from xlstm_jax.runtime.peers import Peers
from xlstm_jax.runtime.profile import Profile
from xlstm_jax.runtime.status import Status
from xlstm_jax.runtime.watchdog import Watchdog
from xlstm_jax.train import (
  diagnosis,
  heldout,
  kernels,
  report,
  resume,
  rollbacks,
)
from xlstm_jax.train import state as states
from xlstm_jax.train import workdir as folder
from xlstm_jax.train.feed import Feed
from xlstm_jax.train.resume import Progress
from xlstm_jax.train.rollbacks import Rollback
from xlstm_jax.train.run import Run

_NOT_BEGUN = "stopped   before the first step; run again to continue"


def train(
  cfg: RunConfig, workdir: epath.PathLike, stopped: Interrupt | None = None
) -> Status:
  """Trains in `workdir`, from its newest checkpoint if it has one.

  Args:
    cfg: the configuration.
    workdir: the run's workdir.
    stopped: says when a signal asks the run to stop; None for never.

  Returns:
    How the run ended: all steps are done, a signal ended it early and it was
    saved, or it went wrong too often.

  Raises:
    UserError: the configuration, the data or the workdir do not fit, or a
      checkpoint could not be written.
    Missing: a process did not come to a common rollback.
  """
  stopped = stopped or Interrupt()
  clock = metrics.Clock(accounting.START)
  workdir = epath.Path(workdir).expanduser()
  if resume.seems_finished(cfg, workdir):
    with lock.held(workdir), _opened(cfg, workdir) as checkpoints:
      if resume.is_finished(cfg, workdir, checkpoints):
        return Status.DONE
  manifests = [files.read_manifest(path) for path in cfg.data.paths]
  if not manifests:
    raise UserError(
      "config.data.paths is empty; name the folders that prepare wrote, such "
      "as --config.data.paths=data/corpus."
    )
  config.validate(cfg, manifests[0], jax.device_count())
  folder.create(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock.held(workdir))
    # From here on the run waits for disks and other processes.
    for guard in _guards(cfg.limits, workdir, clock, stopped):
      stack.enter_context(contextlib.closing(guard))
    checkpoints = stack.enter_context(_opened(cfg, workdir))
    stack.callback(clock.now, accounting.SAVE)
    run = Run(
      cfg,
      workdir,
      Definition(cfg.model, cfg.compute),
      sharding.make_mesh(cfg.mesh),
      manifests,
      heldout.opened(cfg),
      checkpoints,
    )
    resume.check_same_run(run)
    if resume.is_finished(cfg, workdir, checkpoints):
      return Status.DONE
    folder.describe(run)
    trained.use_compilation_cache(cfg)
    report.describe(run)
    goodput = accounting.Goodput(workdir, clock)
    # The last line, however the run ends.
    stack.callback(lambda: say(f"goodput   {goodput.line()}"))
    decided = list(rollbacks.read(workdir))
    stack.enter_context(jax.set_mesh(run.mesh))
    # Several processes stop together, before their first step.
    if jax.process_count() == 1 and stopped.is_ahead():
      say(_NOT_BEGUN)
      return Status.PREEMPTED
    with clock.spent_on(accounting.COMPILE):
      train_step = kernels.checked_step(run)
    end = None
    while end is None:
      end = _train(run, train_step, decided, stopped, clock, goodput)
    return end


@contextlib.contextmanager
def _opened(cfg: RunConfig, workdir: epath.Path) -> Iterator[Checkpoints]:
  """The checkpoints of a workdir; prints which are damaged."""
  checkpoints = Checkpoints(workdir / "checkpoints", cfg.checkpoint)
  with contextlib.closing(checkpoints):
    for sentence in checkpoints.set_aside:
      say(f"damaged   {sentence}")
    yield checkpoints


def _guards(
  limits: LimitsConfig,
  workdir: epath.Path,
  clock: metrics.Clock,
  stopped: Interrupt,
) -> list[Any]:
  """The threads that end this process where the loop itself cannot."""
  stopped.grace = limits.grace_seconds
  stopped.doing = lambda: clock.activity
  others = []
  if jax.process_count() > 1:
    # Peers poll once a second. Process 0 must exit last: when it dies, JAX
    # aborts the others.
    stopped.early = 1.5 if jax.process_index() == 0 else 4.0
    others = [
      Peers(
        passed=lambda: stopped.passed,
        doing=lambda: clock.activity,
        heard=stopped.note,
      )
    ]
  stopped.connect(others[0].agree if others else None)
  seconds = {
    accounting.START: limits.start_seconds,
    accounting.COMPILE: limits.start_seconds,
    accounting.STEP: limits.step_seconds,
    accounting.DATA: limits.step_seconds,
    accounting.EVAL: limits.eval_seconds,
    accounting.SAVE: limits.save_seconds,
  }
  behind = others[0].behind if others else lambda: "there are no others"
  return [*others, Watchdog(clock, seconds, workdir, behind=behind)]


def _train(
  run: Run,
  train_step: Any,
  decided: list[Rollback],
  stopped: Interrupt,
  clock: metrics.Clock,
  goodput: accounting.Goodput,
) -> Status | None:
  """Trains from the newest checkpoint on; None if the run has to go back."""
  cfg = run.cfg
  clock.now(accounting.START)
  at = resume.start(run)
  goodput.back_to(at.step)
  goodput.write(at.step)
  begun = at.step
  with contextlib.ExitStack() as stack:
    owed = EVAL_LOSS if at.owes_evaluation else None
    log = metrics.Log(run.workdir, step=at.step, without=owed)
    stack.enter_context(contextlib.closing(log))
    profile = Profile(cfg.profile, run.workdir / "profile")
    stack.enter_context(contextlib.closing(profile))
    feed = Feed(run, at.position, tuple(decided))
    stack.enter_context(contextlib.closing(feed))
    reports = report.Report(cfg, log, clock, at.health, step=at.step)
    timer = SaveTimer(cfg.save_minutes)
    # The scores of the last step, if it was evaluated.
    scores: dict[str, float] = {}
    interrupted = False
    clock.now(accounting.STEP)
    try:
      if at.owes_evaluation:
        scores = _evaluate(run, at, stopped, clock, reports)
      while at.step < cfg.steps:
        profile.before(at.step + 1)
        new = at.step == begun
        # The first batch arrives once the datasets are open.
        with clock.spent_on(accounting.START if new else accounting.DATA):
          item = feed.next(unless=stopped.is_ahead)
        stopped.check()
        assert item is not None, "no batch, yet the next border can be passed"
        number, batch = item
        if number != at.position:
          at.state = states.at_position(at.state, number, mesh=run.mesh)
        started = time.perf_counter()
        with clock.spent_on(accounting.COMPILE if new else accounting.STEP):
          at.state, measured = train_step(at.state, batch)
          if new:
            # Its first execution connects devices.
            jax.block_until_ready(measured)
        if new:
          reports.first_took(time.perf_counter() - started)
        at.step, at.position, scores = at.step + 1, number + 1, {}
        reports.later(at.step, at.position, measured)
        profile.after(at.step, measured)
        evaluating = _due(at.step, cfg.eval_every, cfg)
        diagnosing = _due(at.step, cfg.diagnose_every, cfg)
        failure = run.checkpoints.failure()
        if failure is not None:
          say(f"save      failed ({failure}); once more at step {at.step}")
        late = at.step % cfg.log_every == 0 and timer.due()
        saving = late or failure or _due(at.step, cfg.save_every, cfg)
        if evaluating or diagnosing or saving:
          # Records are written before their checkpoint, so that a kill loses
          # none. So are their findings, so that only good steps are saved.
          reports.now()
        if reports.finding is not None:
          break
        if diagnosing:
          with clock.spent_on(accounting.EVAL):
            figures = diagnosis.figures(run, at.state.params, batch)
          reports.diagnosed(at.step, figures)
        if evaluating:
          scores = _evaluate(run, at, stopped, clock, reports)
        if saving:
          _save(run, at, scores, clock, goodput)
          timer.saved()
    except Stopped:
      interrupted = True
      reports.now()
    if reports.finding is not None:
      end = rollbacks.go_back(run, decided, reports.finding, reports.position)
      goodput.give_up()
      return Status.PREEMPTED if interrupted and end is None else end
    if interrupted and at.step == begun:
      say(_NOT_BEGUN)
      return Status.PREEMPTED
    if interrupted and run.checkpoints.latest() != at.step:
      _save(run, at, scores, clock, goodput)
    with clock.spent_on(accounting.SAVE):
      while failure := run.checkpoints.failure(wait=True):
        say(f"save      failed ({failure}); once more")
        _save(run, at, scores, clock, goodput)
    goodput.write(at.step, finished=not interrupted)
    log.write(at.step, goodput.record())
  if interrupted:
    say(f"stopped   step {at.step}, saved; run again to continue")
    return Status.PREEMPTED
  say(f"finished  step {cfg.steps}, saved in {run.workdir}")
  return Status.DONE


def _due(step: int, every: int | None, cfg: RunConfig) -> bool:
  return every is not None and (step % every == 0 or step == cfg.steps)


def _evaluate(
  run: Run,
  at: Progress,
  stopped: Interrupt,
  clock: metrics.Clock,
  reports: report.Report,
) -> dict[str, float]:
  """Scores the held-out text; if `Stopped`, the evaluation remains owed."""
  at.owes_evaluation = True
  with clock.spent_on(accounting.EVAL):
    scores = heldout.scores(run, at.state.params, before_batch=stopped.check)
  reports.evaluated(at.step, scores)
  at.owes_evaluation = False
  return scores


def _save(
  run: Run,
  at: Progress,
  scores: dict[str, float],
  clock: metrics.Clock,
  goodput: accounting.Goodput,
) -> None:
  with clock.spent_on(accounting.SAVE):
    goodput.write(at.step)
    run.checkpoints.save(
      at.step,
      {**states.to_items(at.state), "progress": resume.to_json(run, at)},
      {EVAL_LOSS: scores[EVAL_LOSS]} if scores else None,
    )
