"""Typed reading of another implementation's configuration."""

from collections.abc import Mapping
from typing import Annotated, Any, cast

from msgspec import Meta

from xlstm_jax import files
from xlstm_jax.errors import UserError

# A soft cap of this size or more means none. It stands in for null where null
# is not allowed, as in Hugging Face's configuration, whose model computes
# cap * tanh(x / cap) with any cap. Division by a power of two is exact, and in
# float32 tanh(y) is y up to |y| = 2**-12, so x up to |x| = 2**18 comes back bit
# by bit.
NO_CAP = 2.0**30
# Far beyond any model, and their products far from any overflow.
_MOST, _FINITE = 2**31 - 1, 2.0**1023
Size = cast(type[int], Annotated[int, Meta(ge=1, le=_MOST)])
Window = cast(type[int], Annotated[int, Meta(ge=0, le=_MOST)])
Number = cast(type[float], Annotated[float, Meta(ge=0, le=_FINITE)])
Rate = cast(type[float], Annotated[float, Meta(ge=0, lt=1)])
# Of a size relative to another one.
Factor = cast(type[float], Annotated[float, Meta(gt=0, le=1000)])
_Cap = cast(type[float], Annotated[float, Meta(gt=0, le=_FINITE)])


class Options:
  """A JSON object whose values are read with their type and default.

  All methods raise a `UserError` where a value is of another type or out of its
  range, and where it is missing and has no default; null is missing.

  Args:
    values: the object.
    file: that it was read from.
    place: where it stands there.
  """

  def __init__(
    self,
    values: Mapping[str, Any],
    *,
    file: files.StrPath = "config.json",
    place: str = "$",
  ):
    self.values = values
    self.file = file
    self.place = place

  def has(self, name: str) -> bool:
    """Whether the option is given and not null."""
    return self.values.get(name) is not None

  def get[T](self, name: str, kind: type[T], default: T | None = None) -> T:
    """A value of a type, which msgspec checks."""
    value = self.values.get(name)
    if value is None:
      value = default
    if value is None:
      raise UserError(f"{self.file}: {self.place} lacks {name}.")
    place = f"{self.place}.{name}"
    return files.convert(value, kind, self.file, place=place)

  def cap(self, name: str, default: float) -> float | None:
    """A soft cap; null, or a number of `NO_CAP` or more, means none."""
    if name in self.values and self.values[name] is None:
      return None
    cap = self.get(name, _Cap, default)
    return cap if cap < NO_CAP else None

  def choice(self, name: str, meanings: Mapping[str, Any], default: str) -> Any:
    """What one of the strings in `meanings` means."""
    value = self.get(name, str, default)
    if value not in meanings:
      known = ", ".join(map(repr, meanings))
      raise self._fault(name, f"this project has {known}")
    return meanings[value]

  def sub(self, name: str) -> "Options":
    """A nested object; an empty one where it is not given."""
    values = self.get(name, dict[str, Any], {})
    return Options(values, file=self.file, place=f"{self.place}.{name}")

  def refuse(self, name: str, reason: str) -> None:
    """Refuses a value that is not null, false or zero."""
    if self.values.get(name):
      raise self._fault(name, reason)

  def _fault(self, name: str, reason: str) -> UserError:
    place = f"{self.place}.{name}"
    return files.fault(self.file, place, self.values[name], reason)
