"""Kills a run at random moments and compares it with one that was left alone.

Its data are killed while they are prepared, and go on to the same files. The
run itself is killed while it imports, starts, compiles, makes a step, saves and
evaluates, each time started again, and in the end left to finish. Its loss at
every step and its final parameters and moments must be, bit by bit, those of
the same run that nothing disturbed.

  python tests/tools/kill_run.py --kills=200
  python tests/tools/kill_run.py --kills=20 --signal=TERM --processes=2

Runs are forks of this process, which has done the imports: a start costs a
second or two instead of ten. They tell what they are doing, so that a kill
counts for what it really hit. Exits with 1 on the first difference.
"""

import argparse
import collections
import dataclasses
import mmap
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NoReturn
from unittest import mock

import numpy as np

from xlstm_jax import config, metrics, sharding
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import journal
from xlstm_jax.errors import exit_code
from xlstm_jax.models.language_model import Definition
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.prepare import preparation, workers
from xlstm_jax.runtime import accounting, interrupt
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import command, report
from xlstm_jax.train import state as states
from xlstm_jax.train.step import Metrics

SAVE_EVERY, EVAL_EVERY = 4, 7
EXPERIMENT = f"""\
from xlstm_jax.config import RunConfig, to_config_dict

def get_config():
  cfg = to_config_dict(RunConfig())
  cfg.model.vocab_size = 257
  cfg.model.width = 16
  cfg.model.num_blocks = 1
  cfg.model.mlstm.round_to = 16
  cfg.model.mlstm.num_heads = 2
  cfg.model.dropout = 0.1
  cfg.compute.dtype = "float32"
  cfg.data.context = 32
  cfg.batch_size = 4
  cfg.optim.warmup_steps = 5
  cfg.log_every = 1
  cfg.save_every = {SAVE_EVERY}
  cfg.eval_every = {EVAL_EVERY}
  cfg.eval_tokens = 1024
  cfg.checkpoint.keep_best = 0
  return cfg
"""
# A kill comes at most so many steps behind the checkpoint gone on from, and
# then at the next save or evaluation: most of them see a new one committed.
REACH = 5 * SAVE_EVERY
# Half of the kills need steps at all.
STEPS, STEPS_PER_KILL = 60, 14
# What a run is killed in, in turn. The first comes before anything is saved,
# so that a run is begun anew too.
PHASES: tuple[str, ...] = (
  "compile",
  "step",
  "save",
  "evaluation",
  "start",
  "imports",
)
ONCE = ("compile", "start", "imports")
PHASE_OF = {
  "": "start",
  accounting.START: "start",
  accounting.COMPILE: "compile",
  accounting.STEP: "step",
  accounting.DATA: "step",
  accounting.EVAL: "evaluation",
  accounting.SAVE: "save",
}
# Seconds after which a run that does not reach its moment is a failure.
PATIENCE = 600
# Two processes may have to compile before they can agree where to stop.
GRACE_OF_SEVERAL = 300
# Files of text for every kill of a preparation: about 18 commits.
FILES_PER_KILL = 60


class Attempt:
  """The processes of one start of a run; with several, each has one device.

  Args:
    arguments: of the command.
    folder: takes the log.
    count: of processes.
    as_command: executes the command, with its imports, instead of forking; it
      then does not tell what it is doing.

  Attributes:
    log: what the processes print.
    begun: when they were started.
    running: the process ids of those that still run, by index.
  """

  _PAGE = struct.Struct("<16sq")

  def __init__(
    self,
    arguments: list[str],
    folder: pathlib.Path,
    count: int,
    *,
    as_command: bool = False,
  ):
    self.as_command = as_command
    self.log = folder / "log.txt"
    self.log.write_text("")
    shared = []
    if count > 1:
      with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
      shared = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    self.running: dict[int, int] = {}
    self._ends: dict[int, int] = {}
    # Shared with the processes, and still there when they are killed.
    self._pages = [mmap.mmap(-1, self._PAGE.size) for _ in range(count)]
    self.begun = time.monotonic()
    for index in range(count):
      own = [*arguments, *shared, *([f"--process={index}"] if shared else [])]
      self.running[index] = forked(
        self.log, lambda own=own, index=index: self._become(own, index)
      )

  def _become(self, arguments: list[str], index: int) -> int:
    """The rest of this process is what the command does."""
    if self.as_command:
      words = [sys.executable, "-m", "xlstm_jax.train", *arguments]
      os.execv(sys.executable, words)
    self._tell(self._pages[index])
    with interrupt.noted() as stopped:
      return exit_code(lambda: command.main(arguments, stopped))

  def _tell(self, page: mmap.mmap) -> None:
    """Keeps the activity and the step of this process in the page."""
    now, later = metrics.Clock.now, report.Report.later
    activity, step = "", 0

    def write() -> None:
      page[:] = self._PAGE.pack(activity.encode(), step)

    def now_and_tell(clock: metrics.Clock, new: str) -> None:
      nonlocal activity
      activity = new
      write()
      now(clock, new)

    def later_and_tell(
      reports: report.Report, number: int, position: int, measured: Metrics
    ) -> None:
      nonlocal step
      step = number
      write()
      later(reports, number, position, measured)

    mock.patch.object(metrics.Clock, "now", now_and_tell).start()
    mock.patch.object(report.Report, "later", later_and_tell).start()

  def doing(self, index: int) -> tuple[str, int]:
    """The phase a process is in, and the last step that it made or 0."""
    activity, step = self._PAGE.unpack(self._pages[index][:])
    return PHASE_OF[activity.rstrip(b"\0").decode()], step

  def listens(self, index: int) -> bool:
    """Whether a process handles SIGTERM yet."""
    status = pathlib.Path(f"/proc/{self.running[index]}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    assert caught
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

  def has_imported(self) -> bool:
    """Whether the run has said its first line."""
    return "workdir " in self.log.read_text()

  def started_from(self) -> int | None:
    """The step the run went on from, 0 for none; None before it says so."""
    line = re.search(
      r"^start +(new run|step (\d+))", self.log.read_text(), re.M
    )
    return int(line[2] or 0) if line else None

  def poll(self) -> bool:
    """Whether all processes are still there."""
    for index, pid in list(self.running.items()):
      ended, status = os.waitpid(pid, os.WNOHANG)
      if ended:
        self._ends[index] = os.waitstatus_to_exitcode(status)
        del self.running[index]
    return not self._ends

  def wait(self, index: int | None = None) -> list[int]:
    """The exit statuses of all processes, or of one alone, in order."""
    deadline = time.monotonic() + PATIENCE
    while index in self.running or (index is None and self.running):
      self.poll()
      if time.monotonic() > deadline:
        self.fail("a run did not end")
      time.sleep(0.001)
    return [self._ends[index] for index in sorted(self._ends)]

  def send(self, number: signal.Signals, index: int | None = None) -> None:
    """Sends a signal to one process, or to all."""
    for at, pid in self.running.items():
      if index in (None, at):
        os.kill(pid, number)

  def fail(self, sentence: str) -> NoReturn:
    """Ends this process and what is left of the run, with its log."""
    self.send(signal.SIGKILL)
    raise SystemExit(f"{sentence}:\n{self.log.read_text()}")


def forked(log: pathlib.Path, work: Callable[[], int]) -> int:
  """The id of a new process that works and exits with the result."""
  sys.stdout.flush()
  pid = os.fork()
  if pid == 0:
    with log.open("a") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    status = work()
    sys.stdout.flush()
    os._exit(status)
  return pid


class Killer:
  """Starts a run again and again, and kills it every time.

  Args:
    arguments: of the command.
    folder: of all the files here.
    options: of this script.
    rng: draws the moments.

  Attributes:
    starts: the step that each start went on from, where it came so far.
    hit: kills by what the run was doing. A save goes on in the background of
      the others.
    slowest: seconds from SIGTERM to the end of the last process.
  """

  def __init__(
    self,
    arguments: list[str],
    folder: pathlib.Path,
    options: argparse.Namespace,
    rng: random.Random,
  ):
    self._folder = folder
    self._workdir = folder / "killed"
    self._arguments = arguments
    self._options = options
    self._rng = rng
    self._signal = signal.Signals[f"SIG{options.signal}"]
    # Seconds that the last of every phase took: what a moment is drawn from.
    self._lasted = dict.fromkeys(PHASES, 1.0)
    self.starts: list[int] = []
    self.hit: collections.Counter[str] = collections.Counter()
    self.slowest = 0.0

  def left_alone(self, workdir: pathlib.Path) -> None:
    """Runs the command undisturbed, and learns how long the imports take."""
    attempt = self._start(workdir, as_command=True)
    while attempt.poll() and not attempt.has_imported():
      time.sleep(0.01)
    self._lasted["imports"] = time.monotonic() - attempt.begun
    if set(attempt.wait()) != {Status.DONE}:
      attempt.fail("the run that was left alone failed")

  def kill(self, phase: str) -> bool:
    """Starts the run and sends the signal in a phase; whether it hit it."""
    before = committed(self._workdir)
    attempt = self._start(self._workdir, as_command=phase == "imports")
    victim = self._rng.choice(list(attempt.running))
    # Where nothing is saved yet, a second save must have waited for the first.
    nearest = 1 if before else 2 * SAVE_EVERY + 1
    step = before + self._rng.randint(nearest, REACH)
    self._wait_for(phase, attempt, victim, step)
    if self._signal == signal.SIGTERM:
      seen = self._seen(attempt, victim)
      self._terminate(attempt, victim, seen)
    else:
      attempt.send(signal.SIGKILL, victim)
      attempt.wait(victim)
      seen = self._seen(attempt, victim)
      # What a scheduler does with the others, in a while.
      time.sleep(self._rng.uniform(0, 0.2) if attempt.running else 0)
      attempt.send(signal.SIGKILL)
      attempt.wait()
    self._note_start(attempt, before)
    if committed(self._workdir) < before:
      attempt.fail(f"the checkpoint of step {before} is gone")
    self.hit.update(seen)
    return phase in seen

  def finish(self) -> Attempt:
    """Runs to the end; the last start must go on from a checkpoint."""
    before = committed(self._workdir)
    attempt = self._start(self._workdir)
    if set(attempt.wait()) != {Status.DONE}:
      attempt.fail("the last start failed")
    self._note_start(attempt, before)
    if attempt.started_from() == 0:
      attempt.fail("the last start went on from no checkpoint")
    again = self.starts[1:]
    if 2 * sum(step > 0 for step in again) < len(again):
      attempt.fail(f"most starts went on from no checkpoint, but {again}")
    return attempt

  def _start(
    self, workdir: pathlib.Path, *, as_command: bool = False
  ) -> Attempt:
    return Attempt(
      [*self._arguments, f"--workdir={workdir}"],
      self._folder,
      self._options.processes,
      as_command=as_command,
    )

  def _note_start(self, attempt: Attempt, before: int) -> None:
    start = attempt.started_from()
    if start is None:
      return
    if start != before:
      attempt.fail(f"step {before} was committed, the start was from {start}")
    self.starts.append(start)

  def _wait_for(
    self, phase: str, attempt: Attempt, victim: int, step: int
  ) -> None:
    """Returns at a random moment of a phase, after a step if it has one."""
    window = self._rng.uniform(0, self._lasted[phase])
    since: float | None = None
    doing, changed = "start", attempt.begun
    while True:
      now = time.monotonic()
      if not attempt.poll() or now > attempt.begun + PATIENCE:
        attempt.fail(f"the run could not be killed in {phase}")
      last, (doing, made) = doing, attempt.doing(victim)
      if doing != last:
        self._lasted[last] = now - changed
        changed = now
      inside = made >= step and doing == phase
      if phase == "save":
        inside = made >= step and is_saving(self._workdir)
      elif phase == "imports":
        inside = not attempt.has_imported()
      elif phase in ONCE:
        inside = doing == phase
      if inside and since is None and self._can_hear(attempt, victim):
        since = now
      if since is not None and inside and now - since >= window:
        return
      if since is not None and not inside:
        # Too late; most phases come again.
        if phase in ONCE:
          self._lasted[phase] = now - since
          return
        since, window = None, 0.0
      time.sleep(0.0005)

  def _can_hear(self, attempt: Attempt, victim: int) -> bool:
    # Before Python has begun, SIGTERM ends a process as it does any other.
    return self._signal != signal.SIGTERM or attempt.listens(victim)

  def _seen(self, attempt: Attempt, victim: int) -> set[str]:
    """What a process is doing, or did when it was killed."""
    if attempt.as_command:
      return {"later" if attempt.has_imported() else "imports"}
    doing, step = attempt.doing(victim)
    return {doing, "save"} if step and is_saving(self._workdir) else {doing}

  def _terminate(self, attempt: Attempt, victim: int, seen: set[str]) -> None:
    """Sends SIGTERM; at most the step in flight may be lost."""
    start = time.monotonic()
    attempt.send(signal.SIGTERM, victim)
    ends = attempt.wait()
    seconds = time.monotonic() - start
    self.slowest = max(self.slowest, seconds)
    if set(ends) != {Status.PREEMPTED}:
      attempt.fail(f"ended with {ends} in {seen}")
    # The grace is counted in ticks, which a busy machine lengthens.
    if seconds > 1.5 * self.grace():
      attempt.fail(f"ended {seconds:.1f} s after the signal in {seen}")
    if "after the signal, while" in attempt.log.read_text() and not (
      seen <= {"imports", "start", "compile"}
    ):
      attempt.fail(f"the grace of {self.grace()} s did not do in {seen}")
    saved, recorded = committed(self._workdir), last_step(self._workdir)
    if saved != recorded:
      attempt.fail(f"step {recorded} was made and step {saved} is saved")

  def grace(self) -> float:
    """Seconds between SIGTERM and the end of the processes."""
    return config.load(self._folder / "alone").limits.grace_seconds


def main() -> int:
  options = parse()
  folder = pathlib.Path(options.workdir or tempfile.mkdtemp())
  rng = random.Random(options.seed)
  start = time.monotonic()
  killer = Killer(prepared(folder, options, rng), folder, options, rng)
  killer.left_alone(folder / "alone")
  print(f"left alone until {time.monotonic() - start:.0f} s", flush=True)
  hits = kills = 0
  while hits < options.kills:
    if kills == 3 * options.kills:
      raise SystemExit(f"{kills} kills hit what they should {hits} times")
    hits += killer.kill(PHASES[hits % len(PHASES)])
    kills += 1
  last = killer.finish()
  compare(folder / "alone", folder / "killed")
  seconds = time.monotonic() - start
  print(f"{kills} x SIG{options.signal} survived, {hits} as meant:")
  print(", ".join(f"{n} in {phase}" for phase, n in killer.hit.items()))
  again = killer.starts[1:]
  print(
    f"{sum(step > 0 for step in again)} of {len(again)} restarts went on from "
    f"a checkpoint: steps {', '.join(map(str, again))}"
  )
  if options.signal == "TERM":
    print(
      f"all ended with status 75, at the latest {killer.slowest:.1f} s after "
      f"the signal, of {killer.grace():g}; no step that was made was lost"
    )
  count = len(metrics.trajectory(folder / "alone"))
  print(f"{count} records and the final state are equal")
  spent = [
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  ]
  cpu = sum(one.ru_utime + one.ru_stime for one in spent)
  print(f"in {seconds:.0f} s, {cpu:.0f} s of one core")
  for line in last.log.read_text().splitlines():
    if line.startswith("goodput"):
      print(line)
  if options.workdir is None:
    shutil.rmtree(folder)
  return 0


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=20, metavar="N")
  parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
  parser.add_argument("--processes", type=int, default=1, metavar="N")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--workdir", metavar="DIR", help="a new folder that is kept"
  )
  return parser.parse_args()


def prepared(
  folder: pathlib.Path, options: argparse.Namespace, rng: random.Random
) -> list[str]:
  """Data and an experiment; returns the arguments of the runs."""
  folder.mkdir(parents=True, exist_ok=True)
  kill_preparation(folder, max(options.kills // 5, 1), options.signal, rng)
  (folder / "experiment.py").write_text(EXPERIMENT)
  arguments = [
    f"--config={folder / 'experiment.py'}",
    # The data whose preparation was killed: they are the same.
    f"--config.data.paths={folder / 'data'}",
    f"--config.compilation_cache={folder / 'cache'}",
    f"--config.steps={STEPS + STEPS_PER_KILL * options.kills}",
  ]
  if options.processes > 1:
    arguments.append(f"--config.limits.grace_seconds={GRACE_OF_SEVERAL}")
  return arguments


def kill_preparation(
  folder: pathlib.Path, kills: int, name: str, rng: random.Random
) -> None:
  """Prepares data twice, once killed, and ends the process if they differ."""
  corpus = folder / "corpus"
  corpus.mkdir()
  for n in range(FILES_PER_KILL * kills):
    words = [f"word{(n * k * k) % 13}" for k in range(150)]
    (corpus / f"{n}.txt").write_text(" ".join(words))
  left_alone, output = folder / "data-alone", folder / "data"
  log = folder / "log.txt"
  check_end(start_preparation(log, corpus, left_alone), log, 0)
  # A preparation that is stopped commits what it has read.
  expected = {"KILL": -signal.SIGKILL, "TERM": 128 + signal.SIGTERM}[name]
  for _ in range(kills):
    before = read_files(output)
    pid = start_preparation(log, corpus, output)
    wait_for_commits(pid, output, rng.randint(1, 4))
    time.sleep(rng.uniform(0, 0.02))
    os.kill(pid, signal.Signals[f"SIG{name}"])
    check_end(pid, log, expected)
    if read_files(output) <= before:
      raise SystemExit(f"a killed preparation is back before {before} files")
  check_end(start_preparation(log, corpus, output), log, 0)
  expected_files, found = contents(left_alone), contents(output)
  if expected_files != found:
    raise SystemExit(f"{left_alone} and {output} differ")
  print(f"preparation: {kills} x SIG{name} survived, {len(found)} files equal")


def start_preparation(
  log: pathlib.Path, corpus: pathlib.Path, output: pathlib.Path
) -> int:
  """The id of a new process that prepares."""
  log.write_text("")
  arguments = [
    f"--input={corpus}",
    f"--output={output}",
    "--tokenizer=byte",
    "--heldout-fraction=0.3",
    "--workers=1",
  ]

  def work() -> int:
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
      time.sleep(0.002)
      fsync(descriptor)

    # Many commits, each of which takes a while on any disk.
    os.fsync = slow_fsync
    workers.TASK_BYTES = 4000
    preparation._COMMIT_SECONDS = 0.0
    return exit_code(lambda: prepare.main(arguments))

  return forked(log, work)


def wait_for_commits(pid: int, output: pathlib.Path, count: int) -> None:
  """Returns when a preparation has committed so often, or has ended."""
  last = read_files(output)
  flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
  while count and os.waitid(os.P_PID, pid, flags) is None:
    now = read_files(output)
    count -= now != last
    last = now
    time.sleep(0.0005)


def check_end(pid: int, log: pathlib.Path, expected: int) -> None:
  _, status = os.waitpid(pid, 0)
  code = os.waitstatus_to_exitcode(status)
  if code != expected:
    raise SystemExit(
      f"a preparation ended with {code}, not {expected}:\n{log.read_text()}"
    )


def read_files(output: pathlib.Path) -> int:
  """How many files a preparation has read and committed."""
  kept = journal.load(output) if output.exists() else None
  return kept.place.file if kept else 0


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def committed(workdir: pathlib.Path) -> int:
  """The newest checkpoint, 0 for none."""
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def is_saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is not committed; an older one is removed first."""
  return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))


def last_step(workdir: pathlib.Path) -> int:
  """The last step that was recorded, 0 for none."""
  path = workdir / "metrics.jsonl"
  records = metrics.read(workdir) if path.exists() else []
  return records[-1]["step"] if records else 0


def compare(alone: pathlib.Path, killed: pathlib.Path) -> None:
  """Ends the process at the first difference."""
  a, b = metrics.trajectory(alone), metrics.trajectory(killed)
  for one, other in zip(a, b, strict=False):
    if one != other:
      raise SystemExit(f"left alone {one}, killed {other}")
  if len(a) != len(b):
    raise SystemExit(f"left alone {len(a)} records, killed {len(b)}")
  (first, cfg), (second, _) = final_arrays(alone), final_arrays(killed)
  assert max(record["step"] for record in a) == cfg.steps
  for name, array in first.items():
    if array.tobytes() != second[name].tobytes():
      raise SystemExit(f"{name} differs")


def final_arrays(
  workdir: pathlib.Path,
) -> tuple[dict[str, np.ndarray], RunConfig]:
  """Parameters and moments of the last step."""
  import jax

  cfg = config.load(workdir)
  mesh = sharding.make_mesh(dataclasses.replace(cfg.mesh))
  like = states.to_items(
    states.abstract(Definition(cfg.model, cfg.compute), mesh)
  )
  items = Checkpoints(workdir / "checkpoints").restore(cfg.steps, like)
  leaves = jax.tree_util.tree_leaves_with_path(items)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves
  }, cfg


if __name__ == "__main__":
  sys.exit(main())
