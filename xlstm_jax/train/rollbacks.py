"""The windows of the data that a run leaves out, by decisions that are final.

A run that goes wrong returns to its last good checkpoint and leaves out the
data that it has read since. The decision is in a file before anything acts on
it. So a run that is killed at that point, and every later start, reads the same
data. During a run, each process has all decisions in memory and reaches the
next one by itself, because all see the same losses.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from xlstm_jax.checkpoints import of_first_process
from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError, shown
from xlstm_jax.runtime import peers
from xlstm_jax.runtime.output import say
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import resume
from xlstm_jax.train import workdir as folder
from xlstm_jax.train.health import Finding
from xlstm_jax.train.run import Run

FILE = "rollbacks.json"
_MAX_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Rollback:
  """One return to a checkpoint.

  Attributes:
    found: The step after which something was found wrong.
    reason: What was wrong.
    to: The step of the checkpoint.
    first: The first window of the data (a row of a batch) that is left out.
    stop: The window after the last one that is left out.
  """

  found: int
  reason: str
  to: int
  first: int
  stop: int


def read(workdir: epath.PathLike) -> tuple[Rollback, ...]:
  """All rollbacks of a run, oldest first, as process 0 reads them.

  All processes call this once. A later call might miss what another process has
  written, because file systems of hosts may lag.

  Raises:
    UserError: the file is damaged.
  """
  path = Path(workdir) / FILE
  text = None
  if jax.process_index() == 0 and path.exists():
    data = files.read_regular_file(path, limit=_MAX_BYTES)
    # Any bytes are text in Latin 1.
    text = data.decode("latin-1")
  text = of_first_process(text)
  return () if text is None else _parse(text.encode("latin-1"), path)


def _parse(data: bytes, path: Path) -> tuple[Rollback, ...]:
  try:
    entries = files.parse_json(data, path)
    return tuple(_rollback(entry) for entry in entries)
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path} is damaged ({error}); without it the run would read other data. "
      "Restore it from a copy, or move it away to read all data."
    ) from error


def _rollback(entry: Any) -> Rollback:
  fields = dataclasses.fields(Rollback)
  if not isinstance(entry, dict) or set(entry) != {f.name for f in fields}:
    raise ValueError(f"a decision is {shown(entry)}")
  one = Rollback(**entry)
  for field in fields:
    value = getattr(one, field.name)
    # No `isinstance`, as true and false are integers to Python.
    if type(value) is not field.type:
      raise ValueError(f"{field.name} is {shown(value)}")
  # Windows are numbered by int64.
  if not 0 <= one.first < one.stop < 2**63:
    raise ValueError(f"it leaves out {shown(one.first)} to {shown(one.stop)}")
  return one


def commit(workdir: epath.PathLike, rollbacks: Sequence[Rollback]) -> None:
  """Replaces the file; readers see the old or the new one."""
  path = epath.Path(workdir) / FILE
  entries = [dataclasses.asdict(one) for one in rollbacks]
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
  """The first batch from `position` on in which no window is left out."""
  for one in sorted(rollbacks, key=lambda one: one.first):
    if one.first // batch_size <= position < -(-one.stop // batch_size):
      position = -(-one.stop // batch_size)
  return position


def go_back(
  run: Run, decided: list[Rollback], finding: Finding, position: int
) -> Status | None:
  """Decides to leave out what was read since the newest good checkpoint.

  Args:
    run: the run that has to go back.
    decided: all rollbacks so far, the same in all processes; grows by one.
    finding: the reason.
    position: number of the batch after the last one to leave out.

  Returns:
    None once the decision is on disk and all processes know it; `DIVERGED` if
    the run has gone back too often.

  Raises:
    UserError: no checkpoint is good, or the decision cannot be written.
    Missing: a process did not reach the same decision in time.
  """
  # The run cannot return to a checkpoint whose save failed.
  run.checkpoints.failure(wait=True)
  if len(decided) >= run.cfg.health.max_rollbacks:
    say(
      f"diverged  step {finding.step}: {finding.reason}; the run went back "
      f"{len(decided)} times (config.health.max_rollbacks): look at its "
      "losses, change the configuration or allow more"
    )
    return Status.DIVERGED
  for sentence in run.checkpoints.set_damaged_aside():
    say(f"damaged   {sentence}")
  to = run.checkpoints.latest()
  first = 0 if to is None else resume.progress(run.checkpoints, to)["windows"]
  decision = Rollback(
    found=finding.step,
    reason=finding.reason,
    to=to or 0,
    first=first,
    stop=position * run.cfg.batch_size,
  )
  decided.append(decision)
  if jax.process_index() == 0:
    with folder.surface_write_errors(run.workdir):
      commit(run.workdir, decided)
  peers.meet(f"rollback {len(decided)}", seconds=run.cfg.limits.meet_seconds)
  say(
    f"rollback  from step {finding.step} to step {to or 0}, without the "
    f"windows {decision.first} to {decision.stop - 1} of the data"
  )
  return None
