"""The sLSTM's and the LSTM's TPU kernels: interpreted, refused, compiled.

CI has no TPU. JAX's interpreters run the kernels' logic: the one for any
device in float64, which shows what is computed, and the one for TPUs, which
copies blocks as a TPU does, fills memory with NaNs and finds races.
"""

import functools
import importlib.util
import os
import pathlib
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
from jax.sharding import AxisType, PartitionSpec

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
    shares = contract.float64_shares(cell, gate, contract.TIME, backend=name)
    mlstm_contract.check(shares)


# It takes a second and more to interpret a case as a TPU would run it.
TPU_CASES = [
  ("slstm", "bfloat16", "mixed=100"),
  ("lstm", "bfloat16", "normal"),
  *(
    pytest.param(cell, dtype, gates, marks=pytest.mark.slow)
    for cell, dtype, gates in (
      ("slstm", "bfloat16", "normal i=100 forget few=15"),
      ("slstm", "float32", "normal mixed=100 i=-100"),
      ("lstm", "bfloat16", "mixed=100 f=-100"),
      ("lstm", "float32", "normal"),
    )
  ),
]


@pytest.mark.parametrize(("cell", "dtype", "gates"), TPU_CASES)
def test_as_on_a_tpu_without_races(cell, dtype, gates, interpreted):
  name = interpreted("races", RACES)
  for gate in gates.split():
    shares = contract.rounded_shares(
      cell, gate, contract.TIME, dtype=dtype, backend=name
    )
    mlstm_contract.check(shares)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 8, 300])
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_other_lengths(cell, time, interpreted):
  name = interpreted("exact", True)
  for gate in ("normal", "mixed=100"):
    shares = contract.float64_shares(cell, gate, time, backend=name)
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
      contract.float64_shares("lstm", "normal", contract.TIME, backend=name)
    )
