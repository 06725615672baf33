"""The experimental modules of JAX that the kernels for GPUs are written in.

Kernels import them from here, so that one test names what a new version of JAX
no longer has: every name that any of them uses of these modules.
"""

from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = ["arith", "ir", "llvm", "mgpu", "mgpu_utils", "pl", "plgpu", "vector"]
