"""Plots the training and held-out loss of a run.

python scripts/plot_loss.py --workdir=DIR [--output=FILE.png]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from xlstm_jax import metrics, paths
from xlstm_jax.errors import UserError, exit_code

# Works without a screen.
matplotlib.use("Agg")

from matplotlib import pyplot


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    description="Plots the training and held-out loss of a run."
  )
  parser.add_argument(
    "--workdir",
    type=paths.argument(paths.reachable),
    required=True,
    metavar="DIR",
  )
  parser.add_argument(
    "--output",
    type=paths.argument(paths.new_file),
    metavar="FILE.png",
    help="default: DIR/loss.png",
  )
  options = parser.parse_args(arguments)
  workdir = Path(options.workdir)
  output = Path(options.output or workdir / "loss.png")
  if not (workdir / "metrics.jsonl").exists():
    raise UserError(f"{workdir} has no metrics.jsonl: nothing was trained.")
  plot(metrics.read(workdir), output, title=str(workdir))
  print(output)
  return 0


def plot(records: Sequence[dict[str, Any]], output: Path, *, title: str):
  """Writes the losses of `metrics.jsonl` as a picture."""
  figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
  axes.plot(*curve(records, "loss"), color="tab:blue", label="training")
  axes.plot(
    *curve(records, "eval_loss"),
    color="tab:red",
    marker="o",
    label="held out",
  )
  axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(output, dpi=120)
  pyplot.close(figure)


def curve(
  records: Sequence[dict[str, Any]], name: str
) -> tuple[list[int], list[float]]:
  """Steps and values of the records that have a number under `name`."""
  found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
  return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
  sys.exit(exit_code(main))
