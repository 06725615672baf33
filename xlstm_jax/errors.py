"""The one exception for what a user can cause, and how commands report it."""

import reprlib
import sys
from collections.abc import Callable


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


def exit_code(main: Callable[[], int | None]) -> int:
  """Runs a command's `main` and returns its exit status.

  A `UserError` becomes one line on stderr and status 2; every other exception
  is a defect of ours and keeps its traceback.
  """
  try:
    return main() or 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
