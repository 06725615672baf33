"""The recurrent kernels for Hopper GPUs: their parts, and that they compile.

CI has no GPU. What runs here is the pointwise part against the cells'
definitions, the kernels' logic in interpret mode (steps, resets, padding, who
gets what; products are plain arithmetic there) and, where the CUDA wheels are
installed, the real compiler.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells import lstm, slstm
from xlstm_jax.cells.lstm.recurrent import cell as lstm_cell
from xlstm_jax.cells.recurrence import Shapes
from xlstm_jax.cells.recurrence_gpu import backend, blocks, pointwise
from xlstm_jax.cells.recurrence_gpu.batched import batched
from xlstm_jax.cells.slstm.recurrent import cell as slstm_cell
from xlstm_jax.errors import UserError

RUNS = {"slstm": slstm.slstm, "lstm": lstm.lstm}


def slstm_in_two_numbers(gates, memories):
  """The definition with r = c / n and l = log n + m for its state."""
  r, l = memories
  # Any n says the same.
  n = jnp.where(l <= pointwise.NOTHING / 2, 0, 2.0)
  m = jnp.where(n == 0, 0, l - jnp.log(2.0))
  y, c, n, m = slstm_cell(gates, (0 * r, r * n, n, m))
  return y, (c / n, jnp.log(n) + m)


def lstm_as_it_is(gates, memories):
  y, c = lstm_cell(gates, (0 * memories[0], *memories))
  return y, (c,)


CELLS = {
  "slstm": (pointwise.SLSTM, slstm_in_two_numbers),
  "lstm": (pointwise.LSTM, lstm_as_it_is),
}


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("cell", CELLS)
def test_pointwise_parts_are_the_cells(cell, scale):
  """Values and gradients, from an empty past too, in float64."""
  kernel, definition = CELLS[cell]
  rng = np.random.default_rng(0)
  numbers = 1 + len(kernel.empty)
  with jax.enable_x64(True):
    gates = [jnp.asarray(scale * rng.normal(size=(7, 4))) for _ in range(4)]
    memories = [jnp.asarray(rng.normal(size=(7, 4))) for _ in kernel.empty]
    memories = [
      x.at[0].set(empty)
      for x, empty in zip(memories, kernel.empty, strict=True)
    ]
    dh, *dmemories = (
      jnp.asarray(rng.normal(size=(7, 4))) for _ in range(numbers)
    )
    results = kernel.forward(tuple(gates), tuple(memories))
    expected, pullback = jax.vjp(definition, tuple(gates), tuple(memories))
    gradients = kernel.back(
      kernel.local(tuple(gates), tuple(memories)), dh, tuple(dmemories)
    )
    dgates, dbefore = pullback((dh, tuple(dmemories)))
  # An empty memory has no gradient of its own.
  dours, dtheirs = ([x[1:] for x in d] for d in (gradients[1], dbefore))
  pairs = zip(
    jax.tree.leaves((results, gradients[0], dours)),
    jax.tree.leaves((expected, dgates, dtheirs)),
    strict=True,
  )
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("units", blocks.BLOCKS)
def test_tiles_have_every_number_of_the_matrix_once(units):
  cut = blocks.BLOCKS[units]
  assert cut.units == units
  rng = np.random.default_rng(0)
  R = jnp.asarray(rng.normal(size=(4, 2, units, units)), jnp.float32)
  y = rng.normal(size=(2, units)).astype(np.float32)
  dgates = rng.normal(size=(4, 2, units)).astype(np.float32)

  tiles = blocks.forward_tiles(R, cut)
  sums = np.einsum("hswtrd,hd->hswtr", tiles, y).reshape(-1, blocks.TILE)
  gates = np.stack(
    [blocks.forward_gates(jnp.asarray(x[:, None])) for x in sums]
  )
  # Heads, blocks, warpgroups, tiles, gates of a tile, units.
  gates = gates.reshape(2, cut.blocks, cut.warpgroups, 2, 2, blocks.LANES)
  gates = gates.transpose(3, 4, 0, 1, 2, 5).reshape(4, 2, units)
  expected = np.einsum("hd,ghde->ghe", y, R)
  np.testing.assert_allclose(gates, expected, rtol=1e-4, atol=1e-4)

  tiles = blocks.backward_tiles(R, cut)
  shape = (4, 2, cut.blocks, cut.warpgroups, blocks.LANES)
  operand = dgates.reshape(shape).transpose(1, 2, 3, 0, 4)
  operand = operand.reshape(2, cut.blocks, -1)
  dy = np.einsum("hswtrk,hsk->hwtr", tiles, operand).reshape(2, units)
  expected = np.einsum("ghe,ghde->hd", dgates, R)
  np.testing.assert_allclose(dy, expected, rtol=1e-4, atol=1e-4)


def products(x_BH, matrices_H, marks_FB):
  """Of rows and heads, which share marks in groups."""
  groups = jnp.repeat(marks_FB, x_BH.shape[1] // len(marks_FB), axis=0)
  return (x_BH * matrices_H * groups.T,)


@pytest.mark.parametrize("own_matrices", [False, True])
def test_vmap_makes_more_rows_or_more_heads(own_matrices):
  rng = np.random.default_rng(0)
  x, matrices, marks = (
    rng.normal(size=shape) for shape in ((3, 5, 4), (3, 4), (3, 1, 5))
  )
  axes = (0, 0 if own_matrices else None, 0)
  args = (x, matrices if own_matrices else matrices[0], marks)
  (found,) = jax.vmap(batched(products, ("BH", "H", "FB"), ("BH",)), axes)(
    *args
  )
  (expected,) = jax.vmap(products, axes)(*args)
  np.testing.assert_array_equal(found, expected)


def shapes(**changes) -> Shapes:
  usual = Shapes(8, 64, 4, 192, "float32", "bfloat16")
  return usual._replace(**changes)


HOPPER = type("Device", (), {"platform": "gpu", "device_kind": "NVIDIA H200"})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"matrix_dtype": "float32"}, "recurrent matrices are float32"),
    ({"dtype": "float16"}, "inputs in float32 or bfloat16, and .* in float16"),
    ({"D": 80}, "heads of 64, 128, 192, 256, 384, 512 units, .* have 80"),
  ],
)
def test_what_the_kernels_do_not_take(changes, message):
  assert backend.why_not(HOPPER(), shapes()) is None
  assert re.search(message, backend.why_not(HOPPER(), shapes(**changes)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"T": 1}, "one step only"),
    ({"D": 512, "B": 40}, "40 rows of 4 heads of 512 units are more than"),
  ],
)
def test_what_auto_leaves_to_the_scan(changes, message):
  assert backend.why_not_auto(shapes()) is None
  assert backend.why_not_auto(shapes(D=512, B=32)) is None
  assert backend.why_not_auto(shapes(B=256)) is None
  assert message in backend.why_not_auto(shapes(**changes))


def test_kernels_are_lowered_where_numbers_are_wide_by_default(monkeypatch):
  monkeypatch.setattr(backend, "why_not", lambda device, shapes: None)
  forms = slstm.BACKENDS.backends
  row = dataclasses.replace(forms["pallas_gpu"], why_not=backend.why_not)
  monkeypatch.setitem(forms, "pallas_gpu", row)

  def loss(x, R, b):
    return slstm.slstm(x, R, b, backend="pallas_gpu")[0].sum()

  sizes = ((8, 4, 4, 1, 64), "float32"), ((4, 1, 64, 64), "bfloat16")
  arrays = [
    jax.ShapeDtypeStruct(*one) for one in (*sizes, ((4, 1, 64), "float32"))
  ]
  with jax.enable_x64(True):
    lowered = jax.jit(jax.grad(loss)).trace(*arrays)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu") >= 2


@pytest.mark.parametrize("cell", RUNS)
def test_a_machine_without_hopper_is_refused_with_the_reason(cell):
  x = jnp.ones((1, 4, 4, 1, 64))
  R, b = jnp.ones((4, 1, 64, 64), jnp.bfloat16), jnp.ones((4, 1, 64))
  with pytest.raises(UserError, match=r"needs a Hopper GPU .* device is cpu"):
    RUNS[cell](x, R, b, backend="pallas_gpu")


FAULTS = "no_starts no_padding back_without_memories"


@pytest.mark.slow
@pytest.mark.parametrize(
  "case",
  [
    # And the contract finds faults of the kernels.
    f"slstm 64 normal mixed=100 {FAULTS}",
    # Two tiles of R in the backward pass.
    "lstm 128 normal",
  ],
)
def test_interpreted_kernels_hold_the_contract(case):
  script = pathlib.Path(__file__).parent / "interpret_recurrence_gpu.py"
  done = run(script, case, {"NPROC": "16"})
  assert done.returncode == 0, done.stdout[-2000:]


def run(script: pathlib.Path, options: str, environment: dict[str, str]):
  """A program of its own, its errors with its output."""
  paths = [script.parents[1], script.parents[2], *sys.path]
  return subprocess.run(
    [sys.executable, script, *options.split()],
    env=os.environ
    | {
      "PYTHONPATH": os.pathsep.join(map(str, paths)),
      # What is compiled for described devices can be kept but not loaded.
      "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )


needs_nvcc = pytest.mark.skipif(
  importlib.util.find_spec("jax_plugins.xla_cuda13") is None
  if importlib.util.find_spec("jax_plugins")
  else True,
  reason="compiling for a GPU needs the wheels jax-cuda13-plugin and nvcc",
)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
  ("options", "registers", "most"),
  [
    ("slstm 64", 128, 0),
    ("slstm 128", 168, 0),
    ("slstm 192", 208, 0),
    ("slstm 192 mesh", 208, 0),
    ("slstm 256", 248, 0),
    ("slstm 256 bf16 vmap", 248, 0),
    ("slstm 384", 248, 0),
    ("slstm 512", 255, 160),
    ("lstm 256", 248, 0),
    ("lstm 512", 255, 128),
  ],
)
def test_kernels_compile_for_the_h200_without_one(options, registers, most):
  """Registers, and bytes of spills, are those of a thread.

  Blocks of 256 units and fewer share a multiprocessor in pairs, which takes 255
  registers at most.
  """
  script = pathlib.Path(__file__).parent / "compile_recurrence_gpu.py"
  environment = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
  done = run(script, options, environment | {"XLA_FLAGS": ""})
  assert done.returncode == 0, done.stdout[-2000:]
  used = [int(n) for n in re.findall(r"Used (\d+) registers", done.stdout)]
  spills = re.findall(r"(\d+) bytes spill stores, ", done.stdout)
  assert len(used) == 2
  assert max(used) <= registers
  assert max(map(int, spills)) <= most
