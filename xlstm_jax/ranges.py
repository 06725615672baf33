"""Ranges of the numbers in configurations, stated at their fields."""

import dataclasses
from collections.abc import Iterator
from typing import Any

_KEY = "range"


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers between bounds; None is no bound."""

  at_least: float | None = None
  above: float | None = None
  below: float | None = None
  at_most: float | None = None

  def __contains__(self, number: float) -> bool:
    return (
      (self.at_least is None or number >= self.at_least)
      and (self.above is None or number > self.above)
      and (self.below is None or number < self.below)
      and (self.at_most is None or number <= self.at_most)
    )

  def __str__(self) -> str:
    bounds = {
      "at least": self.at_least,
      "above": self.above,
      "below": self.below,
      "at most": self.at_most,
    }
    return " and ".join(
      f"{word} {bound}" for word, bound in bounds.items() if bound is not None
    )


def ranged(
  default: Any,
  *,
  at_least: float | None = None,
  above: float | None = None,
  below: float | None = None,
  at_most: float | None = None,
) -> Any:
  """A dataclass field with this default, whose numbers lie in a range.

  The checks of a configuration read the range. If a field may be None, None is
  in every range.
  """
  allowed = Range(at_least, above, below, at_most)
  return dataclasses.field(default=default, metadata={_KEY: allowed})


def problems(section: Any, prefix: str) -> Iterator[str]:
  """A sentence for each number of a config outside the range of its field."""
  for field in dataclasses.fields(section):
    value, allowed = getattr(section, field.name), range_of(field)
    if dataclasses.is_dataclass(value):
      yield from problems(value, f"{prefix}{field.name}.")
    elif allowed is not None and value is not None and value not in allowed:
      yield f"{prefix}{field.name} is {value}; it must be {allowed}."


def range_of(field: dataclasses.Field) -> Range | None:
  """The range of a field, if it has one."""
  return field.metadata.get(_KEY)
