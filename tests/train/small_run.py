"""A run of seconds, as a command in a process of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sys

from xlstm_jax import sharding
from xlstm_jax.checkpoints import Checkpoints
from xlstm_jax.models.language_model import Definition
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.train import state as states

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
  cfg.batch_size = 8
  cfg.steps = 60
  cfg.optim.warmup_steps = 5
  cfg.log_every = 1
  cfg.save_every = 8
  cfg.eval_every = 16
  cfg.eval_tokens = 256
  return cfg
"""
# Seconds that a process may take on a machine that is busy with others.
PATIENCE = 900
# So that no grace ends it there.
GRACE = "limits.grace_seconds=1e6"


def prepared(folder, name, *tokenizer):
  corpus = folder / "corpus"
  corpus.mkdir(exist_ok=True)
  for n in range(12):
    words = [f"word{(n * k * k) % 13}" for k in range(150)]
    (corpus / f"{n}.txt").write_text(" ".join(words))
  arguments = [f"--input={corpus}", f"--output={folder / name}", *tokenizer]
  assert prepare.main([*arguments, "--heldout-fraction=0.3"]) == 0
  return str(folder / name)


def command(arguments, workdir, *more, program=("-m", "xlstm_jax.train")):
  return [
    *(sys.executable, *program, f"--workdir={workdir}"),
    *arguments,
    *more,
  ]


def environment():
  """One device, as the conftest's eight are this process's alone."""
  return os.environ | {"XLA_FLAGS": ""}


def run(arguments, workdir, *more, limit_kib=None):
  """Runs the command to its end, with a limit on the size of files."""
  words = command(arguments, workdir, *more)
  variables = environment()
  if limit_kib is not None:
    words = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "-", *words]
    # Programs would be written too, and warn.
    variables["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  return subprocess.run(
    words,
    capture_output=True,
    text=True,
    env=variables,
    timeout=PATIENCE,
    check=False,
  )


def patched(code, arguments, workdir, *more):
  """The command, in a process that runs `code` before."""
  program = f"""{code}
import runpy
runpy.run_module("xlstm_jax.train", run_name="__main__", alter_sys=True)
"""
  words = command(arguments, workdir, *more)
  return [words[0], "-c", program, *words[3:]]


# A process that sends itself the signal `number` with the record of `step`.
SIGNALS_ITSELF = """
import os
from xlstm_jax import metrics

write = metrics.Log.write
def signalling(self, step, record):
  write(self, step, record)
  if step == {step} and "loss" in record:
    {before}
    os.kill(os.getpid(), {number})
metrics.Log.write = signalling
"""


def run_until(arguments, workdir, step, number):
  """Runs the command until it sends itself a signal after `step`."""
  code = SIGNALS_ITSELF.format(step=step, before="pass", number=int(number))
  done = subprocess.run(
    patched(code, arguments, workdir, f"--config.{GRACE}"),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=environment(),
    timeout=PATIENCE,
    check=False,
  )
  return done.returncode, done.stdout


def last_step(workdir):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return 0
  lines = path.read_text().splitlines(keepends=True)
  whole = [line for line in lines if line.endswith("\n")]
  return json.loads(whole[-1])["step"] if whole else 0


def final_items(workdir, cfg):
  mesh = sharding.make_mesh(cfg.mesh)
  like = states.to_items(
    states.abstract(Definition(cfg.model, cfg.compute), mesh)
  )
  return Checkpoints(workdir / "checkpoints").restore(cfg.steps, like)


def free_port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]
