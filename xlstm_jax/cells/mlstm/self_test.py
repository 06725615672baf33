"""Whether a kernel computes on this device what the native form does.

Kernels have been wrong on one generation of devices and right on the next, and
in their gradients alone. So a run looks before its first step.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlstm_jax.cells.mlstm.backends import mlstm
from xlstm_jax.cells.precision import accumulator, rounded
from xlstm_jax.errors import UserError

NATIVE = "chunkwise"
# The tests hold kernels to twice the native error. Here no sound kernel may be
# refused for the luck of one draw, and a wrong one is off by far more.
FACTOR = 16.0
DOCUMENTS = 3
# Of the first token of the last document, which then rules its memory.
LOUD = 12.0
# What XLA would time on the GPU to make the native form fast, it does not need.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Shape(NamedTuple):
  """Rows, tokens, heads, and channels of keys and values."""

  B: int
  T: int
  H: int
  K: int
  V: int


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
  backend: str,
  shape: Shape,
  *,
  dtype: str,
  chunk: int | None = None,
  input_gate: Literal["exp", "sigmoid"] = "exp",
  normalize: bool = True,
  eps: float = 1e-6,
) -> Callable[[], None]:
  """Compiles the comparison of a backend with the native form.

  It computes nothing on the device, and so disturbs nothing there.

  Args:
    backend: the name of one.
    shape: of the arrays on this device.
    dtype: of q, k and v.
    chunk, input_gate, normalize, eps: as `mlstm` takes them.

  Returns:
    What compares values and gradients, and raises a `UserError` with the
    figures if they disagree.

  Raises:
    UserError: the backend refuses the device or the shape.
  """
  lowered = _measured.lower(
    shape,
    dtype=dtype,
    backend=backend,
    chunk=chunk,
    input_gate=input_gate,
    normalize=normalize,
    eps=eps,
  )
  measure = lowered.compile(UNTUNED if jax.default_backend() == "gpu" else None)

  def compare():
    _judge(backend, shape, findings(measure()))

  return compare


def findings(measured: dict[str, Any]) -> dict[str, Finding]:
  """The errors of h and of the gradients against the native form in float32."""
  ulp = float(jnp.finfo(jnp.float32).eps)
  return {
    name: Finding(kernel, native, FACTOR * native + 4 * ulp * largest)
    for name, (kernel, native, largest) in jax.tree.map(float, measured).items()
  }


def _judge(backend: str, shape: Shape, found: dict[str, Finding]) -> None:
  # A NaN is not below anything.
  wrong = [name for name, f in found.items() if not f.kernel <= f.allowed]
  if wrong:
    figures = ", ".join(
      f"{name} is off by {found[name].kernel:.2g} where the native form is by "
      f"{found[name].native:.2g}"
      for name in wrong
    )
    raise UserError(
      f"The mLSTM backend {backend!r} computes wrongly on "
      f"{jax.devices()[0].device_kind} at {shape}: {figures}. Train with "
      f"--config.compute.mlstm_backend={NATIVE}, and report this."
    )


@functools.partial(
  jax.jit,
  static_argnames=(
    "shape",
    "dtype",
    "backend",
    "chunk",
    "input_gate",
    "normalize",
    "eps",
  ),
)
def _measured(shape: Shape, *, dtype: str, backend: str, chunk, **options):
  """Errors of the kernel and of the native form, and the largest truth."""
  inputs = _example(shape, dtype)
  of = functools.partial(_values_and_gradients, inputs, **options)
  truth = of(dtype="float32", backend=NATIVE, chunk=None)
  native = of(dtype=dtype, backend=NATIVE, chunk=None)
  kernel = of(dtype=dtype, backend=backend, chunk=chunk)
  return {
    name: (
      _error(kernel[name], x),
      _error(native[name], x),
      jnp.abs(x.astype(jnp.float32)).max(),
    )
    for name, x in truth.items()
  }


def _example(shape: Shape, dtype: str) -> dict[str, jax.Array]:
  """Tokens of unit variance in several documents, with gates as in training.

  In bfloat16 one token rules the memory of the last document: C^T q is small
  there for some q, and n^T q with it. In float32 the truth would be no better.
  """
  B, T, H, K, V = shape
  key = functools.partial(jax.random.fold_in, jax.random.key(0))
  sizes = {"q": (K,), "k": (K,), "v": (V,), "g": (V,), "i": (), "f": ()}
  drawn = {
    name: jax.random.normal(key(at), (B, T, H, *size))
    for at, (name, size) in enumerate(sizes.items())
  }
  narrow = {n: rounded(drawn[n], dtype) for n in ("q", "k", "v", "g")}
  if dtype == accumulator(dtype):
    return drawn | narrow | {"f": drawn["f"] + 4.0}
  segments_T = _segments(T)
  last_TH = jnp.broadcast_to((segments_T == DOCUMENTS)[:, None], (T, H))
  i_BTH = drawn["i"].at[:, jnp.argmax(segments_T)].set(LOUD)
  f_BTH = drawn["f"] + jnp.where(last_TH, 6.0, 4.0)
  return drawn | narrow | {"i": i_BTH, "f": f_BTH}


def _segments(time: int) -> Int[Array, "T"]:
  return 1 + jnp.arange(time) * DOCUMENTS // time


def _values_and_gradients(inputs, *, dtype, **options) -> dict[str, jax.Array]:
  B, T = inputs["i"].shape[:2]
  segments_T = _segments(T)
  tokens = {name: inputs[name].astype(dtype) for name in ("q", "k", "v")}
  gates = {name: inputs[name] for name in ("i", "f")}

  def loss(operands):
    h_BTHV, _ = mlstm(
      operands["q"],
      operands["k"],
      operands["v"],
      i_BTH=operands["i"],
      f_BTH=operands["f"],
      segments_BT=jnp.broadcast_to(segments_T, (B, T)),
      **options,
    )
    weights_BTHV = inputs["g"].astype(jnp.float32)
    return jnp.sum(h_BTHV.astype(jnp.float32) * weights_BTHV), h_BTHV

  grads, h_BTHV = jax.grad(loss, has_aux=True)(tokens | gates)
  return {"h": h_BTHV} | {f"d{name}": grad for name, grad in grads.items()}


def _error(
  x: Float[Array, "B T H *"], truth: Float[Array, "B T H *"]
) -> Float[Array, ""]:
  """Root mean square over time and channels, the worst of rows and heads."""
  squares = jnp.square(x.astype(jnp.float32) - truth.astype(jnp.float32))
  axes = (1, *range(3, squares.ndim))
  return jnp.sqrt(squares.mean(axes).max())
