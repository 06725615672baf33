"""Where the wall time of a run goes, over all its restarts."""

import contextlib
import time
from typing import Annotated

import jax
import msgspec
from etils import epath
from msgspec import Meta

from xlstm_jax import files, metrics
from xlstm_jax.errors import UserError

FILE = "goodput.json"
# Wall time goes into steps, or into one of these.
START, COMPILE, DATA, EVAL, SAVE = "start", "compile", "data", "eval", "save"
STEP = "step"
LOST = "lost"
# Far beyond any clock, and far from where sums of floats overflow.
_MAX_SECONDS = 1e12

_MAX_BYTES = 2**28
_Seconds = Annotated[float, Meta(ge=0, lt=_MAX_SECONDS)]
_Spent = dict[str, _Seconds]
_Step = Annotated[str, Meta(pattern=r"\A[0-9]{1,18}\Z")]


class _File(msgspec.Struct):
  """What was spent so far, and until the checkpoint of each step.

  Attributes:
    written: when; None for a finished run, which waits for nothing.
    spent: seconds by activity.
    checkpoints: the same by step.
  """

  written: _Seconds | None
  spent: _Spent
  checkpoints: dict[_Step, _Spent]


class Goodput:
  """Adds up what the run has spent, in a file beside its checkpoints.

  What was spent after the checkpoint that a run continues from is lost, and so
  is the time until it was started again, unless it was finished: nothing has to
  be written between checkpoints. Only process 0 writes.

  Args:
    workdir: of the run.
    clock: began when this process did.
  """

  def __init__(self, workdir: epath.PathLike, clock: metrics.Clock):
    self._path = epath.Path(workdir) / FILE
    self._clock = clock
    # Spent before `_begun`, which holds what the clock says since; the same at
    # each checkpoint.
    file = _read(self._path)
    self._earlier, self._checkpoints = file.spent, file.checkpoints
    self._begun: dict[str, float] = {}
    if file.written is not None:
      self._lose(time.time() - file.written - sum(clock.spent().values()))

  def back_to(self, step: int) -> None:
    """The run continues from the checkpoint of a step; 0 for its beginning."""
    kept = {n: s for n, s in self._checkpoints.items() if int(n) <= step}
    spent = kept.get(str(step), {})
    lost = sum(self._earlier.values()) - sum(spent.values())
    self._checkpoints, self._earlier = kept, dict(spent)
    self._lose(lost)

  def give_up(self) -> None:
    """What this process did becomes part of what a `back_to` may lose."""
    self._earlier, self._begun = self.spent(), self._clock.spent()

  def _lose(self, seconds: float) -> None:
    lost = self._earlier.get(LOST, 0.0) + max(seconds, 0.0)
    self._earlier[LOST] = lost

  def spent(self) -> dict[str, float]:
    """Seconds by activity, and `LOST` to restarts."""
    total = dict(self._earlier)
    for name, seconds in self._clock.spent().items():
      new = seconds - self._begun.get(name, 0.0)
      if new > 0:
        total[name] = total.get(name, 0.0) + new
    return total

  def write(self, step: int, *, finished: bool = False) -> None:
    """Keeps what was spent until the checkpoint of a step.

    Args:
      step: of the checkpoint.
      finished: whether it is the last one: the run waits for nothing, though it
        may be extended one day.

    Raises:
      UserError: it cannot be written.
    """
    self._checkpoints[str(step)] = self.spent()
    if jax.process_index() != 0:
      return
    written = None if finished else time.time()
    file = _File(written, self.spent(), self._checkpoints)
    with files.writing(self._path):
      files.write_json(self._path, msgspec.to_builtins(file))

  def record(self) -> dict[str, float]:
    """The shares of the wall time, for the log."""
    spent = self.spent()
    total = sum(spent.values())
    return {f"time/{name}": seconds for name, seconds in spent.items()} | {
      "goodput": spent.get(STEP, 0.0) / total
    }

  def line(self) -> str:
    """The shares of the wall time, in words."""
    spent = self.spent()
    total = sum(spent.values())
    rest = ", ".join(
      f"{words} {spent[name] / total:.1%}"
      for name, words in _WORDS.items()
      if spent.get(name)
    )
    share = spent.get(STEP, 0.0) / total
    return f"{share:.1%} of {metrics.duration(total)} in steps; {rest}"


_WORDS = {
  START: "start",
  COMPILE: "compile",
  DATA: "data wait",
  EVAL: "evaluation",
  SAVE: "saving",
  LOST: "lost to restarts",
}


def _read(path: epath.Path) -> _File:
  """What the file of a run says; nothing where it is missing or damaged."""
  if path.exists():
    data = files.read(path, limit=_MAX_BYTES)
    # Damaged, it costs the figures and not the run.
    with contextlib.suppress(UserError):
      file = files.parse_json(data, _File, path)
      if {*file.spent}.union(*file.checkpoints.values()) <= {STEP, *_WORDS}:
        return file
  return _File(None, {}, {})
