"""What a run writes into its workdir besides checkpoints and records."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath

from xlstm_jax import config
from xlstm_jax.data import tokenizer
from xlstm_jax.errors import UserError
from xlstm_jax.train.run import Run


def create(workdir: epath.Path) -> None:
  """Creates the folder; a UserError if that fails."""
  with surface_write_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)


def describe(run: Run) -> None:
  """Writes what the checkpoints need to be used without experiment and data."""
  if jax.process_index() == 0:
    with surface_write_errors(run.workdir):
      config.save(run.workdir, run.cfg)
      tokenizer.load(run.cfg.data.paths[0]).save(run.workdir)


@contextlib.contextmanager
def surface_write_errors(workdir: epath.Path) -> Iterator[None]:
  """In this context, errors of the operating system become a UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"The workdir {workdir} cannot be written: {error.strerror}."
    ) from error
