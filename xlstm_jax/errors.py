"""The one exception for what a user can cause, and how commands report it."""

import io
import os
import reprlib
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from xlstm_jax import machine


class UserError(ValueError):
  """A mistake in what the user gave: its message is a sentence for them.

  The message says what was wrong, with the value, and what to do.
  """


_SHORT = reprlib.Repr(
  maxlevel=3, maxtuple=12, maxlist=12, maxstring=100, maxother=100
)


def shown(value: object) -> str:
  """A value as a sentence can hold it: its representation, shortened."""
  return _SHORT.repr(value)


def exit_code(
  main: Callable[[], int | None],
  *,
  less_memory: str = "Give it less at a time, or run it on more devices.",
) -> int:
  """Runs a command's `main` and returns its exit status.

  A `UserError` becomes one line on stderr and status 2, and so do a platform
  that is not there and memory that runs out; Ctrl-C and a reader of stdout that
  went away, as `head` does, end it as their signals would. Every other
  exception is a defect of ours and keeps its traceback. What stdout cannot show
  is escaped.

  Args:
    main: the command; may return its status.
    less_memory: a sentence on how it takes less of a device's memory.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    status = main() or 0
    sys.stdout.flush()
    return status
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (RuntimeError, AssertionError, MemoryError) as error:
    problem = machine.problem(error, less_memory=less_memory)
    if problem is None:
      raise
    print(f"error: {problem}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 128 + signal.SIGINT
  except BrokenPipeError:
    if not _is_unread(sys.stdout):
      raise
    return 128 + signal.SIGPIPE


def _is_unread(stream: TextIO) -> bool:
  """Whether nobody reads a stream; then what is left for it goes nowhere."""
  try:
    descriptor = stream.fileno()
  except OSError:
    # It is no file of the system.
    return False
  poll = select.poll()
  poll.register(descriptor, 0)
  unread = any(event & select.POLLERR for _, event in poll.poll(0))
  if unread:
    # Else the interpreter would write the rest at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
  return unread
