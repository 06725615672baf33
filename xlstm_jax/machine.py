"""The sentences for errors that the machine causes.

A missing platform and exhausted memory are no bugs of this program, and a
restart does not fix them.
"""

import os
import re
import sys
import traceback

from xlstm_jax import jax_internals

# How JAX's message begins if a platform is named that JAX does not have.
_NO_BACKEND = re.compile(r"(Unable to initialize|Unknown) backend")
# Statuses of missing other processes, which are no fault of this machine.
_OF_OTHERS = re.compile(
  r"\b(DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED|CANCELLED)\b"
)
_MAX_REASON = 300


def problem(error: BaseException, *, less_memory: str) -> str | None:
  """The sentence for an error that the machine caused; None for any other.

  This does not import JAX: where JAX was not imported, it raised no error.

  Args:
    error: the error that ended the command.
    less_memory: a sentence on how to make the command take less device memory.
  """
  if isinstance(error, MemoryError):
    return (
      f"The machine has no memory left for this process{_in_brackets(error)}: "
      "end what else runs on it, or give the process less to do at a time."
    )
  if isinstance(error, RuntimeError) and is_out_of_memory(error):
    return f"A device ran out of memory ({_reason(error)}). {less_memory}"
  if "jax" in sys.modules and _failed_to_start(error):
    return _no_device(error)
  return None


def is_out_of_memory(error: RuntimeError) -> bool:
  """Whether a device lacks the memory that a program needs.

  JAX says so with one of XLA's statuses, at compilation or in a step. Memories
  other than the main one, such as VMEM, are the concern of a kernel.
  """
  message = str(error)
  return "RESOURCE_EXHAUSTED" in message and not re.search(
    r"memory space (?!hbm\b)", message
  )


def _failed_to_start(error: BaseException) -> bool:
  """Whether JAX raised the error because it could not start a backend."""
  if _OF_OTHERS.search(str(error)):
    return False
  if isinstance(error, RuntimeError) and _NO_BACKEND.match(str(error)):
    return True
  # A plugin that cannot be loaded has its own message. If the platform is cuda
  # and there is no such device, JAX has no message and fails an assertion.
  return isinstance(error, RuntimeError | AssertionError) and any(
    frame.f_globals.get("__name__") == jax_internals.STARTS_BACKENDS
    for frame, _ in traceback.walk_tb(error.__traceback__)
  )


def _no_device(error: BaseException) -> str:
  reason = _reason(error) or "there is no NVIDIA GPU that it can see"
  if isinstance(error, RuntimeError) and not _NO_BACKEND.match(reason):
    return (
      f"A plugin of JAX does not load on this machine: {reason}. Fix it or "
      "uninstall it."
    )
  for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
    if value := os.environ.get(name):
      found = _platforms()
      has = f" (it has {', '.join(found)})" if found else ""
      return (
        f"{name}={value}, but JAX finds no such device here{has}: {reason}. "
        f"Name another platform, or run without {name}."
      )
  return (
    f"JAX cannot start the devices of this machine: {reason}. "
    "JAX_PLATFORMS=cpu runs without them."
  )


def _platforms() -> list[str]:
  """The platforms that JAX finds by itself; empty if that is unknown."""
  import jax

  # JAX would wait for the other processes.
  if jax.distributed.is_initialized():
    return []
  try:
    jax.config.update("jax_platforms", None)
    jax.config.update("jax_platform_name", "")
    return sorted({device.platform for device in jax.devices()})
  except (RuntimeError, AssertionError):
    return []


def _in_brackets(error: BaseException) -> str:
  reason = _reason(error)
  return f" ({reason})" if reason else ""


def _reason(error: BaseException) -> str:
  """The first line of a message, shortened to fit into a sentence."""
  line = next(iter(str(error).splitlines()), "").strip()
  # JAX's advice in brackets is replaced by ours.
  line = re.sub(r" \((set|you may need to) .*\)$", "", line)
  if len(line) > _MAX_REASON:
    line = f"{line[:_MAX_REASON]} ..."
  return line.rstrip(".")
