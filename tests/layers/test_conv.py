"""The convolution over several devices' time, and its halo, by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import sharding
from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.conv import CausalConv, ConvState

B, T, U = 4, 16, 6
# Padding over whole devices and from inside one, a row of padding alone, and
# documents that end in and at the end of a device's stretch of 4 tokens.
SEGMENTS_BT = np.array(
  [
    [1] * 4 + [2] * 3 + [3] * 9,
    [2] * 5 + [0] * 11,
    [0] * 16,
    [1] * 2 + [2] * 1 + [3] * 11 + [0] * 2,
  ],
  np.int32,
)


def plain(x_BTU, weight_WU, bias_U, segments_BT, state: ConvState):
  """Outputs of the real tokens, and the last inputs: one by one."""
  y_BTU, rows = np.zeros_like(x_BTU), []
  for b in range(B):
    inputs = list(zip(state.segments_BW[b], state.inputs_BWU[b], strict=True))
    for t in range(T):
      if segments_BT[b, t]:
        inputs.append((segments_BT[b, t], x_BTU[b, t]))
        y_BTU[b, t] = bias_U + sum(
          w * x
          for w, (segment, x) in zip(
            weight_WU, inputs[-len(weight_WU) :], strict=True
          )
          if segment == segments_BT[b, t]
        )
    rows.append(inputs[len(inputs) - len(weight_WU) + 1 :])
  last = ConvState(
    np.array([[x for _, x in row] for row in rows]),
    np.array([[segment for segment, _ in row] for row in rows]),
  )
  return y_BTU, last


def inputs(window: int):
  rng = np.random.default_rng(0)
  state = ConvState(
    rng.normal(size=(B, window - 1, U)),
    np.sort(rng.integers(0, 2, (B, window - 1)), axis=1).astype(np.int32),
  )
  weight_WU, bias_U = rng.normal(size=(window, U)), rng.normal(size=U)
  return rng.normal(size=(B, T, U)), weight_WU, bias_U, state


@functools.cache
def conv(window: int):
  compute = Compute("float64", "float64")
  return nnx.split(CausalConv(window, U, compute=compute, rngs=nnx.Rngs(0)))[0]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("window", [4, 2])
def test_every_split_of_time_is_the_plain_sum(devices, segments, window):
  cfg = sharding.MeshConfig(data=1, sequence=devices)
  with jax.enable_x64(True):
    mesh = sharding.make_mesh(cfg, jax.devices()[:devices])
    x_BTU, weight_WU, bias_U, state = inputs(window)
    with jax.set_mesh(mesh):
      graph = conv(window)
      params = {"weight": weight_WU, "bias": bias_U}

      @jax.jit
      def run(params, x_BTU, segments_BT, state):
        params = jax.tree.map(jnp.asarray, params)
        module = nnx.merge(graph, params)
        return module(x_BTU, segments_BT=segments_BT, state=state)

      segments_BT = SEGMENTS_BT if segments else None
      y_BTU, last = run(params, x_BTU, segments_BT, state)
  if segments_BT is None:
    ids_B1 = np.maximum(state.segments_BW[:, -1:], 1)
    segments_BT = np.broadcast_to(ids_B1, (B, T))
  expected_BTU, expected = plain(x_BTU, weight_WU, bias_U, segments_BT, state)
  y_BTU = np.where(segments_BT[..., None] > 0, y_BTU, 0)
  np.testing.assert_allclose(y_BTU, expected_BTU, atol=1e-12)
  np.testing.assert_allclose(last.inputs_BWU, expected.inputs_BWU)
  np.testing.assert_array_equal(last.segments_BW, expected.segments_BW)


def test_a_stretch_shorter_than_the_window_is_refused():
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=8))
  conv = CausalConv(4, U, compute=Compute("float32"), rngs=nnx.Rngs(0))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="2 tokens of a"):
    conv(jnp.zeros((B, T, U)))
