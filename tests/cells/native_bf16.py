"""How much the native forms lose in bfloat16, against float64.

    PYTHONPATH=.:tests:tests/cells python -m native_bf16

writes the golden tests/goldens/native_bf16.json: it changes only with what
the native forms compute, and kernels are measured against them.
"""

import json
import pathlib

import mlstm_contract
import numpy as np
import test_recurrent_cells

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "native_bf16.json"
GATES = ("normal", "init", "init0", "mixed=50", "first=12")


def measure() -> dict[str, dict[str, float]]:
  """Relative errors of all results and gradients, by cell and gates."""
  losses = {}
  for gate in GATES:
    for chunk in (16, 64):
      form = mlstm_contract.Form("chunkwise", chunk)
      case = mlstm_contract.case(gate, 200, (64, 64))
      losses[f"mlstm {form} {gate}"] = relative(
        mlstm_contract.run(form, case, "bfloat16"),
        mlstm_contract.run(mlstm_contract.TRUTH, case, "float64"),
      )
  for cell in test_recurrent_cells.CELLS:
    case = test_recurrent_cells.case(cell, "normal")
    losses[f"{cell} normal"] = relative(
      test_recurrent_cells.run(cell, "ours", case, "bfloat16"),
      test_recurrent_cells.run(cell, "textbook", case, "float64"),
    )
  return losses


def relative(results, truth) -> dict[str, float]:
  return {
    name: float(f"{np.linalg.norm(x - truth[name]) / norm:.3g}")
    for name, x in sorted(results.items())
    if name != "dm_alone"  # the truth is all but 0
    for norm in [np.linalg.norm(truth[name])]
  }


if __name__ == "__main__":
  GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n")
