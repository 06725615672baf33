"""The kernel bound: how large the error of a faster form of a cell may be.

    error(form) <= 2 error(native) + 4 ulp max |truth|

Truth is the definition in float64 on the same inputs. Native is the form that
runs on platforms without kernels, in the same types. The bound holds for two
errors: the root mean square over a tensor, and the 99.9th percentile of that
over rows, so that single rows cannot hide.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def errors(
  x: Float[np.ndarray, "..."], truth: Float[np.ndarray, "..."]
) -> np.ndarray:
  """Root mean square error: of all, and the 99.9th percentile over rows."""
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
  """The larger error of a form as a share of what the bound allows.

  An ulp is that of float32 at 1, for bfloat16 outputs too: native rounds its
  outputs as well, so the first term allows for that. The bound leaves room for
  devices that flush numbers below the smallest normal one to 0.

  Args:
    form: a result of the form.
    native: the same result of the native form.
    truth: the true result.
    moved: true results for inputs that were moved by an ulp. Their distance
      from the truth is added to native's error, because native may be lucky
      (docs/decisions/0004-what-rounding-may-cost.md).
    largest: takes the place of max |truth|, for results in which numbers all
      but cancel.
    factor: factor of native's error.
    ulps: number of ulp in the second term.
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
