"""The mLSTM cell as both mixers run it: configured, and on the mesh."""

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from xlstm_jax.cells import mlstm
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
  """`cells.mlstm.mlstm`, each device running it on its rows, heads and time."""
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
