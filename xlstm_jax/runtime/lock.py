"""One run writes a workdir at a time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

import jax
from etils import epath

from xlstm_jax.errors import UserError
from xlstm_jax.runtime.output import say

FILE = "lock"
# Of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
  """Within, no other run can write the workdir; readers do not ask.

  The first process holds the lock. The kernel releases it however that ends.

  Raises:
    UserError: another run holds it, or the workdir cannot be written.
  """
  if jax.process_index() != 0:
    yield
    return
  try:
    descriptor = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise UserError(
      f"The workdir {workdir} cannot be written: {error.strerror}."
    ) from error
  try:
    _lock(descriptor, workdir)
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int, workdir: epath.Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
    raise UserError(
      f"Another run writes the workdir {workdir} ({holder}): wait for it, stop "
      "it, or give another --workdir."
    ) from error
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    say(
      f"lock      the file system of {workdir} has no locks: make sure that no "
      "second run writes there"
    )
    return
  # Only for the sentence above: without room for it the lock holds as well.
  with contextlib.suppress(OSError):
    os.ftruncate(descriptor, 0)
    name = f"process {os.getpid()} on {socket.gethostname()}\n"
    os.pwrite(descriptor, name.encode(), 0)
