"""Prints the file that starts a run on Slurm, GKE or SkyPilot.

python scripts/launch.py slurm --name=NAME ... -- --config=... --workdir=...

The arguments after the -- go to `python -m xlstm_jax.train`. docs/launch.md
describes what the files do.
"""

import argparse
import io
import json
import math
import re
import shlex
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from xlstm_jax.config import LimitsConfig
from xlstm_jax.errors import UserError, exit_code

HERE = Path(__file__).parent
# Where process 0 listens.
PORT = 8476
# Where the volume of all nodes is mounted in a container.
SHARED = "/shared"

EPILOG = """\
examples:
  python scripts/launch.py slurm --name=xlstm-1b --nodes=8 --devices=8 \\
    --time=1-00:00:00 -- --config=experiments/xlstm_1b.py \\
    --config.accumulation=1 --workdir=runs/1b > 1b.sh; sbatch 1b.sh
  python scripts/launch.py gke --name=xlstm-1b --nodes=16 --devices=4 \\
    --accelerator=tpu-v5p-slice --topology=4x4x4 --image=IMAGE \\
    --volume=CLAIM -- --config=experiments/xlstm_1b.py \\
    --config.accumulation=1 --workdir=/shared/1b | kubectl apply -f -
  python scripts/launch.py skypilot --name=xlstm-1b --nodes=2 --devices=8 \\
    --accelerator=H100 --image=IMAGE --volume=VOLUME -- \\
    --config=experiments/xlstm_1b.py --workdir=/shared/1b > 1b.yaml; \\
    sky jobs launch 1b.yaml
"""


class Template(string.Template):
  """Placeholders are %{name}: the dollar belongs to the shell."""

  delimiter = "%"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  words = list(sys.argv[1:] if arguments is None else arguments)
  end = words.index("--") if "--" in words else len(words)
  options = _parser().parse_args(words[:end])
  if isinstance(sys.stdout, io.TextIOWrapper):
    # The output is a file, whatever a terminal could show of it.
    sys.stdout.reconfigure(encoding="utf-8")
  print(render(options, words[end + 1 :]), end="")
  return 0


def render(options: argparse.Namespace, train: Sequence[str]) -> str:
  """The file for an engine.

  Args:
    options: the parsed options.
    train: arguments of the training command.

  Raises:
    UserError: something is missing or does not fit.
  """
  _check(options, train)
  file, values = ENGINES[options.engine]
  common = {
    name: str(getattr(options, name))
    for name in ("name", "nodes", "devices", "retries")
  }
  common["port"] = str(PORT)
  template = Template((HERE / file).read_text())
  return template.substitute(common, **values(options, train))


def _parser() -> argparse.ArgumentParser:
  common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  common.add_argument("--name", required=True, help="name of the job")
  common.add_argument(
    "--nodes",
    type=int,
    default=1,
    metavar="N",
    help="number of nodes (default: %(default)s)",
  )
  common.add_argument(
    "--devices",
    type=int,
    required=True,
    metavar="N",
    help="number of devices of a node",
  )
  common.add_argument(
    "--retries",
    type=int,
    default=3,
    metavar="N",
    help="restarts after a crash or a hang (default: %(default)s); those "
    "after a preemption are not limited",
  )
  parser = argparse.ArgumentParser(
    usage="%(prog)s ENGINE --name=NAME --devices=N ... -- TRAIN ARGUMENTS",
    description="Prints the file that starts a training run on a cluster.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  engines = parser.add_subparsers(
    dest="engine", required=True, metavar="slurm|gke|skypilot", prog="launch.py"
  )

  slurm = engines.add_parser("slurm", parents=[common], allow_abbrev=False)
  slurm.add_argument(
    "--time", required=True, metavar="[D-]H:M:S", help="limit of the job"
  )
  slurm.add_argument("--queue", metavar="PARTITION")
  slurm.add_argument(
    "--python", default="python", help="on the nodes (default: %(default)s)"
  )

  gke = engines.add_parser("gke", parents=[common], allow_abbrev=False)
  skypilot = engines.add_parser(
    "skypilot", parents=[common], allow_abbrev=False
  )
  for engine in (slurm, gke):
    engine.add_argument(
      "--grace",
      type=int,
      default=120,
      metavar="S",
      help="seconds from SIGTERM to SIGKILL (default: %(default)s)",
    )
  for engine, kinds, volume in (
    (gke, "nvidia-h100-80gb or tpu-v5p-slice", "claim"),
    (skypilot, "H100", "volume, or, for one node, URL of a bucket"),
  ):
    engine.add_argument(
      "--accelerator", required=True, metavar="TYPE", help=f"such as {kinds}"
    )
    engine.add_argument(
      "--image", required=True, help="container with what the run imports"
    )
    engine.add_argument(
      "--volume",
      required=True,
      help=f"{volume} that is mounted at {SHARED}; holds workdir and data",
    )
  gke.add_argument("--topology", metavar="AxB[xC]", help="of a TPU slice")
  gke.add_argument("--queue", metavar="NAME", help="local queue of Kueue")
  skypilot.add_argument(
    "--spot", action="store_true", help="on machines that may be taken away"
  )
  return parser


def _check(options: argparse.Namespace, train: Sequence[str]) -> None:
  # Kubernetes allows 63 characters, and adds some of its own.
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
    raise UserError(
      f"--name is {options.name!r}; it must be at most 40 lower-case letters, "
      "digits and dashes, begin with a letter and not end with a dash."
    )
  for name, least in {
    "nodes": 1,
    "devices": 1,
    "grace": 1,
    "retries": 0,
  }.items():
    if (value := getattr(options, name, least)) < least:
      raise UserError(f"--{name} is {value}; it must be at least {least}.")
  for word in [*map(str, vars(options).values()), *train]:
    if not all(c.isprintable() or c in "\n\t" for c in word):
      raise UserError(f"{word!r} holds a character that cannot be printed.")
  parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
  ours = ("--coordinator", "--processes", "--process")
  for flag in ("--config", "--workdir", *ours):
    parser.add_argument(flag)
  parser.add_argument(
    "--config.limits.grace_seconds",
    dest="grace_seconds",
    default=LimitsConfig().grace_seconds,
  )
  given = vars(parser.parse_known_args(train)[0])
  for flag in ("--config", "--workdir"):
    if given[flag[2:]] is None:
      raise UserError(f"{flag} is missing among the arguments after the --.")
  for flag in ours:
    if given[flag[2:]] is not None:
      raise UserError(f"Leave out {flag}: the launcher sets it.")
  if "grace" in options:
    _check_grace(options.grace, given["grace_seconds"])
  if options.engine != "slurm" and not PurePosixPath(
    given["workdir"]
  ).is_relative_to(SHARED):
    raise UserError(
      f"--workdir is {given['workdir']!r}; it must lie in {SHARED}, where "
      "--volume is mounted: everything else is lost with the container."
    )


def _check_grace(grace: int, of_training: str | float) -> None:
  try:
    seconds = float(of_training)
  except ValueError as error:
    raise UserError(
      f"--config.limits.grace_seconds is {of_training!r}; it must be a number "
      "of seconds."
    ) from error
  if not seconds < grace:
    raise UserError(
      f"--config.limits.grace_seconds is {seconds:g}, and --grace {grace}: the "
      "training would be killed before it can save and end with status 75; "
      f"make --grace more than {seconds:g}, or the other less than {grace}."
    )


def _slurm(options: argparse.Namespace, train: Sequence[str]) -> dict[str, str]:
  if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", options.time):
    raise UserError(
      f"--time is {options.time!r}; write it as MINUTES, H:M:S or D-H:M:S."
    )
  partition = ""
  if options.queue is not None:
    if not re.fullmatch(r"[\w.,-]+", options.queue):
      raise UserError(f"--queue is {options.queue!r}, no name of a partition.")
    partition = f"#SBATCH --partition={options.queue}\n"
  return {
    "time": options.time,
    "grace": str(options.grace),
    "partition": partition,
    "local_devices": ",".join(map(str, range(options.devices))),
    "python": shlex.quote(options.python),
    "train": _shell(train),
  }


def _gke(options: argparse.Namespace, train: Sequence[str]) -> dict[str, str]:
  label = "cloud.google.com/gke"
  metadata: dict[str, object] = {"name": options.name}
  if options.queue is not None:
    metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
  if options.topology is None:
    resource = "nvidia.com/gpu"
    selector = {f"{label}-accelerator": options.accelerator}
    # Names that a JobSet gives: the first pod's, and its service's.
    host = f"{options.name}-workers-0-0.{options.name}"
    flags = [
      f"--coordinator={host}:{PORT}",
      f"--processes={options.nodes}",
      "--process=$(JOB_COMPLETION_INDEX)",
    ]
  else:
    _check_topology(options)
    resource = "google.com/tpu"
    selector = {
      f"{label}-tpu-accelerator": options.accelerator,
      f"{label}-tpu-topology": options.topology,
    }
    # All nodes of a slice are in one pool.
    metadata["annotations"] = {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": f"{label}-nodepool"
    }
    # The TPU runtime numbers the hosts itself.
    flags = ["--coordinator=auto"] if options.nodes > 1 else []
  # Kubernetes replaces $(NAME), unless the dollar is doubled.
  words = [word.replace("$", "$$") for word in train]
  command = ["python", "-m", "xlstm_jax.train", *words, *flags]
  return {
    "metadata": _yaml(metadata),
    "grace": str(options.grace),
    "node_selector": _yaml(selector),
    "image": _yaml(options.image),
    "command": "\n".join(f"{' ' * 14}- {_yaml(word)}" for word in command),
    "resource": resource,
    "shared": SHARED,
    "volume": _yaml(options.volume),
  }


def _check_topology(options: argparse.Namespace) -> None:
  if not re.fullmatch(r"\d+(x\d+){1,2}", options.topology):
    raise UserError(
      f"--topology is {options.topology!r}; write it as 4x4 or 4x4x4."
    )
  chips = math.prod(map(int, options.topology.split("x")))
  if chips != options.nodes * options.devices:
    raise UserError(
      f"A slice of {options.topology} has {chips} chips, but --nodes="
      f"{options.nodes} with --devices={options.devices} are "
      f"{options.nodes * options.devices}."
    )


def _skypilot(
  options: argparse.Namespace, train: Sequence[str]
) -> dict[str, str]:
  if options.accelerator.lower().startswith("tpu"):
    raise UserError(
      f"--accelerator is {options.accelerator!r}; the SkyPilot file is for "
      "GPUs: take gke for TPUs."
    )
  mount = f"volumes: {_yaml({SHARED: options.volume})}"
  if "://" in options.volume:
    if options.nodes > 1:
      raise UserError(
        f"--volume is {options.volume!r}; a bucket is cached on every node, so "
        "that several nodes need a volume that they share."
      )
    bucket = {"source": options.volume, "mode": "MOUNT_CACHED"}
    mount = f"file_mounts: {_yaml({SHARED: bucket})}"
  return {
    "accelerators": _yaml(f"{options.accelerator}:{options.devices}"),
    "image": _yaml(f"docker:{options.image}"),
    "spot": _yaml(options.spot),
    "mount": mount,
    # A line within an argument is indented as the block is.
    "train": _shell(train).replace("\n", "\n  "),
  }


ENGINES: Mapping[
  str,
  tuple[str, Callable[[argparse.Namespace, Sequence[str]], dict[str, str]]],
] = {
  "slurm": ("slurm/job.sh", _slurm),
  "gke": ("gke/jobset.yaml", _gke),
  "skypilot": ("skypilot/task.yaml", _skypilot),
}


def _shell(words: Sequence[str]) -> str:
  """Words for a shell, one on a line."""
  return " \\\n  ".join(map(shlex.quote, words))


def _yaml(value: object) -> str:
  """A value on one line of YAML, of which JSON is a part."""
  return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
  sys.exit(exit_code(main))
