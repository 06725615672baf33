"""Which function computes a cell: a registry for each cell, of its forms.

A cell has native forms, which run everywhere, and kernels, each written for one
platform. All forms of a cell take the same arguments.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from xlstm_jax.errors import UserError

AUTO = "auto"

_log = logging.getLogger(__name__)


def _nothing(*args: Any) -> None:
  del args


@dataclasses.dataclass(frozen=True)
class Backend:
  """A form of a cell.

  Attributes:
    name: As configurations name it.
    run: The function.
    why_not: `why_not(device, shapes)`: why it cannot compute such arrays on
      that device, as a clause; None if it can.
    why_not_auto: `why_not_auto(shapes)`: why "auto" passes over it though it
      can compute them, as a clause; None if nothing speaks against it.
    platform: Of a kernel, the platform that it is written for; None makes it a
      native form.
  """

  name: str
  run: Callable[..., Any]
  why_not: Callable[[Any, Any], str | None] = _nothing
  why_not_auto: Callable[[Any], str | None] = _nothing
  platform: str | None = None

  @property
  def is_kernel(self) -> bool:
    """Whether a run compares it with the native form before it trains."""
    return self.platform is not None


class Registry:
  """The forms of a cell, in the order in which "auto" tries them.

  Args:
    cell: The cell's name in messages.
    setting: The field of `Compute` that names a form.
    native: The name of the form that kernels are compared with.
    backends: The forms.
  """

  def __init__(
    self, cell: str, setting: str, native: str, backends: Iterable[Backend]
  ):
    self.cell = cell
    self.setting = setting
    self.native = native
    self.backends = {backend.name: backend for backend in backends}

  def choose(self, name: str, shapes: Any) -> Backend:
    """The form `name`, or for "auto" the first that can and may.

    What "auto" chose is logged once.

    Args:
      name: Of a form, or "auto".
      shapes: What it is to compute, in the terms of the cell's `Shapes`.

    Raises:
      UserError: There is no such form, or it cannot compute this here.
    """
    if name == AUTO:
      backend, reasons = self._first(shapes)
      others = [f", not {name}: {why}" for name, why in reasons.items()]
      _announce(
        f"{self.cell} backend on {this_device().platform}: {backend.name}"
        + "".join(others)
      )
      return backend
    if name not in self.backends:
      raise UserError(
        f"There is no {self.cell} backend {name!r}; choose "
        f"{', '.join(self.backends)}."
      )
    backend = self.backends[name]
    reason = backend.why_not(this_device(), shapes)
    if reason is not None:
      raise UserError(
        f"The {self.cell} backend {name!r} cannot run: {reason}. Choose "
        f"another backend, for example {self.native!r}."
      )
    return backend

  def passed_over(self, shapes: Any) -> dict[str, str]:
    """The kernels for this platform that "auto" passes over, and why."""
    return self._first(shapes)[1]

  def has_kernel_for(self, platform: str) -> bool:
    """Whether a kernel is written for the platform."""
    return platform in {b.platform for b in self.backends.values()}

  def _first(self, shapes: Any) -> tuple[Backend, dict[str, str]]:
    """What "auto" chooses, and why not the kernels that stand before it."""
    here, reasons = this_device(), {}
    for backend in self.backends.values():
      reason = backend.why_not(here, shapes) or backend.why_not_auto(shapes)
      if reason is None:
        return backend, reasons
      if backend.platform == here.platform:
        reasons[backend.name] = reason
    raise UserError(f"No {self.cell} backend can compute {shapes} here.")


def this_device() -> Any:
  """That of the mesh, which need not be there, otherwise the default one."""
  found = jax.devices()[0]
  described = jax.sharding.get_abstract_mesh().abstract_device
  if described is not None and described.device_kind != found.device_kind:
    return described
  return found


@functools.cache
def _announce(message: str) -> None:
  _log.info(message)


class Share(NamedTuple):
  """What one device computes of a part of a step.

  Attributes:
    B: Rows.
    T: Tokens of a row.
    width: Of the model.
    tensor: Devices over which heads are split.
  """

  B: int
  T: int
  width: int
  tensor: int


class Cell(NamedTuple):
  """A cell as a model runs it on one device.

  Attributes:
    registry: Its forms.
    shapes: What it computes.
    prepare: `prepare(name)` compiles the comparison of a form with the native
      one and returns what runs it; see `xlstm_jax.cells.self_test`.
  """

  registry: Registry
  shapes: Any
  prepare: Callable[[str], Callable[[], None]]
