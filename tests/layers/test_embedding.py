"""Lookup of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.embedding import Embedding


def test_the_gradient_of_a_frequent_token_is_summed_in_the_weights_type():
  compute = Compute(dtype="bfloat16", param_dtype="float32")
  table = Embedding(4, 8, compute=compute, rngs=nnx.Rngs(0))
  definition, params = nnx.split(table)
  tokens_BT = jnp.zeros((2, 1024), jnp.int32).at[1, :3].set(2)

  def total(params):
    rows_BTD = nnx.merge(definition, params)(tokens_BT)
    assert rows_BTD.dtype == jnp.bfloat16
    return jnp.sum(rows_BTD, dtype=jnp.float32)

  found = jax.jit(jax.grad(total))(params)["weight"][...]
  # In bfloat16 a sum of ones ends at 256.
  expected = np.array([[2045], [0], [3], [0]])
  np.testing.assert_array_equal(found, np.broadcast_to(expected, (4, 8)))
