"""The processes of a run: how they find each other at its start."""

import argparse
import contextlib
import dataclasses
import os
import re
import socket
import time

import jax
from jax._src.clusters import ClusterEnv

from xlstm_jax.config import LimitsConfig
from xlstm_jax.errors import UserError
from xlstm_jax.runtime.peers import Missing

# As a coordinator: the launcher's environment knows all three.
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Processes:
  """Which of how many processes this one is.

  Attributes:
    coordinator: HOST:PORT that process 0 listens on, or `AUTO`.
    count: how many there are; None where the coordinator is `AUTO`.
    index: of this one, from 0; None where the coordinator is `AUTO`.
  """

  coordinator: str
  count: int | None = None
  index: int | None = None


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


def from_flags(options: argparse.Namespace) -> Processes | None:
  """What the flags say; None for one process.

  Raises:
    UserError: they are incomplete or contradict each other.
  """
  coordinator, count = options.coordinator, options.processes
  index = options.process
  if (coordinator, count, index) == (None, None, None):
    return None
  if coordinator == AUTO and (count, index) == (None, None):
    return Processes(AUTO)
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
  return Processes(coordinator, count, index)


def join(processes: Processes | None, limits: LimitsConfig) -> None:
  """Returns when all processes are there.

  Raises:
    UserError: `AUTO` finds no launcher, or process 0 cannot listen.
    Missing: some are not there in time; it names them.
  """
  if processes is None:
    return
  for key in ("join_seconds", "heartbeat_seconds"):
    # Whole configurations are checked against devices, and these come later.
    if (seconds := getattr(limits, key)) < 1:
      raise UserError(
        f"config.limits.{key} is {seconds}; it must be at least 1."
      )
  deadline = time.monotonic() + limits.join_seconds
  if processes.coordinator == AUTO:
    processes = _detected(limits)
  # JAX would end the process with SIGABRT, without saying who is missing.
  if processes.index == 0:
    _call_the_roll(processes, limits, deadline)
  else:
    _answer_the_roll(processes, limits, deadline)
  # Its signal handler would replace ours.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    processes.coordinator,
    processes.count,
    processes.index,
    initialization_timeout=limits.join_seconds,
    heartbeat_timeout_seconds=limits.heartbeat_seconds,
  )


def _detected(limits: LimitsConfig) -> Processes:
  """What the environment of a launcher says."""
  try:
    # What `initialize` would find out; it has no public name. The devices are
    # left to `initialize`.
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
      coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
      num_processes=None,
      process_id=None,
      local_device_ids=[],
      cluster_detection_method=None,
      initialization_timeout=limits.join_seconds,
    )
  except ValueError as error:
    raise UserError(
      f"--coordinator=auto does not understand its launcher ({error}): give "
      "--coordinator, --processes and --process."
    ) from error
  except (RuntimeError, OSError) as error:
    # A host that has no address yet, or a service that does not answer.
    raise Missing(
      f"--coordinator=auto did not find process 0 ({error}); start all again, "
      "or give --coordinator, --processes and --process."
    ) from error
  if address is None or count is None or index is None:
    raise UserError(
      "--coordinator=auto found no launcher: give --coordinator, --processes "
      "and --process."
    )
  return Processes(address, count, index)


def _call_the_roll(
  processes: Processes, limits: LimitsConfig, deadline: float
) -> None:
  """Waits on the coordinator's port until every other process has called."""
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
    raise _absent(absent, processes, limits)


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


def _answer_the_roll(
  processes: Processes, limits: LimitsConfig, deadline: float
) -> None:
  """Calls process 0 until it says that everybody is there."""
  host, port = processes.coordinator.rsplit(":", 1)
  # Process 0 tells who is missing at its own deadline, perhaps after ours.
  patience = 2 * limits.join_seconds
  while True:
    with contextlib.suppress(OSError):
      with socket.create_connection((host.strip("[]"), port), 5) as caller:
        caller.settimeout(patience)
        caller.sendall(f"{processes.index}\n".encode())
        answer = caller.makefile().readline()
      if answer == "\n":
        return
      if answer:
        raise _absent(answer.strip(), processes, limits)
    if time.monotonic() > deadline:
      raise Missing(
        f"Process 0 did not answer at {processes.coordinator} within "
        f"{limits.join_seconds} s; look at its log, and start all again."
      )
    time.sleep(0.2)


def _absent(
  numbers: str, processes: Processes, limits: LimitsConfig
) -> Missing:
  return Missing(
    f"Of {processes.count} processes these did not join within "
    f"{limits.join_seconds} s: {numbers}; look at their logs, and start "
    "all again."
  )


def leave() -> None:
  """Parts from the others, when all have come to the end."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()
