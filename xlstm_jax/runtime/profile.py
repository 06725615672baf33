"""A profile of a few steps, for TensorBoard or Perfetto."""

from typing import Any

import jax
from etils import epath


class Profile:
  """Traces the steps of a window.

  Args:
    window: first and last step, or ().
    directory: where the trace goes.
  """

  def __init__(self, window: tuple[int, ...], directory: epath.Path):
    self._window = range(window[0], window[1] + 1) if window else range(0)
    self._directory = directory
    self._tracing = False

  def before(self, step: int) -> None:
    """Starts where the window does."""
    if step in self._window and not self._tracing:
      jax.profiler.start_trace(str(self._directory))
      self._tracing = True

  def after(self, step: int, results: Any) -> None:
    """Ends the trace once the results of the last step are there."""
    if self._tracing and step + 1 not in self._window:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends a trace that is under way."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
