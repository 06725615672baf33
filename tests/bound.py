"""What a faster form of a cell may lose: the kernel bound.

    error(form) <= 2 error(native) + 4 ulp max |truth|

Truth is the definition in float64 on the same inputs, native the form that a
platform without kernels runs, in the same types. The error is the root mean
square over a tensor and, so that single rows cannot hide in it, the 99.9th
percentile of that over rows.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def errors(
  x: Float[np.ndarray, "..."], truth: Float[np.ndarray, "..."]
) -> np.ndarray:
  """Root mean square error: of all, and of the 99.9th percentile of rows."""
  squares = np.square(np.float64(x) - np.float64(truth))
  rows = np.mean(squares, axis=-1)
  return np.sqrt([np.mean(rows), np.quantile(rows, 0.999, method="higher")])


def excess(
  form: Float[np.ndarray, "..."],
  native: Float[np.ndarray, "..."],
  truth: Float[np.ndarray, "..."],
  *,
  moved: Sequence[Float[np.ndarray, "..."]] = (),
  largest: float | None = None,
  factor: float = 2.0,
  ulps: float = 4.0,
) -> float:
  """The larger error of a form as a share of what the bound allows it.

  An ulp is that of float32 at 1 for bfloat16 outputs too: native rounds its
  outputs as well, so the first term allows for that. Devices flush numbers
  below the smallest normal one to 0, and sums of such numbers with them.

  Args:
    form: a result of the form.
    native: that of the native form.
    truth: the right one.
    moved: what is right for inputs that were moved by an ulp. How far that
      is from the truth is added to native's error, for native may be lucky
      (docs/decisions/0004-what-rounding-may-cost.md).
    largest: in place of max |truth|, where numbers all but cancel in it.
    factor: of the first term.
    ulps: of the second.
  """
  single = np.finfo(np.float32)
  if largest is None:
    largest = float(np.max(np.abs(truth)))
  floor = ulps * single.eps * largest + 1000 * single.tiny
  reference = errors(native, truth)
  if moved:
    squares = [np.square(errors(other, truth)) for other in moved]
    reference += np.sqrt(np.mean(squares, axis=0))
  return float(np.max(errors(form, truth) / (factor * reference + floor)))
