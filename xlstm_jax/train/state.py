"""Everything that changes from step to step."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xlstm_jax import optim, sharding
from xlstm_jax.models.language_model import Definition, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer moments, and how far the run is.

  Leaves are arrays, or their shapes or shardings.

  Attributes:
    params: The model's parameters.
    moments: Adam's moments.
    step: Number of steps made; the moments count those that changed the
      parameters.
    position: Number of the next batch, which counts the steps made and the
      batches left out.
  """

  params: Params
  moments: optim.Moments
  step: Any
  position: Any


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """The keys of a run's initial parameters and of its dropout."""
  init_key, dropout_key = jax.random.split(jax.random.key(seed))
  return init_key, dropout_key


def start(params: Params) -> TrainState:
  """The state before the first step."""
  return TrainState(
    params=params,
    moments=optim.init(params),
    step=jnp.int32(0),
    position=jnp.int32(0),
  )


def shardings(definition: Definition, mesh: Mesh) -> TrainState:
  """The shardings of a state: moments like parameters, numbers replicated."""
  params = sharding.shardings(mesh, definition.axes(), definition.abstract())
  everywhere = sharding.replicated(mesh)
  return TrainState(
    params=params,
    moments=optim.Moments(cast(Any, everywhere), mu=params, nu=params),
    step=everywhere,
    position=everywhere,
  )


def abstract(definition: Definition, mesh: Mesh) -> TrainState:
  """Shape, dtype and sharding of every array of a state."""
  shapes = jax.eval_shape(start, definition.abstract())
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings(definition, mesh),
  )


def init(definition: Definition, mesh: Mesh, *, seed: int) -> TrainState:
  """The first state, drawn straight into its shardings."""
  create = jax.jit(
    lambda key: start(definition.init(key)),
    out_shardings=shardings(definition, mesh),
  )
  return create(keys(seed)[0])


def from_params(
  params: Params, definition: Definition, mesh: Mesh
) -> TrainState:
  """The first state of a run that begins with given parameters."""
  return jax.jit(start, out_shardings=shardings(definition, mesh))(params)


def to_items(state: TrainState) -> dict[str, Any]:
  """The arrays of a state as checkpoint items."""
  return {"params": state.params, "optimizer": state.moments._asdict()}


def from_items(
  items: dict[str, Any], *, step: int, position: int, mesh: Mesh
) -> TrainState:
  """The state made from restored items and two numbers."""
  state = TrainState(
    params=items["params"],
    moments=optim.Moments(**items["optimizer"]),
    step=jax.device_put(np.int32(step), sharding.replicated(mesh)),
    position=None,
  )
  return at_position(state, position, mesh=mesh)


def at_position(state: TrainState, position: int, *, mesh: Mesh) -> TrainState:
  """The same state with another position of the data."""
  number = jax.device_put(np.int32(position), sharding.replicated(mesh))
  return dataclasses.replace(state, position=number)
