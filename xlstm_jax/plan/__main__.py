"""`python -m xlstm_jax.plan`: compiles a run's step for another machine."""

import argparse
import dataclasses
import sys

import jax

from xlstm_jax import config, files, metrics, paths
from xlstm_jax.errors import exit_code
from xlstm_jax.plan import machines, program
from xlstm_jax.plan.program import Plan

DESCRIPTION = """\
Compiles the training step of an experiment for a machine that you do not need
to have, and prints what the step takes: memory by kind, FLOPs, communication.
"""

EPILOG = """\
topologies:
  v5e:16x16, v5p:8x8x8, v6e:8x8   a TPU slice by its shape
  'v5e:16x16*2'                   two such slices, with config.mesh.slices=2
  h100:8, h200:64                 GPUs, 8 to a node

Compiling for TPUs needs libtpu, for GPUs jax-cuda13-plugin. This installs both:
  pip install -c constraints/newest.txt -e '.[plan]'
No TPU has run the cells' kernels for TPUs yet.
Of a GPU's memory JAX takes 75 %, or what XLA_CLIENT_MEM_FRACTION says.

exit status:
  0   the step fits
  1   it does not
  2   something in the configuration is wrong

example:
  python -m xlstm_jax.plan --config=experiments/xlstm_125m.py \\
    --topology=v5e:4x4 --config.accumulation=16
"""

DOES_NOT_FIT = 1


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.plan",
    usage="%(prog)s --config=FILE.py --topology=KIND:SIZE [--search]\n"
    "    [--json=FILE] [--config.KEY=VALUE ...]",
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
    "--topology",
    required=True,
    metavar="KIND:SIZE",
    help="the machine to compile for, see below",
  )
  parser.add_argument(
    "--search",
    action="store_true",
    help="find the largest batch that fits and what must be recomputed for it",
  )
  parser.add_argument(
    "--json",
    type=paths.argument(paths.new_file),
    metavar="FILE",
    help="also write the plan to this file",
  )
  options, overrides = parser.parse_known_args(argv)
  # Tracing needs no accelerator, so JAX need not look for one.
  jax.config.update("jax_platforms", "cpu")
  cfg = config.from_experiment(options.config, overrides)
  machine = machines.machine(options.topology)
  if options.search:
    found = _search(cfg, machine)
  else:
    found = program.plan(cfg, machine)
  print(describe(found))
  if options.json is not None:
    _write(options.json, found)
  return 0 if found.fits else DOES_NOT_FIT


def _search(cfg: config.RunConfig, machine: machines.Machine) -> Plan:
  """The best plan, or the last one tried if none fits."""
  print("batch_size  remat     peak GiB  compile s")
  best = last = None
  for last in program.search(cfg, machine):
    print(
      f"{last.batch_size:10}  {last.remat:8}  "
      f"{last.peak_bytes / 2**30:8.2f}  {last.compile_seconds:9.0f}"
      f"{'' if last.fits else '  does not fit'}",
      flush=True,
    )
    best = last if last.fits else best
  assert last is not None
  print()
  return best or last


def describe(found: Plan) -> str:
  """The plan as a page of text."""
  mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items())
  lines = [
    f"machine      {found.devices} x {found.device_kind} ({found.topology})",
    f"mesh         {mesh}",
    f"model        {found.parameters:,} parameters",
    f"batch        {found.batch_size} rows of {found.context} tokens in "
    f"{found.accumulation} parts, remat {found.remat}",
    *(
      f"{cell:13}{backend} ({_form(found, cell)})"
      for cell, backend in found.backends.items()
    ),
    f"FLOPs        {found.flops_per_token:.4g} a token, without recomputation"
    + _at_peak(found),
    f"compiled in  {metrics.duration(found.compile_seconds)}",
    "",
    "bytes of a device",
  ]
  for name, size in (
    ("parameters", found.parameter_bytes),
    ("optimizer", found.optimizer_bytes),
    ("batch", found.batch_bytes),
    ("temporaries", found.temporary_bytes),
    ("program", found.program_bytes),
    ("peak", found.peak_bytes),
    ("available", found.memory),
  ):
    lines.append(f"  {name:12}{_mib(size)}")
  if found.memory != found.device_memory:
    share = found.memory / found.device_memory
    whole = _mib(found.device_memory).lstrip()
    lines[-1] += f": {share:.0%} of {whole}; {machines.FRACTIONS[0]} changes it"
  lines += ["", _verdict(found)]
  if found.collectives:
    lines += ["", "communication of a step      times      MiB of a device"]
    for kind, traffic in found.collectives.items():
      lines.append(
        f"  {kind:22}{traffic.times:10,}{traffic.bytes / 2**20:21,.1f}"
      )
  return "\n".join(lines)


def _form(found: Plan, cell: str) -> str:
  if cell in found.kernels:
    return "kernel"
  if cell in found.without_kernel:
    return f"native form; there is no {found.platform.upper()} kernel yet"
  return "native form"


def _at_peak(found: Plan) -> str:
  if found.seconds_at_peak is None:
    return ""
  return f"; a step takes {found.seconds_at_peak:.3g} s at the peak of all"


def _mib(size: int | None) -> str:
  return f"{'unknown':>14}" if size is None else f"{size / 2**20:10,.1f} MiB"


def _verdict(found: Plan) -> str:
  share = f"{found.peak_bytes / found.memory:.0%} of a device's memory"
  if found.fits:
    return f"It fits: {share}."
  return (
    f"IT DOES NOT FIT: {share}. Smaller parts (batch_size, accumulation), "
    "recomputation (compute.remat) or more shares (mesh.fsdp) take less; "
    "--search tries the first two."
  )


def _write(file: str, found: Plan) -> None:
  values = dataclasses.asdict(found) | {
    "fits": found.fits,
    "collectives": {k: t._asdict() for k, t in found.collectives.items()},
  }
  with files.writing(file):
    files.write_json(file, values)


if __name__ == "__main__":
  sys.exit(exit_code(main))
