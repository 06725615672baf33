"""Prepares, trains, evaluates and samples: what `make quickstart` runs.

    python scripts/quickstart.py --workdir=runs/quickstart

Every step is a command that is printed before it runs and can be run by hand.
The same command again continues where it stopped; what is done stays.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xlstm_jax import paths
from xlstm_jax.metrics import duration

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments" / "quickstart.py"
HELDOUT_FRACTION = 0.02
PROMPT = "class "


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the steps and returns the exit status of the first that fails."""
  parser = argparse.ArgumentParser(
    description="Prepares, trains, evaluates and samples a small xLSTM."
  )
  parser.add_argument(
    "--workdir",
    type=paths.argument(paths.new_folder),
    default="runs/quickstart",
    metavar="DIR",
    help="folder of the data and of the run (default: %(default)s)",
  )
  parser.add_argument(
    "overrides",
    nargs="*",
    metavar="--config.KEY=VALUE",
    help="other settings of the experiment, behind a --",
  )
  options = parser.parse_args(arguments)
  # Ctrl-C reaches the running step too: it decides what to save.
  signal.signal(signal.SIGINT, lambda *_: None)
  started = time.monotonic()
  workdir = Path(options.workdir)
  for step in steps(workdir, options.overrides):
    print(f"\n$ {shlex.join(step)}", flush=True)
    status = subprocess.run(
      [sys.executable, *step[1:]], env=environment(), check=False
    ).returncode
    if status:
      print(f"the step above ended with status {status}", file=sys.stderr)
      return status
  report(workdir, time.monotonic() - started)
  return 0


def steps(workdir: Path, overrides: Sequence[str]) -> list[list[str]]:
  """The commands that are to run, each beginning with "python"."""
  corpus, data = workdir / "corpus.jsonl", workdir / "data"
  prepare = [
    [
      "python",
      str(ROOT / "scripts" / "stdlib_corpus.py"),
      f"--output={corpus}",
    ],
    [
      *("python", "-m", "xlstm_jax.prepare"),
      *(f"--input={corpus}", f"--output={data}", "--tokenizer=byte"),
      f"--heldout-fraction={HELDOUT_FRACTION}",
    ],
  ]
  train = [
    *("python", "-m", "xlstm_jax.train", f"--config={EXPERIMENT}"),
    *(f"--workdir={workdir}", f"--config.data.paths={data}", *overrides),
  ]
  evaluate = [
    *("python", "-m", "xlstm_jax.evaluate", f"--workdir={workdir}"),
    *("--ngrams", f"--json={workdir / 'heldout.json'}"),
  ]
  generate = [
    *("python", "-m", "xlstm_jax.generate", f"--workdir={workdir}"),
    *(f"--prompt={PROMPT}", "--temperature=0.7", "--max-tokens=400"),
  ]
  plot = ["python", str(ROOT / "scripts" / "plot_loss.py")]
  prepared = (data / "manifest.json").exists()
  return [
    *([] if prepared else prepare),
    *(train, evaluate, generate, [*plot, f"--workdir={workdir}"]),
  ]


def environment() -> dict[str, str]:
  """That of this process, in which the package is found from anywhere."""
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def report(workdir: Path, seconds: float) -> None:
  """Says what was reached and where everything is."""
  scores = json.loads((workdir / "heldout.json").read_text())
  (scored,) = scores["data"].values()
  total = scored["total"]
  bigram = total["bits_per_byte_of"]["bigram"]
  print(f"""
held out         {total["bits_per_byte"]:.3f} bits per byte, {
    bigram - total["bits_per_byte"]:.3f} below the bigram model's {bigram:.3f}
loss curve       {workdir / "loss.png"}
TensorBoard logs {workdir / "tensorboard"}
checkpoints      {workdir / "checkpoints"}
done in          {duration(seconds)}; docs/tutorial.md continues from here""")


if __name__ == "__main__":
  sys.exit(main())
