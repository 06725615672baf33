"""How a run ends: the exit statuses of the command."""

import enum


class Status(enum.IntEnum):
  """What a scheduler can tell apart; it may restart on all but 0, 2 and 3.

  Attributes:
    DONE: all steps are done.
    USER_ERROR: the configuration, the data, the workdir or the machine is not
      what it must be.
    DIVERGED: rolled back too often.
    HUNG: no step finished in time, or a process was missing.
    PREEMPTED: a signal ended it (EX_TEMPFAIL: try again).
  """

  DONE = 0
  USER_ERROR = 2
  DIVERGED = 3
  HUNG = 4
  PREEMPTED = 75
