"""The device memory that a compiled step takes, known before it runs."""

from typing import Any

import jax

from xlstm_jax.errors import UserError
from xlstm_jax.runtime.output import say

ADVICE = (
  "Smaller parts (config.batch_size, config.accumulation), recomputation "
  "(config.compute.remat=block) or more shares (config.mesh.fsdp) take less; "
  "python -m xlstm_jax.plan --config=FILE.py --topology=KIND:SIZE --search "
  "finds the largest batch that fits."
)


def check(compiled: Any) -> None:
  """Prints how much device memory a step takes, if the device has a limit.

  CPUs have none, because the operating system distributes the machine's memory.

  Args:
    compiled: the step, as `jax.stages.Compiled`.

  Raises:
    UserError: the step takes more than a device of this process has.
  """
  limits = [
    limit
    for device in jax.local_devices()
    if (limit := (device.memory_stats() or {}).get("bytes_limit"))
  ]
  if not limits:
    return
  takes, has = taken(compiled), min(limits)
  sentence = (
    f"a step takes {takes / 2**30:.2f} GiB of a device's {has / 2**30:.2f} GiB"
  )
  if takes > has:
    message = f"The step does not fit: {sentence}. {ADVICE}"
    raise UserError(message)
  say(f"memory    {sentence}")


def taken(compiled: Any) -> int:
  """Device memory of a running program, with its arguments and results."""
  used = compiled.memory_analysis()
  stored = used.argument_size_in_bytes + used.output_size_in_bytes
  # Results that take the place of arguments.
  stored -= used.alias_size_in_bytes
  return stored + used.temp_size_in_bytes + used.generated_code_size_in_bytes
