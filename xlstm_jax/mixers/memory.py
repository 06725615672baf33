"""The mLSTM cell as both mixers run it: with their settings, on the mesh."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from xlstm_jax.cells import mlstm
from xlstm_jax.cells.backends import Cell, Share
from xlstm_jax.cells.mlstm import self_test
from xlstm_jax.layers.compute import Compute
from xlstm_jax.sharding import on_mesh, time_axis

_STATE = mlstm.State._make(
  [
    ("batch", "heads", None, None),
    ("batch", "heads", None),
    ("batch", "heads"),
    ("batch",),
  ]
)


@runtime_checkable
class MemoryConfig(Protocol):
  """What the cell needs of a mixer's configuration."""

  @property
  def input_gate(self) -> Literal["exp", "sigmoid"]: ...
  @property
  def normalize(self) -> bool: ...
  @property
  def eps(self) -> float: ...
  @property
  def num_heads(self) -> int: ...
  def head_channels(self, width: int) -> tuple[int, int]: ...


class Observation(NamedTuple):
  """What decides which tokens dominate a memory, and how it is read."""

  q_BTHK: Float[Array, "B T H K"]
  k_BTHK: Float[Array, "B T H K"]
  i_BTH: Float[Array, "B T H"]
  f_BTH: Float[Array, "B T H"]
  cfg: MemoryConfig


_OBSERVED: contextvars.ContextVar[list[Observation] | None] = (
  contextvars.ContextVar("observed", default=None)
)


@contextlib.contextmanager
def observed() -> Iterator[list[Observation]]:
  """In this context, every call of `memory` adds its inputs to the list.

  Inside `jax.jit` these are values of the trace. They can be used there only if
  no block was scanned or rematerialised in a trace of its own, so the model
  needs `Compute.scan=False` and `remat="none"`.
  """
  found: list[Observation] = []
  token = _OBSERVED.set(found)
  try:
    yield found
  finally:
    _OBSERVED.reset(token)


def memory(
  q_BTHK: Float[Array, "B T H K"],
  k_BTHK: Float[Array, "B T H K"],
  v_BTHV: Float[Array, "B T H V"],
  *,
  i_BTH: Float[Array, "B T H"],
  f_BTH: Float[Array, "B T H"],
  segments_BT: Int[Array, "B T"] | None,
  state: mlstm.State | None,
  cfg: MemoryConfig,
  compute: Compute,
) -> tuple[Float[Array, "B T H V"], mlstm.State]:
  """`cells.mlstm.mlstm`; each device runs it on its rows, heads and time."""
  found = _OBSERVED.get()
  if found is not None:
    found.append(Observation(q_BTHK, k_BTHK, i_BTH, f_BTH, cfg))
  axis_name = time_axis(q_BTHK.shape[1])

  def cell(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, segments_BT, state):
    return mlstm.mlstm(
      q_BTHK,
      k_BTHK,
      v_BTHV,
      i_BTH=i_BTH,
      f_BTH=f_BTH,
      segments_BT=segments_BT,
      state=state,
      input_gate=cfg.input_gate,
      normalize=cfg.normalize,
      eps=cfg.eps,
      chunk=compute.mlstm_chunk,
      backend=compute.mlstm_backend,
      axis_name=axis_name,
    )

  tokens = ("batch", "time", "heads")
  return on_mesh(
    cell,
    q_BTHK,
    k_BTHK,
    v_BTHV,
    i_BTH,
    f_BTH,
    segments_BT,
    state,
    axes=(
      (*tokens, None),
      (*tokens, None),
      (*tokens, None),
      tokens,
      tokens,
      None if segments_BT is None else ("batch", "time"),
      None if state is None else _STATE,
    ),
    out_axes=((*tokens, None), _STATE),
  )


def memory_flops(
  cfg: MemoryConfig, width: int, *, context: int, chunk: int | None
) -> float:
  """FLOPs per token of the cell's forward pass; only the causal half counts.

  Args:
    cfg: The mixer's configuration.
    width: The model's width.
    context: Tokens per sequence, which matter only to the parallel form.
    chunk: Tokens per chunk of the chunkwise form; None counts the parallel
      form.
  """
  H = cfg.num_heads
  K, V = cfg.head_channels(width)
  if chunk is None:
    return float(H * context * (K + V))
  return H * (chunk * (K + V) + 4 * K * V + 4 * K + 2 * K * V / chunk)


def memory_cell(cfg: MemoryConfig, share: Share, compute: Compute) -> Cell:
  """The cell of a mixer, with the shapes that one device computes."""
  K, V = cfg.head_channels(share.width)
  shape = self_test.Shape(
    B=share.B, T=share.T, H=cfg.num_heads // share.tensor, K=K, V=V
  )
  return Cell(
    mlstm.BACKENDS,
    mlstm.Shapes(*shape, dtype=compute.dtype, chunk=compute.mlstm_chunk),
    lambda backend: self_test.prepared(
      backend,
      shape,
      dtype=compute.dtype,
      chunk=compute.mlstm_chunk,
      input_gate=cfg.input_gate,
      normalize=cfg.normalize,
      eps=cfg.eps,
    ),
  )
