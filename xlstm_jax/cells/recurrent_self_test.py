"""The comparison of an sLSTM or LSTM kernel with the native form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.cells import self_test
from xlstm_jax.cells.backends import Registry
from xlstm_jax.cells.precision import rounded
from xlstm_jax.cells.recurrence import Shapes

GATES = 4
DOCUMENTS = 3
# All steps of a kernel are alike, and the native form takes long for many.
STEPS = 128


def prepared(
  run: Callable[..., Any], registry: Registry, backend: str, shapes: Shapes
) -> Callable[[], None]:
  """Compiles the comparison of a backend with the native form.

  Args:
    run: `slstm` or `lstm`.
    registry: Of its backends.
    backend: The name of one.
    shapes: What the device computes; of T at most `STEPS` are compared.

  Returns:
    What compares values and gradients, and raises a `UserError` with the
    figures if they disagree.

  Raises:
    UserError: The backend cannot compute this on the device.
  """
  shapes = shapes._replace(T=min(shapes.T, STEPS))
  return self_test.prepared(
    registry,
    backend,
    shapes,
    dtype=shapes.matrix_dtype,
    example=functools.partial(_example, shapes),
    tensors=functools.partial(_values_and_gradients, run, shapes),
  )


def _example(shapes: Shapes) -> dict[str, jax.Array]:
  """Gates of unit variance in several documents, and matrices that mix."""
  B, T, H, D = shapes[:4]
  sizes = {
    "x": (B, T, GATES, H, D),
    "R": (GATES, H, D, D),
    "b": (GATES, H, D),
    "g": (B, T, H, D),
  }
  drawn = {
    name: jax.random.normal(jax.random.fold_in(jax.random.key(0), at), size)
    for at, (name, size) in enumerate(sizes.items())
  }
  drawn["R"] *= 0.5 * D**-0.5
  # Gates in the order i, f, z, o: a unit remembers about 50 tokens.
  drawn["b"] = drawn["b"].at[1].add(4.0)
  return drawn | {
    "x": rounded(drawn["x"], shapes.dtype),
    "R": rounded(drawn["R"], shapes.matrix_dtype),
    "g": rounded(drawn["g"], shapes.dtype),
  }


def _values_and_gradients(
  run, shapes: Shapes, inputs, dtype: str, backend: str
) -> dict[str, jax.Array]:
  """Tensors with rows, or gates, in dimension 0 and heads in dimension 2."""
  B, T = shapes[:2]
  segments_T = 1 + jnp.arange(T) * DOCUMENTS // T

  def loss(operands):
    y_BTHD, _ = run(
      operands["x"].astype(shapes.dtype),
      operands["R"].astype(dtype),
      operands["b"],
      segments_BT=jnp.broadcast_to(segments_T, (B, T)),
      backend=backend,
    )
    return jnp.sum(y_BTHD.astype(jnp.float32) * inputs["g"]), y_BTHD

  operands = {name: inputs[name] for name in ("x", "R", "b")}
  grads, y_BTHD = jax.grad(loss, has_aux=True)(operands)
  return {
    "y": y_BTHD,
    "dx": jnp.swapaxes(grads["x"], 2, 3),
    "dR": jnp.swapaxes(grads["R"], 1, 2),
    "db": grads["b"][:, None],
  }
