"""Ranges of the numbers in configurations, stated at their fields."""

import dataclasses
from typing import Any

_KEY = "range"


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers between bounds; None is no bound."""

  at_least: float | None = None
  above: float | None = None
  below: float | None = None

  def __contains__(self, number: float) -> bool:
    return (
      (self.at_least is None or number >= self.at_least)
      and (self.above is None or number > self.above)
      and (self.below is None or number < self.below)
    )

  def __str__(self) -> str:
    bounds = {
      "at least": self.at_least,
      "above": self.above,
      "below": self.below,
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
) -> Any:
  """A dataclass field with this default, whose numbers lie in a range.

  The checks of a configuration read the range. If a field may be None, None is
  in every range.
  """
  allowed = Range(at_least, above, below)
  return dataclasses.field(default=default, metadata={_KEY: allowed})


def range_of(field: dataclasses.Field) -> Range | None:
  """The range of a field, if it has one."""
  return field.metadata.get(_KEY)
