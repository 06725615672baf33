"""What a run reports: clocks and rates, and records on disk."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from xlstm_jax.errors import UserError

Record = Mapping[str, float]
# Generated modules define their messages when they are imported.
Event: Any = getattr(event_pb2, "Event")  # noqa: B009
SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009
Summary: Any = getattr(summary_pb2, "Summary")  # noqa: B009

# Dense bf16 FLOP/s of one `device_kind`, from the manufacturers' data sheets.
PEAK_FLOPS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Dense bf16 FLOP/s of a kind of device; None if it is unknown."""
  return PEAK_FLOPS.get(device_kind)


class Clock:
  """Adds up the wall time per activity; there is always one current activity.

  Args:
    activity: the first activity.

  Attributes:
    activity: The current activity.
    changes: How often it has changed.
  """

  def __init__(self, activity: str):
    self.activity = activity
    self.changes = 0
    self._since = time.perf_counter()
    self._spent: dict[str, float] = {}
    self._lapped: dict[str, float] = {}

  def now(self, activity: str) -> None:
    """Starts to count time for this activity."""
    self._spent = self.spent()
    self._since = time.perf_counter()
    # In this order: see `Watchdog`, which reads both in another thread.
    self.changes += 1
    self.activity = activity

  @contextlib.contextmanager
  def spent_on(self, activity: str) -> Iterator[None]:
    """Counts the time inside this context for the activity."""
    before = self.activity
    self.now(activity)
    try:
      yield
    finally:
      self.now(before)

  def spent(self) -> dict[str, float]:
    """Seconds by activity."""
    seconds = time.perf_counter() - self._since
    before = self._spent.get(self.activity, 0.0)
    return self._spent | {self.activity: before + seconds}

  def lap(self) -> dict[str, float]:
    """Seconds by activity since the last lap."""
    spent, before = self.spent(), self._lapped
    self._lapped = spent
    laps = {name: s - before.get(name, 0.0) for name, s in spent.items()}
    return {name: seconds for name, seconds in laps.items() if seconds > 0}


class Log:
  """Records of a run in WORKDIR/metrics.jsonl and for TensorBoard.

  Records after `step`, which an earlier attempt left, are dropped. So the file
  is the trajectory of one uninterrupted run. Only process 0 writes.

  Args:
    workdir: the run's workdir.
    step: the step from which the run continues.
    without: records of `step` itself that have this metric are dropped too.

  Raises:
    UserError: the workdir cannot be written to (the methods raise this too), or
      its records are damaged.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    step: int,
    without: str | None = None,
  ):
    self._writes = jax.process_index() == 0
    self._workdir = epath.Path(workdir)
    if not self._writes:
      return
    with self._surface_write_errors():
      path = self._workdir / "metrics.jsonl"
      _drop_after(path, step, without)
      self._file = path.open("a")
      self._board = _Board(self._workdir / "tensorboard", step=step)

  def write(self, step: int, record: Record) -> None:
    """Adds one record; it is in the file when this returns."""
    if not self._writes:
      return
    finite = {
      name: value if math.isfinite(value) else None
      for name, value in record.items()
    }
    with self._surface_write_errors():
      self._file.write(json.dumps({"step": step, **finite}) + "\n")
      self._file.flush()
      self._board.write(step, record)

  def close(self) -> None:
    """Closes the files, and writes what was buffered for TensorBoard."""
    if not self._writes:
      return
    with self._surface_write_errors():
      self._file.close()
      self._board.close()

  @contextlib.contextmanager
  def _surface_write_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"The records of the run cannot be written to {self._workdir}: "
        f"{error.strerror}; make room for them and run again."
      ) from error


class _Board:
  """TensorBoard's event file, written in this thread.

  tensorboardX's SummaryWriter writes in a thread of its own. A full disk ends
  that thread, its queue fills, and the run hangs.
  """

  _FLUSH_SECONDS = 10.0

  def __init__(self, directory: epath.Path, *, step: int):
    directory.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(directory / "events"))
    self._flushed = -math.inf
    # TensorBoard discards what an earlier attempt wrote from this step on.
    start = SessionLog(status=SessionLog.START)
    self._write(Event(step=step + 1, session_log=start))

  def write(self, step: int, record: Record) -> None:
    values = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in record.items()
    ]
    self._write(Event(step=step, summary=Summary(value=values)))

  def close(self) -> None:
    self._writer.close()

  def _write(self, event: Any) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
    if time.monotonic() - self._flushed > self._FLUSH_SECONDS:
      self._writer.flush()
      self._flushed = time.monotonic()


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """All records of a run, oldest first; none if there is no file.

  Raises:
    UserError: a record is damaged.
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  return [record for _, record in _records(path)]


# The metrics that differ between runs that are otherwise the same.
TIMINGS = {
  "seconds_per_step",
  "tokens_per_second",
  "flops_per_second",
  "mfu",
  "data_wait",
  "goodput",
}


def trajectory(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """All records, without the metrics that depend on time."""
  records = [
    {
      name: value
      for name, value in record.items()
      if name not in TIMINGS and not name.startswith("time/")
    }
    for record in read(workdir)
  ]
  return [record for record in records if record.keys() != {"step"}]


def _drop_after(path: epath.Path, step: int, without: str | None) -> None:
  if not path.exists():
    return
  kept = []
  for line, record in _records(path):
    if record["step"] > step:
      break
    if record["step"] < step or without not in record:
      kept.append(line + b"\n")
  temporary = path.parent / f".{path.name}.tmp"
  temporary.write_bytes(b"".join(kept))
  temporary.replace(path)


def _records(path: epath.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Lines and their records; a last line that is cut off is left out.

  Raises:
    UserError: any other line is damaged.
  """
  lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      record = None
    if isinstance(record, dict) and type(record.get("step")) is int:
      yield line, record
    # A killed process leaves half a line.
    elif number < len(lines):
      raise UserError(
        f"{path} is damaged in line {number}, which is no record of a step: "
        "delete that line, or move the file away if nobody needs what it says."
      )


def perplexity(loss: float) -> float:
  """exp(loss), or infinity if that overflows."""
  return math.exp(loss) if loss < 700 else math.inf


def short(number: float) -> str:
  """Three digits and a unit: 12.3k, 4.56M."""
  for unit in ("", "k", "M", "G", "T", "P"):
    if abs(number) < 999.5 or unit == "P":
      return f"{number:.3g}{unit}"
    number /= 1000
  raise AssertionError("unreachable")


def duration(seconds: float) -> str:
  """Hours and minutes, or minutes and seconds: 3h05m, 12m08s."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes >= 60:
    return f"{minutes // 60}h{minutes % 60:02d}m"
  return f"{minutes}m{rest:02d}s"
