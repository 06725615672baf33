"""The processes of a run: how they find each other at its start."""

import argparse
import contextlib
import dataclasses
import re
import socket
import time

import jax

from xlstm_jax.errors import UserError

# As a coordinator: the launcher's environment knows all three.
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Processes:
  """Which of how many processes this one is.

  Attributes:
    coordinator: HOST:PORT that process 0 listens on, or `AUTO`.
    count: how many there are; None where the coordinator is `AUTO`.
    index: of this one, from 0; None where the coordinator is `AUTO`.
    join_seconds: how long they wait for each other at the start.
    heartbeat_seconds: how long one may be silent before all others end.
  """

  coordinator: str
  count: int | None = None
  index: int | None = None
  join_seconds: int = 300
  heartbeat_seconds: int = 100


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of a run of several processes."""
  group = parser.add_argument_group("several processes, one on every host")
  group.add_argument(
    "--coordinator",
    metavar="HOST:PORT|auto",
    help="where process 0 listens; auto: Slurm, Open MPI, Kubernetes or a "
    "Cloud TPU tells it, and the next two",
  )
  group.add_argument("--processes", type=int, metavar="N", help="how many")
  group.add_argument(
    "--process", type=int, metavar="I", help="which this is, from 0"
  )
  group.add_argument(
    "--join-seconds",
    type=int,
    metavar="S",
    default=300,
    help="how long they wait for each other (default: %(default)s)",
  )
  group.add_argument(
    "--heartbeat-seconds",
    type=int,
    metavar="S",
    default=100,
    help="how long one may be silent before all others end (default: "
    "%(default)s)",
  )


def from_flags(options: argparse.Namespace) -> Processes | None:
  """What the flags say; None for one process.

  Raises:
    UserError: they are incomplete or contradict each other.
  """
  coordinator, count = options.coordinator, options.processes
  index = options.process
  waits = (options.join_seconds, options.heartbeat_seconds)
  if (coordinator, count, index) == (None, None, None):
    return None
  if coordinator == AUTO and (count, index) == (None, None):
    return Processes(AUTO, None, None, *waits)
  if coordinator in (None, AUTO) or None in (count, index):
    raise UserError(
      "Several processes need --coordinator=HOST:PORT, --processes and "
      "--process together, or --coordinator=auto alone."
    )
  if not re.fullmatch(r".+:\d+", coordinator):
    raise UserError(
      f"--coordinator is {coordinator!r}; it must be HOST:PORT or auto."
    )
  if not 0 <= index < count:
    raise UserError(
      f"--process is {index}; it must be from 0 to {count - 1}, for "
      f"--processes={count}."
    )
  return Processes(coordinator, count, index, *waits)


def join(processes: Processes | None) -> None:
  """Returns when all processes are there.

  Raises:
    UserError: some are not in time, which it names, or `AUTO` finds nothing.
  """
  if processes is None:
    return
  # Its signal handler would replace ours.
  jax.config.update("jax_enable_preemption_service", False)
  if processes.coordinator == AUTO:
    try:
      jax.distributed.initialize(
        initialization_timeout=processes.join_seconds,
        heartbeat_timeout_seconds=processes.heartbeat_seconds,
      )
    except ValueError as error:
      raise UserError(
        f"--coordinator=auto found no launcher ({error}): give --coordinator, "
        "--processes and --process."
      ) from error
    return
  # JAX would end the process with SIGABRT, without saying who is missing.
  if processes.index == 0:
    _call_the_roll(processes)
  else:
    _answer_the_roll(processes)
  jax.distributed.initialize(
    processes.coordinator,
    processes.count,
    processes.index,
    initialization_timeout=processes.join_seconds,
    heartbeat_timeout_seconds=processes.heartbeat_seconds,
  )


def _call_the_roll(processes: Processes) -> None:
  """Waits on the coordinator's port until every other process has called."""
  deadline = time.monotonic() + processes.join_seconds
  missing = set(range(1, processes.count or 1))
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listening(processes.coordinator))
    present = []
    while missing and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      with contextlib.suppress(TimeoutError):
        caller = stack.enter_context(server.accept()[0])
        # What calls here by mistake holds nobody up for long.
        caller.settimeout(1)
        with contextlib.suppress(OSError, ValueError):
          missing.discard(int(caller.makefile().readline(32)))
          present.append(caller)
    absent = ", ".join(map(str, sorted(missing)))
    for caller in present:
      with contextlib.suppress(OSError):
        caller.sendall(f"{absent}\n".encode())
  if missing:
    raise _absent(absent, processes)


def _listening(coordinator: str) -> socket.socket:
  port = int(coordinator.rsplit(":", 1)[1])
  dual = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ("", port),
      family=socket.AF_INET6 if dual else socket.AF_INET,
      dualstack_ipv6=dual,
    )
  except (OSError, OverflowError) as error:
    raise UserError(
      f"Process 0 cannot listen on port {port} ({error}); give a free one in "
      "--coordinator."
    ) from error


def _answer_the_roll(processes: Processes) -> None:
  """Calls process 0 until it says that everybody is there."""
  deadline = time.monotonic() + processes.join_seconds
  host, port = processes.coordinator.rsplit(":", 1)
  # Process 0 tells who is missing at its own deadline, perhaps after ours.
  patience = 2 * processes.join_seconds
  while True:
    with contextlib.suppress(OSError):
      with socket.create_connection((host.strip("[]"), port), 5) as caller:
        caller.settimeout(patience)
        caller.sendall(f"{processes.index}\n".encode())
        answer = caller.makefile().readline()
      if answer == "\n":
        return
      if answer:
        raise _absent(answer.strip(), processes)
    if time.monotonic() > deadline:
      raise UserError(
        f"Process 0 did not answer at {processes.coordinator} within "
        f"{processes.join_seconds} s; look at its log, and start all again."
      )
    time.sleep(0.2)


def _absent(numbers: str, processes: Processes) -> UserError:
  return UserError(
    f"Of {processes.count} processes these did not join within "
    f"{processes.join_seconds} s: {numbers}; look at their logs, and start "
    "all again."
  )


def leave() -> None:
  """Parts from the others, when all have come to the end."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()
