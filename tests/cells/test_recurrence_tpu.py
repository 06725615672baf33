"""The sLSTM's and the LSTM's TPU kernels: interpreted, refused, compiled.

CI has no TPU. JAX's interpreters run the kernels' logic: the one for any
device in float64, which shows what is computed, and the one for TPUs, which
copies blocks as a TPU does, fills memory with NaNs and finds races.
"""

import functools
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
import types

import compiled
import jax
import jax.numpy as jnp
import mlstm_contract
import numpy as np
import pytest
import test_recurrent_cells as contract
from jax.experimental.pallas import tpu as pltpu

from xlstm_jax import sharding
from xlstm_jax.cells import backends, slstm
from xlstm_jax.cells.backends import Backend
from xlstm_jax.cells.lstm.recurrent import cell as lstm_cell
from xlstm_jax.cells.recurrence import Shapes
from xlstm_jax.cells.recurrence_tpu import backend, blocks, kernels
from xlstm_jax.cells.slstm.recurrent import cell as slstm_cell
from xlstm_jax.errors import UserError

FUNCTIONS = {"slstm": slstm_cell, "lstm": lstm_cell}
# On two cores, which share nothing but what a race would show.
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
# Blocks of 8 of the contract's 21 steps; its two heads in two programs.
SMALL = blocks.Blocks(H=1, B=8, T=8)


@pytest.fixture
def interpreted(monkeypatch):
  """Makes the kernels a backend of that name, after those that are there."""
  monkeypatch.setattr(blocks, "choose", lambda shapes, chip: SMALL)

  def install(name: str, interpret):
    for cell, function in FUNCTIONS.items():
      form = functools.partial(
        backend.pallas_tpu, function, interpret=interpret
      )
      rows = contract.CELLS[cell][0].BACKENDS.backends
      monkeypatch.setitem(rows, name, Backend(name, form))
    return name

  yield install
  contract.program.cache_clear()


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_all_gates_in_float64(cell, interpreted):
  name = interpreted("exact", True)
  for gate in contract.GATES:
    shares = contract.float64_shares(
      cell, gate, contract.TIME, form=contract.Form(name)
    )
    mlstm_contract.check(shares)


# To interpret a program as a TPU would run it takes 6 s, and every case 1 or 2.
TPU_CASES = [
  ("slstm", "bfloat16", "mixed=100"),
  *(
    pytest.param(cell, dtype, gates, marks=pytest.mark.slow)
    for cell, dtype, gates in (
      ("slstm", "bfloat16", "normal i=100 forget few=15"),
      ("slstm", "float32", "normal mixed=100 i=-100"),
      ("lstm", "bfloat16", "normal mixed=100 f=-100"),
      ("lstm", "float32", "normal"),
    )
  ),
]


@pytest.mark.parametrize(("cell", "dtype", "gates"), TPU_CASES)
def test_as_on_a_tpu_without_races(cell, dtype, gates, interpreted):
  name = interpreted("races", RACES)
  for gate in gates.split():
    shares = contract.rounded_shares(
      cell, gate, contract.TIME, dtype=dtype, form=contract.Form(name)
    )
    mlstm_contract.check(shares)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 8, 300])
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_other_lengths(cell, time, interpreted):
  name = interpreted("exact", True)
  for gate in ("normal", "mixed=100"):
    shares = contract.float64_shares(cell, gate, time, form=contract.Form(name))
    mlstm_contract.check(shares)


def documents_leak(monkeypatch):
  """Units go on from one document to the next."""
  monkeypatch.setattr(kernels, "_fresh", lambda flags, units: units)


def blocks_start_anew(monkeypatch):
  """Every block of time starts from the first units."""
  monkeypatch.setattr(
    kernels.pl, "when", lambda condition: lambda function: function()
  )


def no_way_back_through_the_matrix(monkeypatch):
  def product(x, y, contracted, product=kernels._product):
    z = product(x, y, contracted)
    return 0 * z if contracted == (1, 1) else z

  monkeypatch.setattr(kernels, "_product", product)


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault",
  [documents_leak, blocks_start_anew, no_way_back_through_the_matrix],
)
def test_faults_are_found(fault, interpreted, monkeypatch):
  name = interpreted("exact", True)
  fault(monkeypatch)
  with pytest.raises(AssertionError):
    mlstm_contract.check(
      contract.float64_shares(
        "lstm", "normal", contract.TIME, form=contract.Form(name)
      )
    )


@pytest.mark.slow
def test_blocks_that_run_out_of_order_are_a_race(interpreted, monkeypatch):
  """Time on several cores, as if blocks did not wait for each other."""

  def unordered(static, options=kernels._options):
    found = options(static)
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    return found | {"compiler_params": parallel}

  name = interpreted("races", RACES)
  monkeypatch.setattr(kernels, "_options", unordered)
  # The cores have nothing but time to share.
  together = SMALL._replace(H=2)
  monkeypatch.setattr(blocks, "choose", lambda shapes, chip: together)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
    contract.rounded_shares(
      "lstm", "normal", contract.TIME, dtype="float32", form=contract.Form(name)
    )
  pltpu.reset_tpu_interpret_mode_state()


def example(cell: str):
  """Arguments in float32, and what else of a case the tests need."""
  c = contract.case(cell, "normal")
  x, R, b, dy = (jnp.float32(a) for a in (c.x, c.R, c.b, c.dy))
  return x, R, b, jnp.asarray(mlstm_contract.segments(contract.TIME)), dy


def values_and_gradients(cell: str, backend: str):
  def run(x, R, b, segments, dy):
    def y(x, R, b):
      return contract.CELLS[cell][1](
        x, R, b, segments_BT=segments, backend=backend
      )[0]

    found, back = jax.vjp(y, x, R, b)
    return found, *back(dy)

  return run


def assert_alike(actual, expected):
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_on_a_mesh(interpreted):
  """Rows on two devices, matrices on both, as mixers run the cells."""
  name = interpreted("exact", True)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:2])
  x, R, b, segments, dy = example("slstm")
  rows = ("batch", None, None, None, None)

  def both(backend):
    def cell(x, R, b, segments):
      y, _ = slstm.slstm(x, R, b, segments_BT=segments, backend=backend)
      return y

    def y(x, R, b):
      return sharding.on_mesh(
        cell,
        *(x, R, b, segments),
        axes=(rows, (None,) * 4, (None,) * 3, rows[:2]),
        out_axes=rows[:4],
      )

    found, back = jax.vjp(y, x, R, b)
    return found, *back(dy)

  with jax.set_mesh(mesh):
    results = [
      compiled.jit(functools.partial(both, backend))()
      for backend in (name, "recurrent")
    ]
  assert_alike(*results)


@pytest.mark.slow
def test_under_vmap_and_remat(interpreted):
  name = interpreted("exact", True)
  x, *args = example("lstm")

  def both(backend):
    run = jax.checkpoint(values_and_gradients("lstm", backend))
    axes = (0, *[None] * len(args))
    return compiled.jit(jax.vmap(run, in_axes=axes))(
      jnp.stack([x, 2 * x]), *args
    )

  assert_alike(both(name), both("recurrent"))


def device(kind: str, platform: str = "tpu"):
  return types.SimpleNamespace(platform=platform, device_kind=kind)


SHAPES = Shapes(32, 2048, 4, 192, "float32", "bfloat16")


@pytest.mark.parametrize(
  ("at", "changes", "reason"),
  [
    (device("cpu", "cpu"), {}, "it needs a TPU, and the device is cpu"),
    (device("TPU v4"), {}, "known to compile for .*, and the device is TPU v4"),
    (device("TPU7x"), {"dtype": "float64"}, "inputs of float64 are neither"),
    (
      device("TPU7x"),
      {"matrix_dtype": "float16"},
      "matrices of float16 are neither",
    ),
    (
      device("TPU7x"),
      {"D": 2048},
      "of 2048 units take 32 MiB of VMEM, of which TPU7x has 64 for everything",
    ),
  ],
)
def test_what_the_kernels_do_not_take(at, changes, reason):
  found = backend.why_not(at, SHAPES._replace(**changes))
  assert found is not None
  assert re.search(reason, found)


def test_a_machine_without_a_tpu_is_refused_with_the_reason():
  x, R, b, *_ = example("lstm")
  for cell in FUNCTIONS:
    with pytest.raises(UserError, match=r"needs a TPU, and the device is cpu"):
      contract.CELLS[cell][1](x, R, b, backend="pallas_tpu")


@pytest.mark.parametrize("kind", blocks.CHIPS)
def test_blocks_of_the_named_heads_fit(kind):
  chip = blocks.CHIPS[kind]
  heads = (64, 128, 192, 256, 384, 512, 1024)
  for units, rows in itertools.product(heads, (1, 8, 32, 64, 200)):
    shapes = SHAPES._replace(B=rows, D=units)
    assert backend.why_not(device(kind), shapes) is None
    found = blocks.choose(shapes, chip)
    assert found is not None
    assert max(blocks.taken(shapes, found)) <= 0.75 * chip.vmem
    assert shapes.H % found.H == 0
    # No core waits while another computes.
    programs = shapes.H // found.H * -(-rows // found.B)
    assert programs >= chip.cores


def test_auto_takes_the_kernels_on_tpus_for_rows_of_some_tokens(monkeypatch):
  monkeypatch.setattr(backends, "this_device", lambda: device("TPU v5 lite"))
  for cell in FUNCTIONS:
    registry = contract.CELLS[cell][0].BACKENDS
    assert registry.choose("auto", SHAPES).name == "pallas_tpu"
    short = SHAPES._replace(T=7)
    assert registry.choose("auto", short).name == "recurrent"
    assert registry.passed_over(short) == {
      "pallas_tpu": "7 tokens are too few for it"
    }


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="compiling for a TPU needs the wheel libtpu",
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_kernels_compile_for_tpus_without_one(chip):
  """compile_recurrence_tpu.py has more of them, and takes longer."""
  script = pathlib.Path(__file__).parent / "compile_recurrence_tpu.py"
  done = subprocess.run(
    [sys.executable, script, chip, "192,8,mesh", "512,64,lstm", "1024,1"],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "",
      "JAX_ENABLE_COMPILATION_CACHE": "false",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:]
  assert done.stdout.count("compiled") == 3
