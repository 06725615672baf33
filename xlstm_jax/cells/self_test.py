"""Whether a kernel computes on this device what the native form does.

Kernels have been wrong on one generation of devices and right on the next, and
in their gradients alone. So a run looks before its first step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlstm_jax.cells.backends import Registry
from xlstm_jax.errors import UserError

# The tests hold kernels to twice the native error. Here no sound kernel may be
# refused for the luck of one draw, and a wrong one is off by far more.
FACTOR = 16.0
# What XLA would time on the GPU to make the native form fast, it does not need.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

# Outputs and gradients by name.
Tensors = dict[str, jax.Array]


class Finding(NamedTuple):
  """The error of a tensor, root mean square of the worst row and head.

  Attributes:
    kernel: of the kernel.
    native: of the native form in the same types.
    allowed: what the kernel's may be.
  """

  kernel: float
  native: float
  allowed: float


def prepared(
  registry: Registry,
  backend: str,
  shape: Any,
  *,
  dtype: str,
  example: Callable[[], Any],
  tensors: Callable[[Any, str, str], Tensors],
) -> Callable[[], None]:
  """Compiles the comparison of a backend with the native form.

  It computes nothing on the device, and so disturbs nothing there.

  Args:
    registry: The cell's.
    backend: The name of one.
    shape: Of the arrays, for messages.
    dtype: Of the operands.
    example: Draws the inputs.
    tensors: `tensors(inputs, dtype, backend)`: outputs and gradients, each
      with rows in dimension 0 and heads in dimension 2.

  Returns:
    What compares values and gradients, and raises a `UserError` with the
    figures if they disagree.

  Raises:
    UserError: The backend cannot compute this on the device.
  """

  def measured():
    """Errors of the kernel and of the native form, and the largest truth."""
    inputs = example()
    truth = tensors(inputs, "float32", registry.native)
    native = tensors(inputs, dtype, registry.native)
    kernel = tensors(inputs, dtype, backend)
    return {
      name: (
        _error(kernel[name], x),
        _error(native[name], x),
        jnp.abs(x.astype(jnp.float32)).max(),
      )
      for name, x in truth.items()
    }

  options = UNTUNED if jax.default_backend() == "gpu" else None
  measure = jax.jit(measured).lower().compile(options)

  def compare():
    _judge(registry, backend, shape, findings(measure()))

  return compare


def findings(measured: dict[str, Any]) -> dict[str, Finding]:
  """The errors of all tensors against the native form in float32."""
  ulp = float(jnp.finfo(jnp.float32).eps)
  return {
    name: Finding(kernel, native, FACTOR * native + 4 * ulp * largest)
    for name, (kernel, native, largest) in jax.tree.map(float, measured).items()
  }


def _judge(
  registry: Registry, backend: str, shape: Any, found: dict[str, Finding]
) -> None:
  # A NaN is not below anything.
  wrong = [name for name, f in found.items() if not f.kernel <= f.allowed]
  if wrong:
    figures = ", ".join(
      f"{name} is off by {found[name].kernel:.2g} where the native form is by "
      f"{found[name].native:.2g}"
      for name in wrong
    )
    raise UserError(
      f"The {registry.cell} backend {backend!r} computes wrongly on "
      f"{jax.devices()[0].device_kind} at {shape}: {figures}. Train with "
      f"--config.compute.{registry.setting}={registry.native}, and report this."
    )


def _error(
  x: Float[Array, "B T H *"], truth: Float[Array, "B T H *"]
) -> Float[Array, ""]:
  """Root mean square over time and channels, the worst of rows and heads."""
  squares = jnp.square(x.astype(jnp.float32) - truth.astype(jnp.float32))
  axes = (1, *range(3, squares.ndim))
  return jnp.sqrt(squares.mean(axes).max())
