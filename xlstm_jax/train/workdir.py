"""What a run writes into its workdir besides checkpoints and records."""

import jax
from etils import epath

from xlstm_jax import config, files
from xlstm_jax.data import tokenizer
from xlstm_jax.train.run import Run


def create(workdir: epath.Path) -> None:
  """Makes the folder, or raises a UserError."""
  with files.writing(f"The workdir {workdir}"):
    workdir.mkdir(parents=True, exist_ok=True)


def describe(run: Run) -> None:
  """Writes what the checkpoints need to be used without experiment and data."""
  if jax.process_index() == 0:
    with files.writing(f"The workdir {run.workdir}"):
      config.save(run.workdir, run.cfg)
      tokenizer.load(run.cfg.data.paths[0]).save(run.workdir)
