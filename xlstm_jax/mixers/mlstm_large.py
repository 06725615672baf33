"""mLSTM mixer of the 7B model: all projections see the block's input."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from xlstm_jax.cells import mlstm
from xlstm_jax.errors import UserError
from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.initializers import Depth
from xlstm_jax.layers.linear import Linear, dropout
from xlstm_jax.layers.norm import Norm, NormConfig, qk_norm
from xlstm_jax.mixers.gates import Gates
from xlstm_jax.mixers.memory import memory, memory_flops
from xlstm_jax.ranges import ranged
from xlstm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class MLSTMLargeConfig:
  """The mLSTM mixer of the 7B model (xLSTM-7B paper).

  Attributes:
    num_heads: Number of heads, which are contiguous slices of the channels.
    qk_factor: Channels of q and of k, relative to the width.
    v_factor: Channels of v and of the output gate, relative to the width.
    gate_cap: Soft cap of the gate pre-activations; None for none.
    input_gate: Exponential with stabiliser, or sigmoid.
    input_gate_bias: Initial bias of the input gate; None draws it from
      N(0, 0.1^2).
    normalize: Whether outputs are divided by the normaliser.
    qk_norm: Whether q and k are RMS-normalised in every head.
    eps: Number added to the cell's normaliser.
    bias: Whether the projections have biases (the gates always do).
  """

  num_heads: int = ranged(8, at_least=1)
  qk_factor: float = ranged(0.5, above=0)
  v_factor: float = ranged(1.0, above=0)
  gate_cap: float | None = ranged(15.0, above=0)
  input_gate: Literal["exp", "sigmoid"] = "exp"
  input_gate_bias: float | None = -10.0
  normalize: bool = True
  qk_norm: bool = False
  eps: float = ranged(1e-6, at_least=0)
  bias: bool = False

  def head_channels(self, width: int) -> tuple[int, int]:
    """Channels of a head's keys and of its values at this width."""
    qk, v = int(width * self.qk_factor), int(width * self.v_factor)
    return qk // self.num_heads, v // self.num_heads

  def flops(self, width: int, *, context: int, chunk: int | None) -> float:
    """FLOPs per token of the mixer's forward pass."""
    qk, v = int(width * self.qk_factor), int(width * self.v_factor)
    return (
      2 * width * (2 * qk + 2 * v + 2 * self.num_heads)
      + 2 * v * width
      + memory_flops(self, width, context=context, chunk=chunk)
    )

  def problems(self, width: int, *, tensor: int) -> Iterator[str]:
    """What does not fit this width or `tensor` devices that split heads."""
    del tensor
    if not all(self.head_channels(width)):
      yield (
        f"With config.model.width={width} and num_heads={self.num_heads} a "
        f"head has no channel left of mlstm_large.qk_factor={self.qk_factor} "
        f"or v_factor={self.v_factor}: raise the factor or the width."
      )


class MLSTMLarge(nnx.Module):
  """The mixer between a 7B block's norm and its residual."""

  def __init__(
    self,
    cfg: MLSTMLargeConfig,
    width: int,
    *,
    depth: Depth,
    head_norm: NormConfig,
    dropout: float,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    H = cfg.num_heads
    qk, v = int(width * cfg.qk_factor), int(width * cfg.v_factor)
    if qk % H or v % H:
      raise UserError(
        f"The mLSTM's {qk} query and {v} value channels cannot be split into "
        f"{H} heads: change mlstm_large.num_heads, .qk_factor or .v_factor."
      )
    K, V = cfg.head_channels(width)

    def project(size, init):
      return Linear(
        "BTD,DHE->BTHE",
        (width, H, size),
        ("width", "heads", None),
        init=init,
        bias=initializers.zeros if cfg.bias else None,
        compute=compute,
        rngs=rngs,
      )

    self.cfg = cfg
    self.shape = (H, K, V)
    self.dropout = dropout
    self.compute = compute
    self.q = project(K, initializers.small(width))
    self.k = project(K, initializers.small(width))
    self.v = project(V, initializers.small(width))
    self.o = project(V, initializers.zeros)
    self.q_norm, self.k_norm = (
      qk_norm((H, K), compute=compute, rngs=rngs) if cfg.qk_norm else None
      for _ in range(2)
    )
    self.gates = Gates(
      sources=1,
      channels=width,
      axis="width",
      num_heads=H,
      headwise=False,
      cap=cfg.gate_cap,
      input_bias=cfg.input_gate_bias,
      compute=compute,
      rngs=rngs,
    )
    self.head_norm = Norm(
      head_norm, (H, V), ("heads", None), compute=compute, rngs=rngs
    )
    self.out = Linear(
      "BTHV,HVD->BTD",
      (H, V, width),
      ("heads", None, "width"),
      init=initializers.wang(width, depth.blocks),
      bias=initializers.zeros if cfg.bias else None,
      compute=compute,
      rngs=rngs,
    )

  def empty_state(self, batch: int) -> mlstm.State:
    """The empty past of `batch` rows."""
    return mlstm.empty_state(batch, *self.shape, self.compute.param_dtype)

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    state: mlstm.State | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], mlstm.State]:
    """Mixes along time within segments; `state` None is the empty past."""
    q_BTHK, k_BTHK, v_BTHV, o_BTHV = (
      constrain(project(x_BTD), "batch", "time", "heads", None)
      for project in (self.q, self.k, self.v, self.o)
    )
    i_BTH, f_BTH = self.gates(x_BTD)
    if self.q_norm is not None and self.k_norm is not None:
      q_BTHK, k_BTHK = self.q_norm(q_BTHK), self.k_norm(k_BTHK)
    h_BTHV, state = memory(
      q_BTHK,
      k_BTHK,
      v_BTHV,
      i_BTH=i_BTH,
      f_BTH=f_BTH,
      segments_BT=segments_BT,
      state=state,
      cfg=self.cfg,
      compute=self.compute,
    )
    y_BTD = self.out(jax.nn.sigmoid(o_BTHV) * self.head_norm(h_BTHV))
    return dropout(y_BTD, self.dropout, dropout_key), state
