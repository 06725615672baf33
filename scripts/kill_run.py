"""Kills a run at random moments and compares it with one that was left alone.

A small run is killed in the middle of starting, compiling, a step, a save and
an evaluation, each time started again, and in the end left to finish. Its loss
at every step and its final parameters must be, bit by bit, those of the same
run that nothing disturbed.

  python scripts/kill_run.py --kills=200
  python scripts/kill_run.py --kills=20 --signal=TERM --processes=2

Runs are forks of this process, which has done the imports: a start costs a
second or two instead of ten. Exits with 1 on the first difference.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time

import numpy as np

from xlstm_jax import config, metrics, prepare, sharding
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.errors import exit_code
from xlstm_jax.models.language_model import Definition
from xlstm_jax.train import command, interrupt
from xlstm_jax.train import state as states
from xlstm_jax.train.status import Status

EXPERIMENT = """\
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
  cfg.save_every = 5
  cfg.eval_every = 7
  cfg.eval_tokens = 256
  cfg.checkpoint.keep_best = 0
  return cfg
"""
# Enough that the run is not finished before the last kill: a moment is at most
# seven steps after the checkpoint, and the run goes on while it is noticed.
STEPS_PER_KILL = 25
# What a run is killed in, and within how many seconds of its beginning.
PHASES = {
  "start": 1.0,
  "compile": 1.0,
  "step": 0.02,
  "save": 0.05,
  "evaluation": 0.05,
}
# Seconds after which a run that does not reach its moment is a failure.
PATIENCE = 600


class Attempt:
  """The processes of one start of a run; with several, each has one device."""

  def __init__(self, arguments: list[str], folder: pathlib.Path, count: int):
    self.log = folder / "log.txt"
    self.log.write_text("")
    shared = []
    if count > 1:
      with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
      shared = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    self.running: dict[int, int] = {}
    self.ends: dict[int, int] = {}
    for index in range(count):
      own = [*shared, f"--process={index}"] if shared else []
      pid = os.fork()
      if pid == 0:
        self._become([*arguments, *own])
      self.running[index] = pid

  def _become(self, arguments: list[str]) -> None:
    """The rest of this process is what the command does."""
    with self.log.open("a") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    with interrupt.noted() as stopped:
      status = exit_code(lambda: command.main(arguments, stopped))
    sys.stdout.flush()
    os._exit(status)

  def poll(self) -> bool:
    """Whether all processes are still there."""
    for index, pid in list(self.running.items()):
      ended, status = os.waitpid(pid, os.WNOHANG)
      if ended:
        self.ends[index] = os.waitstatus_to_exitcode(status)
        del self.running[index]
    return not self.ends

  def wait(self) -> list[int]:
    """The exit statuses of all processes, in order."""
    deadline = time.monotonic() + PATIENCE
    while self.running:
      self.poll()
      if time.monotonic() > deadline:
        self.send(signal.SIGKILL)
        raise SystemExit(f"a run did not end:\n{self.log.read_text()}")
      time.sleep(0.005)
    return [self.ends[index] for index in sorted(self.ends)]

  def send(self, number: signal.Signals, index: int | None = None) -> None:
    """Sends a signal to one process, or to all."""
    for at, pid in self.running.items():
      if index in (None, at):
        os.kill(pid, number)


def main() -> int:
  options = parse()
  folder = pathlib.Path(options.workdir or tempfile.mkdtemp())
  arguments = prepared(folder, options)
  rng = random.Random(options.seed)
  alone, killed = folder / "alone", folder / "killed"
  start = time.monotonic()
  attempt = Attempt(
    [*arguments, f"--workdir={alone}"], folder, options.processes
  )
  if set(attempt.wait()) != {Status.DONE}:
    raise SystemExit(attempt.log.read_text())
  print(f"left alone: {time.monotonic() - start:.0f} s", flush=True)

  arguments = [*arguments, f"--workdir={killed}"]
  counts = collections.Counter()
  for number in range(options.kills):
    # In turn, as most moments of a small run are those of its start.
    phase = list(PHASES)[number % len(PHASES)]
    kill(arguments, folder, phase, options, rng)
    counts[phase] += 1
  attempt = Attempt(arguments, folder, options.processes)
  if set(attempt.wait()) != {Status.DONE}:
    raise SystemExit(attempt.log.read_text())
  compare(alone, killed)
  seconds = time.monotonic() - start
  print(f"{options.kills} x SIG{options.signal} survived in {seconds:.0f} s, ")
  print(", ".join(f"{count} in {phase}" for phase, count in counts.items()))
  print(
    f"{len(metrics.trajectory(alone))} records and the final state are equal"
  )
  for line in attempt.log.read_text().splitlines():
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


def prepared(folder: pathlib.Path, options: argparse.Namespace) -> list[str]:
  """Data and an experiment; returns the arguments of the runs."""
  corpus = folder / "corpus"
  corpus.mkdir(parents=True)
  for n in range(12):
    words = [f"word{(n * k * k) % 13}" for k in range(150)]
    (corpus / f"{n}.txt").write_text(" ".join(words))
  made = prepare.main(
    [
      f"--input={corpus}",
      f"--output={folder / 'data'}",
      "--tokenizer=byte",
      "--heldout-fraction=0.3",
    ]
  )
  assert made == 0
  (folder / "experiment.py").write_text(EXPERIMENT)
  return [
    f"--config={folder / 'experiment.py'}",
    f"--config.data.paths={folder / 'data'}",
    f"--config.compilation_cache={folder / 'cache'}",
    f"--config.steps={STEPS_PER_KILL * max(options.kills, 1)}",
  ]


def kill(
  arguments: list[str],
  folder: pathlib.Path,
  phase: str,
  options: argparse.Namespace,
  rng: random.Random,
) -> None:
  """Starts the run and sends the signal in the middle of a phase."""
  workdir = folder / "killed"
  attempt = Attempt(arguments, folder, options.processes)
  first = last_step(workdir) + rng.randint(1, 5)
  deadline = time.monotonic() + PATIENCE
  while not has_begun(phase, workdir, attempt.log, first):
    if not attempt.poll() or time.monotonic() > deadline:
      raise SystemExit(
        f"the run ended before it could be killed in {phase}, with "
        f"{attempt.ends}:\n{attempt.log.read_text()}"
      )
    time.sleep(0.001)
  time.sleep(rng.uniform(0, PHASES[phase]))
  if not attempt.poll():
    raise SystemExit(f"the run ended by itself:\n{attempt.log.read_text()}")
  attempt.send(
    getattr(signal, f"SIG{options.signal}"), rng.choice(list(attempt.running))
  )
  if options.signal == "TERM":
    ends = attempt.wait()
    if set(ends) != {Status.PREEMPTED}:
      raise SystemExit(f"ended with {ends}:\n{attempt.log.read_text()}")
  else:
    # What a scheduler does with the others.
    attempt.send(signal.SIGKILL)
    attempt.wait()


def has_begun(
  phase: str, workdir: pathlib.Path, log: pathlib.Path, first: int
) -> bool:
  """Whether a run that has started is in this phase."""
  text = log.read_text()
  if phase == "start":
    return "workdir " in text
  if "start " not in text or phase == "compile":
    return "start " in text
  step = last_step(workdir)
  if phase == "save":
    return any(
      "tmp" in path.name for path in (workdir / "checkpoints").iterdir()
    )
  if phase == "evaluation":
    return "compiled" in text and step % 7 == 0
  return "compiled" in text and step >= first


def last_step(workdir: pathlib.Path) -> int:
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return 0
  records = metrics.read(workdir)
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
