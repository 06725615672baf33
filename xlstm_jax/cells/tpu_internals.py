"""The experimental modules of JAX that the kernels for TPUs are written in.

Kernels import them from here, so that one test names what a new version of JAX
no longer has: every name that any of them uses of these modules.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["pl", "pltpu"]
