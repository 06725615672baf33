"""The folder that a preparation writes: one at a time, its failures told."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from xlstm_jax import files
from xlstm_jax.errors import UserError
from xlstm_jax.prepare.report import say

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
  busy = f"Another process is preparing {output}."
  with contextlib.ExitStack() as stack:
    with files.writing(output):
      output.mkdir(parents=True, exist_ok=True)
      held = stack.enter_context(files.locked(output, busy=lambda _: busy))
    if not held:
      say(
        f"The file system of {output} has no locks: make sure that no second "
        "preparation writes there."
      )
    yield


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
