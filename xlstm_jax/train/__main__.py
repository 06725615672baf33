"""`python -m xlstm_jax.train`: trains, or resumes, the run of a workdir."""

import os
import sys
import time
from types import TracebackType
from typing import NoReturn

from xlstm_jax.runtime import interrupt

# What the other processes may take to end before the first one does.
_LAST_SECONDS = 2.0


def end(status: int) -> NoReturn:
  """Ends the process, whatever its threads wait for.

  Python would join those that read data, which may never come, and JAX wait for
  the other processes.
  """
  from jax._src import distributed

  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  # Without the first process JAX ends the others with SIGABRT, before they say
  # what they have to. Its public names would ask the devices.
  joined = distributed.global_state
  if joined.client is not None and joined.process_id == 0:
    time.sleep(_LAST_SECONDS)
  os._exit(status)


def end_with_traceback(
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> NoReturn:
  """Ends the process on a defect of ours."""
  sys.__excepthook__(kind, error, trace)
  end(1)


if __name__ == "__main__":
  with interrupt.noted() as stopped:
    # These take seconds, in which a signal is noted too.
    from xlstm_jax.errors import exit_code
    from xlstm_jax.train import command, memory

    sys.excepthook = end_with_traceback
    status = exit_code(
      lambda: command.main(sys.argv[1:], stopped), less_memory=memory.ADVICE
    )
  end(status)
