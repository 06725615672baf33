"""Compares a kernel with the native form on the device at hand.

Kernels have been wrong on one generation of devices and right on the next, and
wrong in their gradients alone. So a run compares before its first step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlstm_jax.cells.backends import Registry
from xlstm_jax.errors import UserError

# The tests hold kernels to twice the native error. This check must not refuse a
# sound kernel for an unlucky draw, and a wrong kernel is off by far more.
FACTOR = 16.0
# Without these XLA would time kernels on the GPU to make the native form fast.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

# Outputs and gradients by name.
Tensors = dict[str, jax.Array]


class Finding(NamedTuple):
  """Errors of a tensor: root mean squares of the worst row and head.

  Attributes:
    kernel: Error of the kernel.
    native: Error of the native form in the same types.
    allowed: Largest allowed error of the kernel.
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

  Compiling computes nothing on the device, so it disturbs nothing there.

  Args:
    registry: The backends of the cell.
    backend: The name of the backend to compare.
    shape: Shape of the arrays, for messages.
    dtype: Type of the operands.
    example: Draws the inputs.
    tensors: `tensors(inputs, dtype, backend)` returns outputs and gradients,
      each with rows in dimension 0 and heads in dimension 2.

  Returns:
    A function that compares values and gradients, and raises a `UserError` with
    the figures if they disagree.

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
  """Root mean square over time and channels, of the worst row and head."""
  squares = jnp.square(x.astype(jnp.float32) - truth.astype(jnp.float32))
  axes = (1, *range(3, squares.ndim))
  return jnp.sqrt(squares.mean(axes).max())
