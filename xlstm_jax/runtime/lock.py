"""One run writes a workdir at a time."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath

from xlstm_jax import files
from xlstm_jax.runtime.output import say

FILE = "lock"


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

  def busy(holder: str) -> str:
    return (
      f"Another run writes the workdir {workdir} ({holder}): wait for it, stop "
      "it, or give another --workdir."
    )

  with contextlib.ExitStack() as stack:
    with files.writing(f"The workdir {workdir}"):
      locked = stack.enter_context(files.locked(workdir / FILE, busy=busy))
    if not locked:
      say(
        f"lock      the file system of {workdir} has no locks: make sure that "
        "no second run writes there"
      )
    yield
