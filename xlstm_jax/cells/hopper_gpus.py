"""Which devices are the Hopper GPUs that kernels of several cells need."""

import re
from typing import Any

import jax

from xlstm_jax.cells.backends import this_device

# Their names: a mesh of described devices tells no capability.
_HOPPER = re.compile(r"NVIDIA G?H\d")


def device_refusal(device: Any = None) -> str | None:
  """Why Hopper kernels do not run on a device, or None; by default this one."""
  device = device or this_device()
  if isinstance(device, jax.Device):
    hopper = getattr(device, "compute_capability", None) == "9.0"
  else:
    hopper = _HOPPER.match(device.device_kind) is not None
  if device.platform != "gpu" or not hopper:
    return (
      "it needs a Hopper GPU (compute capability 9.0), and the device is "
      f"{device.device_kind}"
    )
  return None
