"""Where "auto" takes the TPU kernels: by what the compiler says they cost.

No TPU was at hand. The table beside this file has what libtpu made of the
kernels and of the native form, which `scripts/bench_tpu_aot.py --table` writes.
"""

import functools
import json
import pathlib
from typing import NamedTuple

TABLE = pathlib.Path(__file__).with_name("compiled.json")


class Compiled(NamedTuple):
  """A forward and backward pass in both forms, as compiled.

  Attributes:
    bundles: Of the kernels' steps, as often as they run.
    cycles: XLA's estimate of what surrounds the kernels.
    bytes: That the program with the kernels accesses.
    native_cycles: XLA's estimate of the native form.
    native_bytes: That the native form accesses.
  """

  bundles: int
  cycles: int
  bytes: int
  native_cycles: int
  native_bytes: int


def why_native(found: Compiled) -> str | None:
  """Why the native form is taken, or None where the kernel is.

  Bundles know nothing of stalls, and the two scales are not the same: only
  where the kernel has less than a third is it taken for the faster. Where it
  accesses at most half the bytes twice the cycles are allowed.
  """
  kernel = found.bundles + found.cycles
  third = kernel < found.native_cycles / 3
  half = found.bytes <= found.native_bytes / 2
  if third or (half and kernel <= 2 * found.native_cycles):
    return None
  return (
    f"compiled, it has {kernel / 1e6:.3g} million bundles and cycles and "
    f"{found.bytes / 1e9:.3g} GB where the native form has "
    f"{found.native_cycles / 1e6:.3g} million cycles and "
    f"{found.native_bytes / 1e9:.3g} GB"
  )


def why_not_auto(device_kind: str, key_dim: int, value_dim: int) -> str | None:
  """Why "auto" passes over the kernels for such heads, or None."""
  found = table().get(device_kind, {}).get(f"{key_dim} x {value_dim}")
  if found is None:
    return (
      f"its cost for heads of {key_dim} keys and {value_dim} values on a "
      f"{device_kind} is not in the table of compiled programs"
    )
  return why_native(Compiled(**found))


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
  """Fields of `Compiled` by the kind of the device and the heads."""
  return json.loads(TABLE.read_text())
