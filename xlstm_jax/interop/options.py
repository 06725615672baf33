"""Typed reading of another implementation's configuration."""

from collections.abc import Mapping
from typing import Any

from xlstm_jax.errors import UserError, shown

# A soft cap of this size or more means none. It stands in for null where null
# is not allowed, as in Hugging Face's configuration, whose model computes
# cap * tanh(x / cap) with any cap. Division by a power of two is exact, and in
# float32 tanh(y) is y up to |y| = 2**-12, so x up to |x| = 2**18 comes back bit
# by bit.
NO_CAP = 2.0**30
# Far beyond any model, with products that are far from any overflow.
_MAX_INTEGER = 2**31 - 1
_MAX_FACTOR = 1000


class Options:
  """A JSON object whose values are read with their type and default.

  A method without a default raises `UserError` if the option is missing. Every
  method does if the option has another type or is out of range.

  Args:
    values: the object.
    section: its place for messages, such as "slstm_block.slstm."
  """

  def __init__(self, values: Mapping[str, Any], section: str = ""):
    self.values = values
    self.section = section

  def has(self, name: str) -> bool:
    """Whether the option is given and not null."""
    return self.values.get(name) is not None

  def flag(self, name: str, default: bool | None = None) -> bool:
    """True or false."""
    return self._get(name, default, (bool,), "true or false")

  def integer(
    self, name: str, default: int | None = None, *, minimum: int
  ) -> int:
    """A whole number of `minimum` or more."""
    value = self._get(name, default, (int,), "a whole number")
    self._checked(name, value, value >= minimum, f"at least {minimum}")
    return self._checked(
      name, value, value <= _MAX_INTEGER, f"at most {_MAX_INTEGER}"
    )

  def number(self, name: str, default: float | None = None) -> float:
    """A number of 0 or more."""
    value = self._finite(name, default)
    return self._checked(name, value, value >= 0, "at least 0")

  def rate(self, name: str, default: float | None = None) -> float:
    """A probability below 1."""
    value = self._finite(name, default)
    return self._checked(name, value, 0 <= value < 1, "at least 0 and below 1")

  def factor(self, name: str, default: float | None = None) -> float:
    """A size relative to another one."""
    value = self._finite(name, default)
    return self._checked(
      name,
      value,
      0 < value <= _MAX_FACTOR,
      f"above 0 and at most {_MAX_FACTOR}",
    )

  def text(self, name: str, default: str | None = None) -> str:
    """A string."""
    return self._get(name, default, (str,), "a string")

  def cap(self, name: str, default: float) -> float | None:
    """A soft cap; null, or a number of `NO_CAP` or more, means none."""
    if name in self.values and self.values[name] is None:
      return None
    cap = self._finite(name, default)
    self._checked(
      name, cap, cap > 0, f"above 0, or null or {NO_CAP:.0f} for no cap"
    )
    return cap if cap < NO_CAP else None

  def choice(self, name: str, meanings: Mapping[str, Any], default: str) -> Any:
    """The meaning of a string, one of the keys of `meanings`."""
    value = self.text(name, default)
    if value not in meanings:
      raise UserError(
        f"{self.section}{name} is {shown(value)}; this project has "
        f"{', '.join(map(repr, meanings))}."
      )
    return meanings[value]

  def sub(self, name: str) -> "Options":
    """A nested object; empty if it is not given."""
    return Options(
      self._get(name, {}, (Mapping,), "an object"), f"{self.section}{name}."
    )

  def refuse(self, name: str, reason: str) -> None:
    """Refuses a value that is not null, false or zero."""
    if self.values.get(name):
      raise UserError(
        f"{self.section}{name} is {shown(self.values[name])}: {reason}."
      )

  def _finite(self, name: str, default: float | None) -> float:
    value = self._get(name, default, (int, float), "a number")
    # A larger integer has no float.
    return float(
      self._checked(name, value, abs(value) < 2**1023, "a finite number")
    )

  def _checked(self, name: str, value: Any, holds: bool, what: str) -> Any:
    if not holds:
      raise UserError(
        f"{self.section}{name} is {shown(value)}; it must be {what}."
      )
    return value

  def _get(self, name: str, default: Any, kinds: tuple, what: str) -> Any:
    value = self.values.get(name)
    if value is None:
      value = default
    if value is None:
      raise UserError(f"The configuration lacks {self.section}{name}, {what}.")
    is_flag = isinstance(value, bool) and bool not in kinds
    return self._checked(
      name, value, isinstance(value, kinds) and not is_flag, what
    )
