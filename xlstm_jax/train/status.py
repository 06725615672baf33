"""How a run ends: the exit statuses of the command."""

import enum


class Status(enum.IntEnum):
  """The statuses that a scheduler can distinguish.

  Attributes:
    DONE: All steps are done.
    USER_ERROR: The configuration, the data, the workdir or the machine is
      wrong.
    DIVERGED: The run rolled back too often.
    HUNG: An activity exceeded its limit, or a process was missing.
    PREEMPTED: A signal ended the run (EX_TEMPFAIL: try again).
  """

  DONE = 0
  USER_ERROR = 2
  DIVERGED = 3
  HUNG = 4
  PREEMPTED = 75
