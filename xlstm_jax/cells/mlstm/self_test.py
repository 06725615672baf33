"""The comparison of an mLSTM kernel with the native form, by an example."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells import self_test
from xlstm_jax.cells.mlstm.backends import BACKENDS, mlstm
from xlstm_jax.cells.precision import rounded

DOCUMENTS = 3


class Shape(NamedTuple):
  """Rows, tokens, heads, and channels of keys and values."""

  B: int
  T: int
  H: int
  K: int
  V: int


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

  def tensors(inputs, as_dtype: str, form: str):
    return _values_and_gradients(
      inputs,
      dtype=as_dtype,
      backend=form,
      chunk=chunk if form == backend else None,
      input_gate=input_gate,
      normalize=normalize,
      eps=eps,
    )

  return self_test.prepared(
    BACKENDS,
    backend,
    shape,
    dtype=dtype,
    example=functools.partial(_example, shape, dtype),
    tensors=tensors,
  )


def _example(shape: Shape, dtype: str) -> dict[str, jax.Array]:
  """Tokens of unit variance in several documents, with gates as in training."""
  B, T, H, K, V = shape
  key = functools.partial(jax.random.fold_in, jax.random.key(0))
  sizes = {"q": (K,), "k": (K,), "v": (V,), "g": (V,), "i": (), "f": ()}
  drawn = {
    name: jax.random.normal(key(at), (B, T, H, *size))
    for at, (name, size) in enumerate(sizes.items())
  }
  narrow = {n: rounded(drawn[n], dtype) for n in ("q", "k", "v", "g")}
  return drawn | narrow | {"f": drawn["f"] + 4.0}


def _values_and_gradients(inputs, *, dtype, **options) -> dict[str, jax.Array]:
  B, T = inputs["i"].shape[:2]
  segments_T = 1 + jnp.arange(T) * DOCUMENTS // T
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
