"""The precision policy, and how a model is computed: one place for both.

What holds in which precision, whatever `dtype` is:

  parameters, their gradients and the optimizer   `param_dtype` (fp32)
  matmul operands and the residual stream         `dtype` (bf16 in training)
  matmul accumulation                             fp32
  norms: mean, variance, scaling                  fp32, result cast to `dtype`
  gate projections, gate pre-activations          fp32, operands too
  log-gates, cumulative sums, exponents, m, n, C  fp32 (in the cells)
  convolution: products and sums                  fp32, result cast to `dtype`
  sums over tokens: embedding, bias, skip         fp32, of gradients in `dtype`
  logits, soft caps, log-sum-exp, loss            fp32

Products of fp32 operands are computed in fp32 on every device. By default TPUs
and GPUs would round the operands (to bf16, TF32). This costs speed only if
`dtype` is float32, and in the small gate projections.

With `dtype="float64"` every fp32 above is fp64: `wide` never narrows.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from xlstm_jax.cells.backends import AUTO


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the model is computed; nothing here changes which function it is.

  Attributes:
    dtype: Type of matmul operands and of the residual stream.
    param_dtype: Type of the parameters.
    mlstm_backend: Form of the mLSTM cell. "auto" takes the first that can run.
    slstm_backend: Form of the sLSTM cell. "auto" takes the first that can run.
    lstm_backend: Form of the LSTM cell. "auto" takes the first that can run.
    mlstm_chunk: Tokens of a chunk, in forms of the mLSTM that have chunks; None
      lets the form choose.
    scan: Whether blocks that repeat are scanned, so that one repetition is
      compiled instead of every block.
    remat: What the backward pass recomputes: nothing ("none"), everything but
      the outputs of weight matmuls ("matmuls"), or everything inside a block
      ("block").
    deterministic: Whether a training step on GPUs gives the same bits in every
      process. It then sums in a fixed order and does not time kernels against
      each other, which costs speed. CPUs and TPUs always give the same bits.
  """

  dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
  param_dtype: Literal["float32", "float64"] = "float32"
  mlstm_backend: str = "auto"
  slstm_backend: str = "auto"
  lstm_backend: str = "auto"
  mlstm_chunk: int | None = None
  scan: bool = True
  remat: Literal["none", "matmuls", "block"] = "none"
  deterministic: bool = False

  def on_any_device(self) -> "Compute":
    """The same, with "auto" for every cell, so that it runs on any device."""
    return dataclasses.replace(
      self, mlstm_backend=AUTO, slstm_backend=AUTO, lstm_backend=AUTO
    )


def wide(x: jax.Array) -> jax.Array:
  """`x` in fp32 or wider, for whatever the policy keeps out of bf16."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
