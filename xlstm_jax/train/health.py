"""Judges a run by its losses: skipped updates, spikes, slow divergence."""

import dataclasses
import math
from typing import Any

import numpy as np

from xlstm_jax.config import HealthConfig


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that is wrong with a run.

  Attributes:
    reason: What was seen.
    step: The step after which it was seen.
    serious: Whether to go back to the last good checkpoint.
  """

  reason: str
  step: int
  serious: bool


class Health:
  """Judges the steps of a run one after the other.

  Findings depend only on the losses. So every process reaches the same ones,
  and so does a run that continues from a checkpoint, which holds `to_json`.

  Args:
    cfg: the limits.
    saved: a result of `to_json`; None at the beginning.
  """

  def __init__(self, cfg: HealthConfig, saved: dict[str, Any] | None = None):
    self._cfg = cfg
    saved = saved or {"skipped": 0, "losses": [], "fresh": 0, "levels": []}
    # Skipped updates in a row.
    self._skipped: int = saved["skipped"]
    # The last finite losses, at most a window of them, and how many of them
    # are in no level yet.
    self._losses: list[float] = saved["losses"]
    self._fresh: int = saved["fresh"]
    # Mean and variance of every window of losses, the newest last.
    self._levels: list[list[float]] = saved["levels"]

  def to_json(self) -> dict[str, Any]:
    """Everything on which later findings depend."""
    return {
      "skipped": self._skipped,
      "losses": self._losses,
      "fresh": self._fresh,
      "levels": self._levels,
    }

  def see(self, step: int, *, loss: float, grad_norm: float) -> Finding | None:
    """Judges a step; None if nothing is wrong."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      self._skipped += 1
      reason = (
        f"loss {loss:.4g}, gradient norm {grad_norm:.4g}; update skipped, "
        f"{self._skipped} in a row"
      )
      return Finding(reason, step, self._skipped > self._cfg.max_skipped)
    self._skipped = 0
    if (reason := self._spike(loss)) is not None:
      return Finding(reason, step, serious=True)
    self._losses = [*self._losses, loss][-self._cfg.window :]
    self._fresh += 1
    if self._fresh == self._cfg.window:
      self._fresh = 0
      if (reason := self._rise()) is not None:
        return Finding(reason, step, serious=False)
    return None

  def _spike(self, loss: float) -> str | None:
    limit = self._cfg.spike_deviations
    if limit is None or len(self._losses) < self._cfg.window:
      return None
    mean, deviation = float(np.mean(self._losses)), float(np.std(self._losses))
    if loss <= mean + limit * deviation:
      return None
    return (
      f"loss {loss:.4f} is more than {limit:g} deviations of {deviation:.2g} "
      f"above the mean {mean:.4f} of the last {len(self._losses)}"
    )

  def _rise(self) -> str | None:
    """Compares a new window of losses with the one `rise_windows` ago."""
    now = [float(np.mean(self._losses)), float(np.var(self._losses))]
    back = self._cfg.rise_windows
    self._levels = [*self._levels, now][-back - 1 :]
    if len(self._levels) <= back:
      return None
    before = self._levels[0]
    # Three standard errors, so that a loss that has settled gives no warning.
    margin = 3 * math.sqrt((now[1] + before[1]) / self._cfg.window)
    if now[0] <= before[0] + margin:
      return None
    return (
      f"the loss rises: {now[0]:.4f} on average over {self._cfg.window} steps, "
      f"{before[0]:.4f} {back * self._cfg.window} steps ago"
    )
