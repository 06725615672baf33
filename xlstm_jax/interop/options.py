"""Typed reading of another implementation's configuration."""

from collections.abc import Mapping
from typing import Any

from xlstm_jax.errors import UserError, shown


class Options:
  """A JSON object whose values are read with their type and default.

  A method without a default raises `UserError` where the option is missing;
  all do where it has another type.

  Args:
    values: the object.
    section: where it stands, for messages: "slstm_block.slstm."
  """

  def __init__(self, values: Mapping[str, Any], section: str = ""):
    self.values = values
    self.section = section

  def has(self, name: str) -> bool:
    """Whether the option is given, and not null."""
    return self.values.get(name) is not None

  def flag(self, name: str, default: bool | None = None) -> bool:
    """True or false."""
    return self._get(name, default, (bool,), "true or false")

  def integer(self, name: str, default: int | None = None) -> int:
    """A whole number."""
    return self._get(name, default, (int,), "a whole number")

  def number(self, name: str, default: float | None = None) -> float:
    """Any number."""
    value = self._get(name, default, (int, float), "a number")
    # Beyond this an integer has no float.
    if not abs(value) < 2**1023:
      raise UserError(
        f"{self.section}{name} is {shown(value)}; it must be a finite number."
      )
    return float(value)

  def text(self, name: str, default: str | None = None) -> str:
    """A string."""
    return self._get(name, default, (str,), "a string")

  def cap(self, name: str, default: float) -> float | None:
    """A soft cap: null, or a number that is not positive, means none."""
    if name in self.values and self.values[name] is None:
      return None
    cap = self.number(name, default)
    return cap if cap > 0 else None

  def choice(self, name: str, meanings: Mapping[str, Any], default: str) -> Any:
    """What one of the strings in `meanings` means."""
    value = self.text(name, default)
    if value not in meanings:
      raise UserError(
        f"{self.section}{name} is {shown(value)}; this project has "
        f"{', '.join(map(repr, meanings))}."
      )
    return meanings[value]

  def sub(self, name: str) -> "Options":
    """A nested object; an empty one where it is not given."""
    return Options(
      self._get(name, {}, (Mapping,), "an object"), f"{self.section}{name}."
    )

  def refuse(self, name: str, reason: str) -> None:
    """Refuses a value that is not null, false or zero."""
    if self.values.get(name):
      raise UserError(
        f"{self.section}{name} is {shown(self.values[name])}: {reason}."
      )

  def _get(self, name: str, default: Any, kinds: tuple, what: str) -> Any:
    value = self.values.get(name)
    if value is None:
      value = default
    if value is None:
      raise UserError(f"The configuration lacks {self.section}{name}, {what}.")
    is_flag = isinstance(value, bool) and bool not in kinds
    if is_flag or not isinstance(value, kinds):
      raise UserError(
        f"{self.section}{name} is {shown(value)}; it must be {what}."
      )
    return value
