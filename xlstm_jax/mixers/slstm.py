"""sLSTM mixer: convolution, block-diagonal gates, recurrent cell, head norm."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from xlstm_jax.cells import lstm, slstm
from xlstm_jax.cells import recurrent_self_test as self_test
from xlstm_jax.cells.backends import Cell, Registry, Share
from xlstm_jax.cells.recurrence import Shapes
from xlstm_jax.errors import UserError
from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute, wide
from xlstm_jax.layers.conv import CausalConv, ConvState
from xlstm_jax.layers.initializers import Depth
from xlstm_jax.layers.linear import Linear, dropout
from xlstm_jax.layers.norm import Norm, NormConfig
from xlstm_jax.ranges import ranged
from xlstm_jax.sharding import on_mesh


@dataclasses.dataclass(frozen=True)
class SLSTMConfig:
  """The recurrent mixer of the paper's post-up-projection block.

  Attributes:
    cell: "slstm", or "lstm" for its textbook ancestor in the same block.
    num_heads: Number of heads. The recurrence stays within a head.
    conv_window: Window of the causal convolution before the input and forget
      gates; 0 for none.
    recurrent_init: Initial recurrent weights: zeros, or U(+-1/sqrt(width)).
    bias_init: Initial gate biases: the paper's power law for the forget gate,
      which depends on the block's depth; forget gates from 3 to 6; or
      U(+-1/sqrt(width)).
    head_norm_scale: Whether the head norm has a learned scale.
    feedforward: Whether a feed-forward follows the mixer in its block.
  """

  cell: Literal["slstm", "lstm"] = "slstm"
  num_heads: int = ranged(4, at_least=1)
  conv_window: int = ranged(4, at_least=0)
  recurrent_init: Literal["zeros", "uniform"] = "zeros"
  bias_init: Literal["power_law", "linspace", "uniform"] = "power_law"
  head_norm_scale: bool = True
  feedforward: bool = True

  def flops(self, width: int, *, context: int, chunk: int | None) -> float:
    """FLOPs per token of the mixer's forward pass."""
    del context, chunk
    maps = 2 * 8 * width * width / self.num_heads
    return maps + 2 * self.conv_window * width


_UNITS = ("batch", "heads", None)


class _Cell(NamedTuple):
  """The function of a cell, its backends, and the axes of its state."""

  run: Callable[..., Any]
  registry: Registry
  axes: Any


_CELLS = {
  "slstm": _Cell(
    slstm.slstm,
    slstm.BACKENDS,
    slstm.State._make([_UNITS] * 4 + [("batch",)]),
  ),
  "lstm": _Cell(
    lstm.lstm, lstm.BACKENDS, lstm.State._make([_UNITS] * 2 + [("batch",)])
  ),
}


def slstm_cell(cfg: SLSTMConfig, share: Share, compute: Compute) -> Cell:
  """The cell of the mixer, with the shapes that one device computes."""
  run, registry, _ = _CELLS[cfg.cell]
  shapes = Shapes(
    B=share.B,
    T=share.T,
    H=cfg.num_heads // share.tensor,
    D=share.width // cfg.num_heads,
    dtype=str(jnp.promote_types(compute.dtype, jnp.float32)),
    matrix_dtype=compute.dtype,
  )
  return Cell(
    registry,
    shapes,
    lambda backend: self_test.prepared(run, registry, backend, shapes),
  )


class SLSTMState(NamedTuple):
  """Convolution and cell state."""

  conv: ConvState | None
  cell: slstm.State | lstm.State


class SLSTM(nnx.Module):
  """The mixer between a post-up-projection block's norm and its residual.

  Along G, the gates are in the order i, f, z, o.
  """

  def __init__(
    self,
    cfg: SLSTMConfig,
    width: int,
    *,
    depth: Depth,
    head_norm: NormConfig,
    dropout: float,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    H = cfg.num_heads
    if width % H:
      raise UserError(
        f"A width of {width} cannot be split into {H} sLSTM heads: change "
        "width or slstm.num_heads."
      )
    D = width // H
    self.cfg = cfg
    self.heads = (H, D)
    self.dropout = dropout
    self.compute = compute
    self.conv = (
      CausalConv(cfg.conv_window, width, compute=compute, rngs=rngs)
      if cfg.conv_window
      else None
    )
    self.gates = Linear(
      "BTGHD,GHDE->BTGHE",
      (4, H, D, D),
      (None, "heads", "width", None),
      init=initializers.small(width),
      precise=True,
      compute=compute,
      rngs=rngs,
    )
    uniform = initializers.uniform(width**-0.5)
    recurrent = initializers.zeros
    if cfg.recurrent_init == "uniform":
      recurrent = uniform
    self.recurrent = nnx.Param(
      recurrent(rngs.params(), (4, H, D, D), compute.param_dtype),
      axes=(None, "heads", "width", None),
    )
    if cfg.bias_init == "uniform":
      bias = uniform(rngs.params(), (4, H, D), compute.param_dtype)
    else:
      forget_D = jnp.linspace(3.0, 6.0, D)
      if cfg.bias_init == "power_law":
        forget_D = _power_law(D, depth)
      bias = jnp.zeros((4, H, D), compute.param_dtype)
      bias = bias.at[1].set(forget_D.astype(bias.dtype))
    self.bias = nnx.Param(bias, axes=(None, "heads", None))
    if not cfg.head_norm_scale:
      head_norm = dataclasses.replace(head_norm, scale="none")
    self.head_norm = Norm(
      head_norm, (H, D), ("heads", None), compute=compute, rngs=rngs
    )

  def empty_state(self, batch: int) -> SLSTMState:
    """The empty past of `batch` rows."""
    conv = None
    if self.conv is not None:
      conv = self.conv.empty_state(batch, self.compute.dtype)
    cell = slstm if self.cfg.cell == "slstm" else lstm
    return SLSTMState(
      conv, cell.empty_state(batch, *self.heads, self.compute.param_dtype)
    )

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    state: SLSTMState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], SLSTMState]:
    """Mixes along time within segments; `state` None is the empty past."""
    conv_BTD, conv_state = x_BTD, None
    if self.conv is not None:
      conv_BTD, conv_state = self.conv(
        x_BTD, segments_BT=segments_BT, state=state.conv if state else None
      )
      conv_BTD = jax.nn.silu(conv_BTD)
    x_BTGD = jnp.stack([conv_BTD, conv_BTD, x_BTD, x_BTD], axis=2)
    gates_BTGHD = self.gates(x_BTGD.reshape(*x_BTGD.shape[:3], *self.heads))
    y_BTHD, cell_state = self._recur(
      gates_BTGHD, segments_BT, state.cell if state else None
    )
    y_BTHD = dropout(y_BTHD, self.dropout, dropout_key)
    y_BTD = self.head_norm(y_BTHD).reshape(x_BTD.shape)
    return y_BTD, SLSTMState(conv_state, cell_state)

  def _recur(self, gates_BTGHD, segments_BT, state):
    """Runs the cell; every device does so on its rows and heads."""
    run, registry, axes = _CELLS[self.cfg.cell]
    backend = getattr(self.compute, registry.setting)

    def cell(gates_BTGHD, R_GHDE, b_GHD, segments_BT, state):
      return run(
        gates_BTGHD,
        R_GHDE,
        b_GHD,
        segments_BT=segments_BT,
        state=state,
        backend=backend,
      )

    return on_mesh(
      cell,
      gates_BTGHD,
      self.recurrent[...].astype(self.compute.dtype),
      wide(self.bias[...]),
      segments_BT,
      state,
      axes=(
        ("batch", None, None, "heads", None),
        (None, "heads", None, None),
        (None, "heads", None),
        None if segments_BT is None else ("batch", None),
        None if state is None else axes,
      ),
      out_axes=(("batch", None, "heads", None), axes),
    )


def _power_law(D: int, depth: Depth) -> jax.Array:
  """Forget biases from 5 to -7 over a head's units, flatter in early blocks."""
  share = depth.at / max(depth.blocks - 1, 1)
  units_D = jnp.arange(D) / max(D - 1, 1)
  return 5 - 12 * units_D ** (0.3 + 1.3 * share)
