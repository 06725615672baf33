"""Where the wall time of a run goes, over all its restarts."""

import contextlib
import json
import time
from typing import Any

import jax
from etils import epath

from xlstm_jax import metrics
from xlstm_jax.errors import UserError

FILE = "goodput.json"
# Wall time goes into steps, or into one of these.
START, COMPILE, DATA, EVAL, SAVE = "start", "compile", "data", "eval", "save"
STEP = "step"
LOST = "lost"
# Far beyond any clock, and far from where sums of floats overflow.
_MAX_SECONDS = 1e12

Spent = dict[str, float]


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
    written, self._earlier, self._checkpoints = _read(self._path)
    self._begun: dict[str, float] = {}
    if written is not None:
      self._lose(time.time() - written - sum(clock.spent().values()))

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
    file = {
      "written": None if finished else time.time(),
      "spent": self.spent(),
      "checkpoints": self._checkpoints,
    }
    temporary = self._path.parent / f".{FILE}.tmp"
    try:
      temporary.write_text(json.dumps(file, indent=1))
      temporary.replace(self._path)
    except OSError as error:
      raise UserError(f"{self._path} cannot be written: {error}.") from error

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


def _read(path: epath.Path) -> tuple[float | None, Spent, dict[str, Spent]]:
  """When the file of an unfinished run was written, and what it says."""
  if path.exists():
    # Damaged, it costs the figures and not the run.
    with contextlib.suppress(
      *(ValueError, TypeError, KeyError, AttributeError),
      *(RecursionError, OverflowError),
    ):
      file = json.loads(path.read_bytes())
      at = {str(int(n)): _spent(s) for n, s in file["checkpoints"].items()}
      written = file["written"]
      if written is not None:
        written = _seconds(written)
      return written, _spent(file["spent"]), at
  return None, {}, {}


def _spent(values: Any) -> Spent:
  if not values.keys() <= {STEP, *_WORDS}:
    raise ValueError("an unknown activity")
  return {name: _seconds(seconds) for name, seconds in values.items()}


def _seconds(value: Any) -> float:
  seconds = float(value)
  if not 0 <= seconds < _MAX_SECONDS:
    raise ValueError("no number of seconds")
  return seconds
