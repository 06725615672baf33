"""Which windows of the data a run leaves out, as decided once and for all.

A run that goes wrong returns to its last good checkpoint and goes on behind
the data that it had read since. The decision is a line of a file before
anything acts on it, and nothing else carries it: a run that is killed in
between, and every later start, reads the same data.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

import jax
from etils import epath

from xlstm_jax.errors import UserError
from xlstm_jax.train import peers, resume
from xlstm_jax.train import workdir as folder
from xlstm_jax.train.health import Finding
from xlstm_jax.train.run import Run, say
from xlstm_jax.train.status import Status

FILE = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class Rollback:
  """One return to a checkpoint.

  Attributes:
    found: the step after which something was found wrong.
    reason: what that was.
    to: the step of the checkpoint.
    first: the first window of the data (a row of a batch) that is left out.
    stop: the window behind the last one.
  """

  found: int
  reason: str
  to: int
  first: int
  stop: int


def read(workdir: epath.PathLike) -> tuple[Rollback, ...]:
  """All rollbacks of a run, oldest first.

  Raises:
    UserError: the file is damaged.
  """
  path = epath.Path(workdir) / FILE
  if not path.exists():
    return ()
  try:
    entries = json.loads(path.read_text())
    found = tuple(Rollback(**entry) for entry in entries)
    if not all(0 <= one.first < one.stop for one in found):
      raise ValueError("it leaves out nothing")
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path} is damaged ({error}); without it the run would read other data. "
      "Restore it from a copy, or move it away to read all data."
    ) from error
  return found


def add(workdir: epath.PathLike, rollback: Rollback) -> None:
  """Commits a decision; a reader sees the file before or after it."""
  path = epath.Path(workdir) / FILE
  entries = [dataclasses.asdict(one) for one in (*read(workdir), rollback)]
  temporary = path.parent / f".{FILE}.tmp"
  with temporary.open("w") as file:
    file.write(json.dumps(entries, indent=2) + "\n")
    file.flush()
    if hasattr(file, "fileno"):
      os.fsync(file.fileno())
  temporary.replace(path)


def following(
  rollbacks: Sequence[Rollback], position: int, *, batch_size: int
) -> int:
  """The first batch from `position` on that holds no window left out."""
  for one in sorted(rollbacks, key=lambda one: one.first):
    if one.first // batch_size <= position < -(-one.stop // batch_size):
      position = -(-one.stop // batch_size)
  return position


def go_back(run: Run, finding: Finding, position: int) -> Status | None:
  """Decides to leave out what was read since the last checkpoint.

  Args:
    run: which has to go back.
    finding: why.
    position: number of the batch behind the last one to leave out.

  Returns:
    None when the decision is on disk and all processes know; `DIVERGED` where
    the run has gone back too often.

  Raises:
    Missing: a process did not come to the same decision in time.
  """
  # A save that failed is no checkpoint to return to.
  run.checkpoints.failure(wait=True)
  to = run.checkpoints.latest()
  first = 0 if to is None else resume.progress(run.checkpoints, to)["windows"]
  before = read(run.workdir)
  if len(before) >= run.cfg.health.max_rollbacks:
    say(
      f"diverged  step {finding.step}: {finding.reason}; the run went back "
      f"{len(before)} times (config.health.max_rollbacks): look at its losses, "
      "change the configuration or allow more"
    )
    return Status.DIVERGED
  decision = Rollback(
    found=finding.step,
    reason=finding.reason,
    to=to or 0,
    first=first,
    stop=position * run.cfg.batch_size,
  )
  if jax.process_index() == 0:
    with folder.surface_write_errors(run.workdir):
      add(run.workdir, decision)
  peers.meet(f"rollback {len(before) + 1}", seconds=run.cfg.limits.meet_seconds)
  say(
    f"rollback  from step {finding.step} to step {to or 0}, without the "
    f"windows {decision.first} to {decision.stop - 1} of the data"
  )
  return None
