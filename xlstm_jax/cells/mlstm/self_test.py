"""Compares an mLSTM kernel with the native form, on an example."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from xlstm_jax.cells import self_test
from xlstm_jax.cells.mlstm.backends import BACKENDS, mlstm
from xlstm_jax.cells.precision import accumulator, rounded

DOCUMENTS = 3
# Input gate of the last document's first token, which dominates its memory.
LOUD = 12.0


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

  Compiling computes nothing on the device, so it disturbs nothing there.

  Args:
    backend: the name of the backend to compare.
    shape: shape of the arrays on this device.
    dtype: type of q, k and v.
    chunk, input_gate, normalize, eps: as `mlstm` takes them.

  Returns:
    A function that compares values and gradients, and raises a `UserError` with
    the figures if they disagree.

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
  """Tokens of unit variance in several documents, with gates as in training.

  In bfloat16 one token dominates the memory of the last document, where C^T q
  and n^T q are small for some q. In float32 there is no such token, because the
  truth would be no more exact than the kernel.
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
