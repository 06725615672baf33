"""Where "auto" takes a kernel for TPUs: by what the compiler says it costs.

No TPU was at hand. A cell's table has what libtpu made of the kernels and of
the native form; `scripts/bench_tpu_aot.py --table` writes it.
"""

import functools
import json
import pathlib
from typing import NamedTuple


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


def why_not(table: pathlib.Path, device_kind: str, heads: str) -> str | None:
  """Why "auto" passes over the kernels of a table for such heads, or None.

  Args:
    table: Fields of `Compiled` by the kind of the device and the heads.
    device_kind: Of the device.
    heads: The sizes of a head, for example "256 x 512".
  """
  found = _read(table).get(device_kind, {}).get(heads)
  if found is None:
    return (
      f"its cost for heads of {heads} on a {device_kind} is not in the table "
      "of compiled programs"
    )
  return why_native(Compiled(**found))


@functools.cache
def _read(table: pathlib.Path) -> dict[str, dict[str, dict[str, int]]]:
  return json.loads(table.read_text())
