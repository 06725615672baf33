"""mLSTM mixer of the paper: up-projection, convolution, cell, output gate."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from xlstm_jax.cells import mlstm
from xlstm_jax.cells.precision import multiplication
from xlstm_jax.errors import UserError
from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute, wide
from xlstm_jax.layers.conv import CausalConv, ConvState
from xlstm_jax.layers.feedforward import round_up
from xlstm_jax.layers.initializers import Depth
from xlstm_jax.layers.linear import Linear, dropout
from xlstm_jax.layers.norm import Norm, NormConfig, qk_norm
from xlstm_jax.mixers.gates import Gates
from xlstm_jax.mixers.memory import memory, memory_flops
from xlstm_jax.ranges import ranged
from xlstm_jax.sharding import constrain, split_over

MERGED = 64  # channels of small blocks that one product maps together


@dataclasses.dataclass(frozen=True)
class MLSTMConfig:
  """The mLSTM mixer of the paper's pre-up-projection block.

  Attributes:
    num_heads: Number of heads, which are contiguous slices of the inner
      channels.
    factor: Inner channels per channel of the model, before rounding up to
      `round_to`.
    round_to: The number of inner channels is a multiple of this.
    conv_window: Window of the causal convolution; 0 for none.
    qkv_block: Size of the blocks of the block-diagonal maps to q, k and v; 0
      for dense maps.
    gate_input: What the gates see: q, k and v, the convolved channels, or the
      up-projected channels before the convolution.
    gate_headwise: Whether the gates of a head see only that head's channels.
    gate_cap: Soft cap of the gate pre-activations; None for none.
    input_gate: Exponential with stabiliser, or sigmoid.
    input_gate_bias: Initial bias of the input gate; None draws it from
      N(0, 0.1^2).
    normalize: Whether outputs are divided by the normaliser.
    qk_norm: Whether q and k are RMS-normalised in every head.
    eps: Number added to the cell's normaliser.
    bias: Whether all projections have biases.
  """

  num_heads: int = ranged(4, at_least=1)
  factor: float = ranged(2.0, above=0)
  round_to: int = ranged(64, at_least=1)
  conv_window: int = ranged(4, at_least=0)
  qkv_block: int = ranged(4, at_least=0)
  gate_input: Literal["qkv", "conv", "up"] = "qkv"
  gate_headwise: bool = False
  gate_cap: float | None = ranged(None, above=0)
  input_gate: Literal["exp", "sigmoid"] = "exp"
  input_gate_bias: float | None = None
  normalize: bool = True
  qk_norm: bool = False
  eps: float = ranged(1e-6, at_least=0)
  bias: bool = False

  def inner(self, width: int) -> int:
    """Inner channels at this width."""
    return round_up(self.factor * width, self.round_to)

  def head_channels(self, width: int) -> tuple[int, int]:
    """Channels of a head's keys and of its values at this width."""
    channels = self.inner(width) // self.num_heads
    return channels, channels

  def flops(self, width: int, *, context: int, chunk: int | None) -> float:
    """FLOPs per token of the mixer's forward pass."""
    inner = self.inner(width)
    gates = 2 * (3 if self.gate_input == "qkv" else 1) * inner * 2
    return (
      6 * width * inner
      + 6 * inner * (self.qkv_block or inner)
      + gates * (1 if self.gate_headwise else self.num_heads)
      + 2 * self.conv_window * inner
      + memory_flops(self, width, context=context, chunk=chunk)
    )

  def problems(self, width: int, *, tensor: int) -> Iterator[str]:
    """What does not fit this width or `tensor` devices that split heads.

    Channels split where heads do. Blocks of q, k and v do not follow the heads,
    and a single dense block is split by its outputs.
    """
    inner, block = self.inner(width), self.qkv_block
    blocks = inner // block if block else 1
    if not inner % tensor and blocks > 1 and blocks % tensor:
      yield (
        f"config.model.mlstm.qkv_block is {block}; mesh.tensor={tensor} cannot "
        f"split {blocks} blocks of the {inner} inner channels evenly: set "
        f"mesh.tensor=1 or a qkv_block that divides {inner // tensor}."
      )


class MLSTMState(NamedTuple):
  """Convolution and cell state."""

  conv: ConvState | None
  cell: mlstm.State


class MLSTM(nnx.Module):
  """The mixer between a pre-up-projection block's norm and its residual."""

  def __init__(
    self,
    cfg: MLSTMConfig,
    width: int,
    *,
    depth: Depth,
    head_norm: NormConfig,
    dropout: float,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    inner = cfg.inner(width)
    H = cfg.num_heads
    if inner % H or (cfg.qkv_block and inner % cfg.qkv_block):
      raise UserError(
        f"The mLSTM's {inner} inner channels cannot be split into {H} heads "
        f"and blocks of {cfg.qkv_block}: change mlstm.num_heads, "
        "mlstm.qkv_block or mlstm.factor."
      )
    bias = initializers.zeros if cfg.bias else None
    self.cfg = cfg
    self.heads = (H, inner // H)
    self.dropout = dropout
    self.compute = compute
    # Along G: the cell's input, then the output gate's.
    self.up = Linear(
      "BTD,DGU->BTGU",
      (width, 2, inner),
      ("width", None, "inner"),
      init=initializers.small(width),
      bias=bias,
      compute=compute,
      rngs=rngs,
    )
    self.conv = (
      CausalConv(cfg.conv_window, inner, compute=compute, rngs=rngs)
      if cfg.conv_window
      else None
    )
    self.q, self.k, self.v = (
      _BlockDiagonal(cfg, width, bias=bias, compute=compute, rngs=rngs)
      for _ in range(3)
    )
    self.q_norm, self.k_norm = (
      qk_norm(self.heads, compute=compute, rngs=rngs) if cfg.qk_norm else None
      for _ in range(2)
    )
    self.gates = Gates(
      sources=3 if cfg.gate_input == "qkv" else 1,
      channels=inner,
      axis="inner",
      num_heads=H,
      headwise=cfg.gate_headwise,
      cap=cfg.gate_cap,
      input_bias=cfg.input_gate_bias,
      compute=compute,
      rngs=rngs,
    )
    self.head_norm = Norm(
      head_norm, self.heads, ("heads", None), compute=compute, rngs=rngs
    )
    self.skip = nnx.Param(
      initializers.ones(rngs.params(), (inner,), compute.param_dtype),
      axes=("inner",),
    )
    self.down = Linear(
      "BTU,UD->BTD",
      (inner, width),
      ("inner", "width"),
      init=initializers.wang(width, depth.blocks),
      bias=bias,
      compute=compute,
      rngs=rngs,
    )

  def empty_state(self, batch: int) -> MLSTMState:
    """The empty past of `batch` rows."""
    H, K = self.heads
    conv = None
    if self.conv is not None:
      conv = self.conv.empty_state(batch, self.compute.dtype)
    return MLSTMState(
      conv, mlstm.empty_state(batch, H, K, K, self.compute.param_dtype)
    )

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    state: MLSTMState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], MLSTMState]:
    """Mixes along time within segments; `state` None is the empty past."""
    up_BTGU = constrain(self.up(x_BTD), "batch", "time", None, "inner")
    x_BTU, z_BTU = up_BTGU[..., 0, :], up_BTGU[..., 1, :]
    conv_BTU, conv_state = x_BTU, None
    if self.conv is not None:
      conv_BTU, conv_state = self.conv(
        x_BTU, segments_BT=segments_BT, state=state.conv if state else None
      )
      conv_BTU = jax.nn.silu(conv_BTU)
    q_BTU, k_BTU, v_BTU = self.q(conv_BTU), self.k(conv_BTU), self.v(x_BTU)
    sources = {
      "qkv": (q_BTU, k_BTU, v_BTU),
      "conv": (conv_BTU,),
      "up": (x_BTU,),
    }
    i_BTH, f_BTH = self.gates(*sources[self.cfg.gate_input])
    q_BTHK, k_BTHK, v_BTHV = (self._heads(x) for x in (q_BTU, k_BTU, v_BTU))
    if self.q_norm is not None and self.k_norm is not None:
      q_BTHK, k_BTHK = self.q_norm(q_BTHK), self.k_norm(k_BTHK)
    h_BTHV, cell_state = memory(
      q_BTHK,
      k_BTHK,
      v_BTHV,
      i_BTH=i_BTH,
      f_BTH=f_BTH,
      segments_BT=segments_BT,
      state=state.cell if state else None,
      cfg=self.cfg,
      compute=self.compute,
    )
    h_BTU = self.head_norm(h_BTHV).reshape(x_BTU.shape)
    # In fp32, so that the gradient of `skip` is summed in fp32.
    skipped_BTU = wide(self.skip[...]) * wide(conv_BTU)
    h_BTU = (wide(h_BTU) + skipped_BTU).astype(h_BTU.dtype)
    y_BTD = self.down(h_BTU * jax.nn.silu(z_BTU))
    y_BTD = dropout(y_BTD, self.dropout, dropout_key)
    return y_BTD, MLSTMState(conv_state, cell_state)

  def _heads(self, x_BTU):
    x_BTHK = x_BTU.reshape(*x_BTU.shape[:2], *self.heads)
    return constrain(x_BTHK, "batch", "time", "heads", None)


class _BlockDiagonal(nnx.Module):
  """A map of the inner channels within blocks of `qkv_block` channels."""

  def __init__(self, cfg: MLSTMConfig, width: int, *, bias, compute, rngs):
    inner = cfg.inner(width)
    block = cfg.qkv_block or inner
    self.blocks = inner // block
    # N blocks from I to O channels. A single block is split like a dense map.
    self.map = _Blocks(
      "BTNI,NIO->BTNO",
      (self.blocks, block, block),
      ("inner", None, None) if self.blocks > 1 else (None, "width", "inner"),
      init=initializers.small(width),
      bias=bias,
      compute=compute,
      rngs=rngs,
    )

  def __call__(self, x_BTU):
    x_BTNI = x_BTU.reshape(*x_BTU.shape[:2], self.blocks, -1)
    y_BTU = self.map(x_BTNI).reshape(x_BTU.shape)
    return constrain(y_BTU, "batch", "time", "inner")


class _Blocks(Linear):
  """Maps N blocks, several at a time as one block with zeros between them.

  Matrix units multiply many channels at once, and a block has only 4.
  """

  def product(self, x_BTNI, weight_NIO, /):
    *tokens, N, size = x_BTNI.shape
    mesh = jax.sharding.get_abstract_mesh()
    own = N // math.prod(mesh.shape[a] for a in split_over("inner", N))
    most = max(1, MERGED // size)
    merged = max(m for m in range(1, most + 1) if own % m == 0)
    groups = (N // merged, merged, size)
    weight_GMIO = weight_NIO.reshape(*groups, size)
    same_M1M1 = jnp.eye(merged, dtype=bool)[:, None, :, None]
    y_BTGMO = jnp.einsum(
      "BTGMI,GMIPO->BTGPO",
      x_BTNI.reshape(*tokens, *groups),
      jnp.where(same_M1M1, weight_GMIO[:, :, :, None], 0),
      precision=multiplication(x_BTNI.dtype),
    )
    return y_BTGMO.reshape(x_BTNI.shape)
