"""Everything that changes from step to step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from xlstm_jax import optim, sharding
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.optim import OptimConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, the optimizer's state, and how far the run is.

  Leaves are arrays, or their shapes or shardings.

  Attributes:
    params: The model's parameters.
    optimizer: What the optimizer of the run keeps, a tree of its own making.
    step: Number of steps made.
    position: Number of the next batch, which counts the steps made and the
      batches left out.
    skipped: Number of steps that changed neither parameters nor optimizer,
      because the loss or the gradient was not finite.
  """

  params: Params
  optimizer: optax.OptState
  step: Any
  position: Any
  skipped: Any


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """The keys of a run's initial parameters and of its dropout."""
  init_key, dropout_key = jax.random.split(jax.random.key(seed))
  return init_key, dropout_key


def start(params: Params, cfg: OptimConfig) -> TrainState:
  """The state before the first step."""
  return TrainState(
    params=params,
    optimizer=optim.init(cfg, params),
    step=jnp.int32(0),
    position=jnp.int32(0),
    skipped=jnp.int32(0),
  )


def shardings(
  definition: Definition, mesh: Mesh, cfg: OptimConfig
) -> TrainState:
  """Where a state lies.

  What the optimizer keeps of a parameter, in its shape and under its path, lies
  as the parameter; all else is everywhere.
  """
  shapes = _shapes(definition, cfg)
  params = sharding.shardings(mesh, definition.axes(), shapes.params)
  places = {
    path: (shape.shape, place)
    for (path, place), shape in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(shapes.params),
      strict=True,
    )
  }
  everywhere = sharding.replicated(mesh)

  def place(path, leaf):
    ends = (path[start:] for start in range(len(path)))
    shape, found = next(
      (places[end] for end in ends if end in places), _NOWHERE
    )
    return found if shape == leaf.shape else everywhere

  return TrainState(
    params=params,
    optimizer=jax.tree_util.tree_map_with_path(place, shapes.optimizer),
    step=everywhere,
    position=everywhere,
    skipped=everywhere,
  )


_NOWHERE = (None, None)


def _shapes(definition: Definition, cfg: OptimConfig) -> TrainState:
  return jax.eval_shape(
    functools.partial(start, cfg=cfg), definition.abstract()
  )


def abstract(
  definition: Definition, mesh: Mesh, cfg: OptimConfig
) -> TrainState:
  """Shape, dtype and sharding of every array of a state."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    _shapes(definition, cfg),
    shardings(definition, mesh, cfg),
  )


def init(
  definition: Definition, mesh: Mesh, cfg: OptimConfig, *, seed: int
) -> TrainState:
  """The first state, drawn straight into its shardings."""
  create = jax.jit(
    lambda key: start(definition.init(key), cfg),
    out_shardings=shardings(definition, mesh, cfg),
  )
  return create(keys(seed)[0])


def from_params(
  params: Params, definition: Definition, mesh: Mesh, cfg: OptimConfig
) -> TrainState:
  """The first state of a run that begins with given parameters."""
  create = jax.jit(
    functools.partial(start, cfg=cfg),
    out_shardings=shardings(definition, mesh, cfg),
  )
  return create(params)


def to_items(state: TrainState) -> dict[str, Any]:
  """The arrays of a state as checkpoint items.

  The optimizer's are nested dictionaries of the names in their paths, whatever
  types the optimizer made its state of; an optimizer that keeps nothing has no
  item.
  """
  optimizer: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
    *folders, name = _names(path)
    inner = optimizer
    for folder in folders:
      inner = inner.setdefault(folder, {})
    inner[name] = leaf
  items = {"params": state.params}
  return items | {"optimizer": optimizer} if optimizer else items


def from_items(
  items: dict[str, Any],
  like: TrainState,
  *,
  step: int,
  position: int,
  skipped: int,
  mesh: Mesh,
) -> TrainState:
  """The state that restored items and three numbers make.

  Args:
    items: what `to_items` made of a state.
    like: a state with the structure of the optimizer's, such as `abstract`.
    step: steps made.
    position: number of the next batch.
    skipped: steps that changed nothing.
    mesh: of the state.
  """

  def stored(path, _):
    return functools.reduce(
      lambda inner, name: inner[name], _names(path), items["optimizer"]
    )

  return TrainState(
    params=items["params"],
    optimizer=jax.tree_util.tree_map_with_path(stored, like.optimizer),
    step=_everywhere(step, mesh),
    position=_everywhere(position, mesh),
    skipped=_everywhere(skipped, mesh),
  )


def _names(path: Any) -> list[str]:
  return [jax.tree_util.keystr((key,), simple=True) for key in path]


def at_position(state: TrainState, position: int, *, mesh: Mesh) -> TrainState:
  """The state that reads another batch next."""
  return dataclasses.replace(state, position=_everywhere(position, mesh))


def _everywhere(number: int, mesh: Mesh) -> jax.Array:
  return jax.device_put(np.int32(number), sharding.replicated(mesh))
