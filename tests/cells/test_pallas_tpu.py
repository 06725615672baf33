"""The TPU kernels: their logic, what they refuse, and that they compile.

CI has no TPU. What runs here is the kernels in TPU interpret mode, which looks
for races and fills memory that was not written with NaN, and the real compiler,
libtpu, which needs no TPU.
"""

import dataclasses
import functools

import jax.numpy as jnp
import mlstm_contract as contract
import pytest
from jax.experimental.pallas import tpu as pltpu

from xlstm_jax.cells.mlstm import backends
from xlstm_jax.cells.mlstm.tpu import backend, kernels

INTERPRET = pltpu.InterpretParams(detect_races=True, random_seed=0)


@pytest.fixture
def install(monkeypatch):
  """Makes the kernels a backend of this name that runs here, interpreted."""

  def install(name: str = "pallas_tpu"):
    rows = backends.BACKENDS.backends
    row = dataclasses.replace(
      rows["pallas_tpu"],
      name=name,
      run=functools.partial(backend.pallas_tpu, interpret=INTERPRET),
      why_not=lambda device, shapes: None,
    )
    monkeypatch.setitem(rows, name, row)
    monkeypatch.setitem(contract.REFUSALS, name, lambda: None)

  yield install
  pltpu.reset_tpu_interpret_mode_state()


def form(chunk: int, dims: tuple[int, int], backend: str = "pallas_tpu"):
  return contract.Form(backend, chunk, dtypes=("bfloat16",), dims=dims)


# Chunks of 32 tokens are none of the backend's, but the kernels know no
# difference: of 67 tokens three chunks are left, with documents that begin and
# end in each. Heads of 8 x 12 are padded, as are the last 29 tokens.
QUICK = ("normal", "init", "forget", "mixed=100", "first=12")


def test_interpreted_kernels_hold_the_contract(install):
  install()
  for gate in QUICK:
    contract.check_rounded(form(32, contract.DIMS), gate, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("chunk", "time", "dims", "options", "gates"),
  [
    (32, 67, contract.DIMS, "", contract.GATES),
    (32, 67, contract.DIMS, "sigmoid", ("normal", "capped", "forget")),
    (32, 67, contract.DIMS, "sigmoid plain", ("normal", "mixed=50")),
    (32, 67, contract.DIMS, "plain", ("normal", "init", "capped")),
    (32, 67, contract.DIMS, "eps0", ("normal", "first=15")),
    (32, 1, contract.DIMS, "", ("normal",)),
    (128, 200, (64, 128), "", ("normal", "i=-100", "first=8", "few=15")),
    (256, 301, (96, 192), "", ("normal",)),
  ],
)
def test_all_of_the_contract(chunk, time, dims, options, gates, install):
  install()
  options = contract.Options(
    input_gate="sigmoid" if "sigmoid" in options else "exp",
    normalize="plain" not in options,
    eps=0.0 if "eps0" in options else 1e-6,
  )
  for gate in gates:
    contract.check_rounded(
      form(chunk, dims), gate, time, options, dtype="bfloat16"
    )


def leak(monkeypatch):
  """Tokens of a chunk see documents before their own."""

  def weights(gates, reader, rest, first, weights=kernels._weights):
    return weights(gates, reader, rest, jnp.zeros_like(first))

  monkeypatch.setattr(kernels, "_weights", weights)


def constant_normaliser(monkeypatch):
  """The normaliser counts as a constant, as in other kernels."""

  def slopes(*args, slopes=kernels._slopes):
    sign, share = slopes(*args)
    return jnp.zeros_like(sign), share

  monkeypatch.setattr(kernels, "_slopes", slopes)


def one_part(monkeypatch):
  """C is rounded to 8 bits where few tokens rule it, too, and n is not."""

  def parts(*args, parts=backend.parts_of_states):
    return jnp.ones_like(parts(*args))

  monkeypatch.setattr(backend, "parts_of_states", parts)


def chunks_in_any_order(monkeypatch):
  """The compiler may run the chunks of a row side by side."""
  monkeypatch.setattr(kernels, "_SEQUENTIAL", ("parallel",) * 3)


@pytest.mark.parametrize(
  ("fault", "gate", "quick"),
  [
    (leak, "normal", False),
    (constant_normaliser, "normal", True),
    (one_part, "first=12", False),
    (chunks_in_any_order, "normal", False),
  ],
)
def test_faults_of_the_kernels_are_found(
  fault, gate, quick, install, monkeypatch
):
  del quick
  fault(monkeypatch)
  install(fault.__name__)
  with pytest.raises(AssertionError):
    contract.check_rounded(
      form(32, contract.DIMS, fault.__name__), gate, dtype="bfloat16"
    )
