"""The precision policy, and how a model is computed: one place for both.

What holds in which precision, whatever `dtype` is:

  parameters, their gradients and the optimizer   `param_dtype` (fp32)
  matmul operands and the residual stream         `dtype` (bf16 in training)
  matmul accumulation                             fp32
  norms: mean, variance, scaling                  fp32, result cast to `dtype`
  gate projections, gate pre-activations          fp32, operands too
  log-gates, cumulative sums, exponents, m, n, C  fp32 (the cells see to it)
  convolution: products and sums                  fp32, result cast to `dtype`
  sums over tokens: embedding, bias, skip         fp32, of gradients in `dtype`
  logits, soft caps, log-sum-exp, loss            fp32

Products of fp32 operands are fp32 products on every device, which TPUs and GPUs
otherwise make of rounded operands (bf16, TF32); it costs them speed only where
`dtype` is float32, and in the small gate projections.

With `dtype="float64"` every fp32 above is fp64: `wide` never narrows.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from xlstm_jax.cells.backends import AUTO
from xlstm_jax.ranges import ranged


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the model is computed; nothing here changes what it computes.

  Attributes:
    dtype: of matmul operands and the residual stream.
    param_dtype: of the parameters.
    mlstm_backend: a form of the mLSTM cell, or "auto".
    slstm_backend: A form of the sLSTM cell, or "auto".
    lstm_backend: A form of the LSTM cell, or "auto".
    mlstm_chunk: chunk length of the chunkwise form; None lets it choose.
    scan: compile one block per run of equal blocks instead of every block.
    remat: what the backward pass recomputes: nothing, all but the outputs of
      weight matmuls ("matmuls" are kept), or everything inside a block.
    deterministic: on GPUs, sums of the training step in a fixed order and no
      timing of kernels against each other, so that it gives the same bits in
      every process; CPUs and TPUs always do. It costs speed.
  """

  dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
  param_dtype: Literal["float32", "float64"] = "float32"
  mlstm_backend: str = "auto"
  slstm_backend: str = "auto"
  lstm_backend: str = "auto"
  mlstm_chunk: int | None = ranged(None, at_least=1)
  scan: bool = True
  remat: Literal["none", "matmuls", "block"] = "none"
  deterministic: bool = False

  def on_any_device(self) -> "Compute":
    """The same, with the forms of the cells that suit the device it is on."""
    return dataclasses.replace(
      self, mlstm_backend=AUTO, slstm_backend=AUTO, lstm_backend=AUTO
    )


def wide(x: jax.Array) -> jax.Array:
  """At least fp32: for whatever the policy keeps out of bf16."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
