"""The folder that a preparation writes: one at a time, its failures told."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from xlstm_jax.errors import UserError

_WRITE_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
)


@contextlib.contextmanager
def exclusive(output: Path) -> Iterator[None]:
  """Creates the folder and locks it against a second preparation."""
  try:
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
  except OSError as error:
    raise UserError(f"Cannot write to {output}: {error.strerror}.") from error
  try:
    _lock(descriptor, output)
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(f"Another process is preparing {output}.") from error


@contextlib.contextmanager
def explained(output: Path) -> Iterator[None]:
  """Turns a failure to write into a sentence; what is committed stays."""
  try:
    yield
  except OSError as error:
    if error.errno not in _WRITE_ERRORS:
      raise
    raise UserError(
      f"Cannot write to {output}: {error.strerror}. What was committed before "
      "is kept: run the same command to continue once that is mended."
    ) from error
