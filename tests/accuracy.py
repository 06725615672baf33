"""The worst error of every family of tests as a share of its bound.

    PYTHONPATH=.:tests:tests/cells:tests/models:tests/interop \
      JAX_PLATFORMS=cpu python -m accuracy

prints the table of docs/numerics.md, by the tests' own measurements, on the
full goldens where they lie beside the repository.
"""

import collections
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import conftest  # noqa: F401  (eight devices)
import golden
import jax
import mlstm_contract
import test_decoding
import test_hf
import test_parity
import test_recurrent_cells
from mlstm_contract import GATES

# The family, what of it, the share of the bound, and where that is.
Row = tuple[str, str, float, str]

LENGTHS = (67, 301)
PARTS = {
  "h": "outputs",
  "y": "outputs",
  "C": "last state",
  "n": "last state",
  "m": "last state",
}


def cells() -> Iterator[Row]:
  for form in mlstm_contract.FORMS_HERE:
    # The definition's own bound is one of short sequences.
    definition = form == mlstm_contract.TRUTH
    for time in LENGTHS[:1] if definition else LENGTHS:
      for gate in GATES:
        where = f"{form}, {gate}, T={time}"
        for dtype in form.dtypes:
          shares = (
            mlstm_contract.float64_shares(form, gate, time)
            if dtype == "float64"
            else mlstm_contract.rounded_shares(form, gate, time, dtype=dtype)
          )
          yield from rows(f"mLSTM {dtype}", shares, where)
  for cell in test_recurrent_cells.CELLS:
    for time in LENGTHS:
      for gate in GATES:
        for dtype, measure in test_recurrent_cells.SHARES.items():
          shares = measure(cell, gate, time)
          yield from rows(f"{cell} {dtype}", shares, f"{gate}, T={time}")


def rows(family: str, shares: dict[str, float], where: str) -> Iterator[Row]:
  for name, share in shares.items():
    part = "last state" if name.startswith("last") else "gradients"
    yield family, PARTS.get(name, part), share, f"{name}: {where}"


def models() -> Iterator[Row]:
  for name in golden.model_names():
    for check, errors in test_parity.CHECKS.items():
      for what, error, bound in errors(name):
        if what == "leak":  # theirs, which the error is to be
          continue
        family = golden.model(name).family
        where = f"{name}: {error:.1e} of {bound:.1e}, {what}"
        yield f"model {family}", check, error / bound, where


def decoding() -> Iterator[Row]:
  for name in test_decoding.PUBLISHED:
    for cuts in test_decoding.CUTS:
      with jax.enable_x64(True):
        pairs = test_decoding.chunked_prefill(name, cuts)
      for ours, theirs in zip(*map(jax.tree.leaves, pairs), strict=True):
        error = test_parity.distance(ours, theirs)
        where = f"{error:.1e} of 1e-11, cut at {cuts}"
        yield f"decoding, {name}", "chunked prefill", error / 1e-11, where


def round_trips() -> Iterator[Row]:
  for parameter in test_hf.FOLDERS:
    (folder,) = parameter.values
    with tempfile.TemporaryDirectory() as target:
      test_hf.test_round_trip_is_bit_exact(Path(target), folder)
    yield "Hugging Face", "round trip", 0.0, "every bit of every folder"


def table(measured: Iterable[Row]) -> str:
  worst = collections.defaultdict(lambda: (-1.0, ""))
  for family, what, share, where in measured:
    worst[family, what] = max(worst[family, what], (share, where))
  lines = [
    "| family | what | worst error / bound | where |",
    "|---|---|---|---|",
  ]
  for (family, what), (share, where) in worst.items():
    lines.append(f"| {family} | {what} | {share:.2g} | {where} |")
  return "\n".join(lines)


if __name__ == "__main__":
  for part in (models, decoding, round_trips, cells):
    print(table(part()), flush=True)
