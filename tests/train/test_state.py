"""Where a state lies, and that it returns from its items."""

import jax
import numpy as np
from fake_model import FakeDefinition

from xlstm_jax import sharding
from xlstm_jax.optim import OptimConfig
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import state as states

DEFINITION = FakeDefinition()
ADAMW = OptimConfig()


def test_moments_lie_as_their_parameters_and_numbers_everywhere():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  state = states.init(DEFINITION, mesh, ADAMW, seed=0)
  where = jax.tree.map(lambda x: x.sharding, state)
  assert where.optimizer.mu == where.optimizer.nu == where.params
  assert where == states.shardings(DEFINITION, mesh, ADAMW)
  assert (
    where.step
    == where.optimizer.count
    == where.skipped
    == sharding.replicated(mesh)
  )
  assert where.params["head"]["weight"] == jax.NamedSharding(
    mesh, jax.P(("tensor",), ("fsdp",))
  )


def test_the_mesh_does_not_change_what_is_drawn():
  whole = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  split = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  a, b = (
    states.init(DEFINITION, mesh, ADAMW, seed=3) for mesh in (whole, split)
  )
  jax.tree.map(np.testing.assert_array_equal, a, b)
  other = states.init(DEFINITION, whole, ADAMW, seed=4)
  assert (other.params["head"]["weight"] != a.params["head"]["weight"]).all()


def test_dropout_and_parameters_are_drawn_from_different_keys():
  init_key, dropout_key = map(jax.random.key_data, states.keys(0))
  assert (init_key != dropout_key).any()


def test_a_state_returns_from_its_items():
  mesh = sharding.make_mesh(MeshConfig())
  state = states.init(DEFINITION, mesh, ADAMW, seed=0)
  back = states.from_items(
    states.to_items(state), state, step=5, position=7, skipped=2, mesh=mesh
  )
  assert (int(back.step), int(back.position), int(back.skipped)) == (5, 7, 2)
  jax.tree.map(np.testing.assert_array_equal, back.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, back.optimizer, state.optimizer)


def test_the_abstract_state_is_that_of_the_real_one():
  mesh = sharding.make_mesh(MeshConfig(fsdp=8, data=1))
  real = jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding),
    states.init(DEFINITION, mesh, ADAMW, seed=0),
  )
  abstract = states.abstract(DEFINITION, mesh, ADAMW)
  assert real == jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding), abstract
  )


def test_given_parameters_start_with_fresh_moments():
  mesh = sharding.make_mesh(MeshConfig())
  params = states.init(DEFINITION, mesh, ADAMW, seed=0).params
  state = states.from_params(params, DEFINITION, mesh, ADAMW)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  assert not any(x.any() for x in jax.tree.leaves(state.optimizer))
  assert int(state.step) == int(state.position) == 0
