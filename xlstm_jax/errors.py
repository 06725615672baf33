"""The exception for mistakes of the user, and how commands report it."""

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
  """A mistake of the user, with a sentence for them as its message.

  The message says what was wrong, with the value, and what to do.
  """


_SHORT = reprlib.Repr(
  maxlevel=3, maxtuple=12, maxlist=12, maxstring=100, maxother=100
)


def shown(value: object) -> str:
  """The representation of a value, shortened to fit into a sentence."""
  return _SHORT.repr(value)


def exit_code(
  main: Callable[[], int | None],
  *,
  less_memory: str = "Give it less at a time, or run it on more devices.",
) -> int:
  """Runs a command's `main` and returns its exit status.

  A `UserError` becomes one line on stderr and status 2. So do a missing
  platform and exhausted memory. Ctrl-C ends the command as its signal would,
  and so does a reader of stdout that goes away, such as `head`. Every other
  exception is a bug of ours and keeps its traceback. What stdout cannot show is
  escaped.

  Args:
    main: the command; may return its status.
    less_memory: a sentence on how to make it take less device memory.
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
  """Whether nobody reads a stream; if so, its remaining output is dropped."""
  try:
    descriptor = stream.fileno()
  except OSError:
    # The stream is no file of the operating system.
    return False
  poll = select.poll()
  poll.register(descriptor, 0)
  unread = any(event & select.POLLERR for _, event in poll.poll(0))
  if unread:
    # Otherwise the interpreter would write the rest when it ends, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
  return unread
