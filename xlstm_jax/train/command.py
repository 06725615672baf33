"""The command line of training."""

import argparse
import sys
from collections.abc import Sequence

from xlstm_jax import checkpoints, config, paths
from xlstm_jax.runtime import peers, processes
from xlstm_jax.runtime.interrupt import Interrupt
from xlstm_jax.runtime.status import Status
from xlstm_jax.train import loop

DESCRIPTION = """\
Trains the model of an experiment file in a workdir. The same command again
continues from the newest checkpoint; a finished run says so.
"""

EPILOG = """\
every key of the configuration can be overridden:
  --config.optim.peak_lr=1e-3 --config.model.slstm_at=1,3
  --config.eval_tokens=none   (a key that may be empty)

in the workdir:
  config.json     the resolved configuration
  checkpoints/    parameters, optimizer and progress of every kept step
  metrics.jsonl   a record per line
  tensorboard/    the same, for tensorboard --logdir=DIR/tensorboard
  profile/        with --config.profile=FIRST,LAST
  goodput.json    where the wall time went, over all restarts
  rollbacks.json  which data the run leaves out, and why
  lock            held by the run that writes the folder
  hang-N.txt      the stacks of process N where it hung

exit status:
  0   all steps are done
  2   something in the configuration, the data, the workdir or the machine is
      wrong, or its memory too small
  3   the run diverged and went back too often
  4   the run hung, or one of its processes was missing: run again
  75  SIGTERM or SIGINT: run again to continue
  130, 143  a second SIGINT or SIGTERM: stopped at once

example:
  python -m xlstm_jax.train --config=experiments/quickstart.py \\
    --workdir=runs/quickstart --config.steps=200

on two hosts, which share the workdir; the second with --process=1:
  python -m xlstm_jax.train --config=experiments/xlstm_1b.py --workdir=DIR \\
    --coordinator=host0:1234 --processes=2 --process=0
"""


def main(argv: Sequence[str], stopped: Interrupt) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.train",
    usage="%(prog)s --config=FILE.py --workdir=DIR\n"
    "    [--config.KEY=VALUE ...]\n"
    "    [--coordinator=HOST:PORT --processes=N --process=I]",
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE.py",
    help="experiment file; FILE.py:TEXT calls its get_config(TEXT)",
  )
  parser.add_argument(
    "--workdir",
    type=paths.argument(paths.reachable),
    required=True,
    metavar="DIR",
    help="folder of the run",
  )
  processes.add_flags(parser)
  options, overrides = parser.parse_known_args(argv)
  checkpoints.quiet()
  cfg = config.from_experiment(options.config, overrides)
  try:
    processes.join(processes.from_flags(options), cfg.limits)
    status = loop.train(cfg, options.workdir, stopped)
  except peers.Missing as error:
    print(f"error: {error}", file=sys.stderr)
    return Status.HUNG
  processes.leave()
  return status
