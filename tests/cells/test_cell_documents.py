"""Segment ids as the cells read them."""

import jax.numpy as jnp
import numpy as np

from xlstm_jax.cells.documents import documents


def test_segments():
  segments = jnp.array(
    [[1, 1, 2, 0], [3, 3, 3, 3], [4, 5, 6, 6], [0, 0, 0, 0]], jnp.int32
  )
  read = documents(segments, jnp.array([0, 3, 3, 2], jnp.int32), 4)
  np.testing.assert_array_equal(
    read.id_BT, [[1, 1, 2, 2], [3, 3, 3, 3], [4, 5, 6, 6], [2, 2, 2, 2]]
  )
  np.testing.assert_array_equal(read.real_BT, segments != 0)
  np.testing.assert_array_equal(
    read.start_BT, [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(read.last_B, [2, 3, 6, 2])


def test_no_segments():
  read = documents(None, jnp.array([0, 3], jnp.int32), 2)
  assert np.all(read.real_BT)
  assert not np.any(read.start_BT)
  np.testing.assert_array_equal(read.id_BT, [[0, 0], [3, 3]])
  np.testing.assert_array_equal(read.last_B, [1, 3])
