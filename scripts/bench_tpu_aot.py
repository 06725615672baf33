"""Compiles each cell's TPU kernel and native form, and shows what each costs.

  python scripts/bench_tpu_aot.py --json=tpu_aot.json
  python scripts/bench_tpu_aot.py --cell=mlstm --chip=v5e \\
    --shape=2,4096,4,256,512
  python scripts/bench_tpu_aot.py --table

Nothing runs on a TPU: libtpu compiles for one on any machine (the extra
`plan`). Every figure is compiled, not measured: of the program of a forward and
a backward pass, on one core.

Two scales stand side by side, which are not to be divided into a speed-up. A
kernel's are bundles of its final schedule times the trip counts of its loops: a
bundle is a cycle if nothing stalls, and copies that it waits for are not in it.
XLA's are its own estimated cycles times trip counts, of the native form and of
what surrounds the kernel; of a kernel XLA has none. Where a kernel has two
branches for the same work, the longer one is the rare one, and is shown by
itself. Bytes are those that the compiler says the program accesses, and memory
is the peak of its temporary arrays.

"auto" takes a kernel where its bundles and the cycles around it are less than a
third of the native form's cycles, or where the program accesses at most half
the bytes in at most twice the cycles. --table writes the figures of the default
shapes into the table that the cell's backend decides by.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xlstm_jax import jax_internals
from xlstm_jax.cells import mlstm, tpu_costs
from xlstm_jax.cells.mlstm.tpu import backend as mlstm_tpu
from xlstm_jax.errors import UserError, exit_code

# The smallest slices that libtpu describes; one core computes.
CHIPS = {
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "v7x": "tpu7x:2x2x1",
}
KERNEL, NATIVE = "pallas_tpu", "native"
FORMS = (KERNEL, NATIVE)
TIME_LIMIT = 900  # seconds to compile a form
# Else libtpu waits for other processes that use it and asks the network what
# machine this is.
LIBTPU = {
  "JAX_PLATFORMS": "cpu",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_SKIP_MDS_QUERY": "true",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell whose kernel is compared.

  Attributes:
    axes: What the numbers of a shape are.
    shapes: Those of the table.
    operands: The arrays of a shape.
    run: `run(*operands, backend=name)`: the outputs.
    native: The name of the native form.
    trips: `trips(shape, device_kind)`: of every kernel, by its name in the
      program, the trip counts of its nested loops, the grid's first.
    table: The file that the backend decides by.
    branches: Into how many alternatives a kernel's step divides; the longest
      is the rare one.
  """

  axes: str
  shapes: tuple[str, ...]
  operands: Callable[[Sequence[int]], list[jax.ShapeDtypeStruct]]
  run: Callable[..., jax.Array]
  native: str
  trips: Callable[[Sequence[int], str], dict[str, tuple[int, ...]]]
  table: pathlib.Path
  branches: int = 1


def mlstm_operands(shape: Sequence[int]) -> list[jax.ShapeDtypeStruct]:
  B, T, H, K, V = shape
  tokens = [jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16) for d in (K, K, V)]
  return [*tokens, *[jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2]


def run_mlstm(q, k, v, i, f, *, backend: str) -> jax.Array:
  return mlstm.mlstm(q, k, v, i_BTH=i, f_BTH=f, backend=backend)[0]


def mlstm_trips(
  shape: Sequence[int], device_kind: str
) -> dict[str, tuple[int, ...]]:
  B, T, H, K, V = shape
  steps = B * H * -(-T // mlstm_tpu.best_chunk(device_kind, K, V))
  return {"mlstm_forward": (steps,), "mlstm_backward": (steps,)}


HEADS = (
  *("64,128", "96,192", "128,256", "256,512", "384,384", "512,512"),
  *("768,768", "1024,1024", "1280,1280"),
)
# A cell that has a kernel has a row here.
CELLS = {
  "mlstm": Cell(
    axes="rows, tokens, heads, keys and values",
    shapes=tuple(f"2,4096,4,{heads}" for heads in HEADS),
    operands=mlstm_operands,
    run=run_mlstm,
    native="chunkwise",
    trips=mlstm_trips,
    table=mlstm_tpu.COSTS,
    branches=2,
  ),
}


# One form, in a process of its own that writes the compiler's dumps.


def compile_form(cell: Cell, shape: Sequence[int], chip: str, form: str) -> Any:
  """Forward and backward pass on one core of such a chip."""
  devices = jax_internals.topology_devices("tpu", CHIPS[chip])
  mesh = jax.make_mesh(
    (1,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices[:1],
  )
  backend = cell.native if form == NATIVE else form

  def both(operands, dy):
    def forward(*operands):
      return cell.run(*operands, backend=backend)

    y, backward = jax.vjp(forward, *operands)
    return y, backward(dy)

  operands = cell.operands(shape)
  with jax.set_mesh(mesh):
    dy = jax.eval_shape(
      lambda *operands: cell.run(*operands, backend=cell.native), *operands
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    types = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      (operands, dy),
    )
    return jax.jit(both).lower(*types).compile()


def cycles(program: str) -> int:
  """XLA's estimated cycles, bodies of loops as often as they run."""
  lines: dict[str, list[str]] = {}
  entry, name = "", ""
  for text in program.splitlines():
    if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", text):
      name = start[2]
      lines[name] = []
      entry = name if start[1] else entry
    elif name and text != "}":
      lines[name].append(text)

  def trips(condition: str) -> int:
    # It compares the step with the number of steps.
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
    if len(bounds) != 1 or "direction=LT" not in condition:
      raise ValueError(f"How often does this loop run? {condition[:500]}")
    return int(bounds[0])

  def total(name: str) -> int:
    text = "\n".join(lines[name])
    own = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    loops = re.findall(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", text)
    calls = re.findall(r" call\(.*to_apply=%?([\w.\-]+)", text)
    own += sum(
      trips("\n".join(lines[condition])) * total(body)
      for condition, body in loops
    )
    return own + sum(map(total, calls))

  return total(entry)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A kernel's final schedule.

  Attributes:
    bundles: In loops of each depth, the body of the program first, without
      the branches that are rarely taken.
    rare: By how many more a step takes the rarest branch.
  """

  bundles: tuple[int, ...]
  rare: int


def schedule(dump: str, branches: int) -> Schedule:
  """Reads the compiler's dump of a kernel's bundles.

  Branches are the longest of the regions in which there is no other.
  """
  depths: list[int] = []
  opened: list[list[int]] = []  # where a region starts, and those inside
  leaves: list[int] = []
  for line in dump.splitlines():
    bundle = re.match(r"\s*(?:0x)?[0-9a-f]+\s+(\w*)\s*:\s*(>*)\s*\{", line)
    if bundle is None:
      continue
    if bundle[1] == "PF" and opened:
      start, inside = opened.pop()
      if not inside:
        leaves.append(len(depths) - start)
      if opened:
        opened[-1][1] += 1
    depths.append(len(bundle[2]))
    if "sbr.rel" in line and bundle[2]:
      opened.append([len(depths), 0])
  counts = [depths.count(depth) for depth in range(max(depths) + 1)]
  if branches == 1:
    return Schedule(tuple(counts), 0)
  usual, *rest = sorted(leaves)[-branches:]
  counts[1] -= sum(rest)
  return Schedule(tuple(counts), max(rest) - usual)


def compiled(cell: Cell, shape: Sequence[int], chip: str, form: str) -> dict:
  """What a form costs, in this process."""
  dumps = pathlib.Path(os.environ["DUMPS"])
  program = compile_form(cell, shape, chip, form)
  memory, costs = program.memory_analysis(), program.cost_analysis()
  result: dict[str, Any] = {
    "cycles": cycles(program.as_text()),
    "bytes": int(costs["bytes accessed"]),
    "memory": memory.temp_size_in_bytes,
  }
  if form == NATIVE:
    return result
  kind = device_kind(chip)
  result["kernels"] = {}
  for name, trips in cell.trips(shape, kind).items():
    (path,) = (
      path
      for path in dumps.glob("*-final_bundles.txt")
      if name in path.name and "schedule-analysis" not in path.name
    )
    found = schedule(path.read_text(), cell.branches)
    steps = math.prod(trips)
    runs = [math.prod(trips[:depth]) for depth in range(len(found.bundles))]
    result["kernels"][name] = {
      "per_step": list(found.bundles[1:]),
      "bundles": sum(map(math.prod, zip(found.bundles, runs, strict=True))),
      "rare": steps * found.rare,
    }
  return result


def device_kind(chip: str) -> str:
  return jax_internals.topology_devices("tpu", CHIPS[chip])[0].device_kind


def in_process(cell: str, shape: str, chip: str, form: str) -> dict:
  """`compiled` in a process of its own, or why it did not finish."""
  with tempfile.TemporaryDirectory() as dumps:
    flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
    environment = os.environ | LIBTPU | {"DUMPS": dumps}
    if form != NATIVE:
      environment["LIBTPU_INIT_ARGS"] = flags
    command = [sys.executable, __file__, "--here", f"--cell={cell}"]
    command += [f"--chip={chip}", f"--shape={shape}", f"--form={form}"]
    try:
      done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
      )
    except subprocess.TimeoutExpired:
      return {"failed": f"not compiled in {TIME_LIMIT} s"}
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": last}
  return json.loads(done.stdout.strip().splitlines()[-1])


HEADER = (
  f"{'cell':6} {'shape':20} {'chip':4} | {'bundles by kernel':>24} {'rare':>7} "
  f"{'+ cycles':>9} {'GB':>6} {'GiB':>6} | {'XLA cycles':>10} {'GB':>6} "
  f"{'GiB':>6} | auto"
)


def line(cell: str, shape: str, chip: str, result: dict) -> str:
  """Of the table: millions of bundles and cycles, bytes, memory; which form."""
  start = f"{cell:6} {shape:20} {chip:4} |"
  kernel, native = result[KERNEL], result[NATIVE]
  for form in (kernel, native):
    if "failed" in form:
      return f"{start} {form['failed'][:120]}"

  def figures(form):
    gb, gib = form["bytes"] / 1e9, form["memory"] / 2**30
    return f"{form['cycles'] / 1e6:9.2f} {gb:6.2f} {gib:6.2f}"

  parts = kernel["kernels"].values()
  by_kernel = " + ".join(f"{part['bundles'] / 1e6:.2f}" for part in parts)
  rare = sum(part["rare"] for part in parts) / 1e6
  why = why_native(result)
  return (
    f"{start} {by_kernel:>24} {rare:+7.2f} {figures(kernel)} | "
    f"{figures(native):>24} | {'native: ' + why if why else 'kernel'}"
  )


def why_native(result: dict) -> str | None:
  """The rule of "auto"."""
  return tpu_costs.why_native(summary(result))


def summary(result: dict) -> tpu_costs.Compiled:
  """What the rule looks at."""
  kernel, native = result[KERNEL], result[NATIVE]
  return tpu_costs.Compiled(
    bundles=sum(part["bundles"] for part in kernel["kernels"].values()),
    cycles=kernel["cycles"],
    bytes=kernel["bytes"],
    native_cycles=native["cycles"],
    native_bytes=native["bytes"],
  )


def parsed(cell: str, shape: str) -> tuple[int, ...]:
  axes = CELLS[cell].axes
  try:
    numbers = tuple(map(int, shape.split(",")))
  except ValueError:
    numbers = ()
  length = len(CELLS[cell].shapes[0].split(","))
  if len(numbers) != length or min(numbers) < 1:
    raise UserError(
      f"--shape={shape} must be {length} positive numbers for {cell}: {axes}; "
      f"for example {CELLS[cell].shapes[0]}."
    )
  return numbers


def write_table(results: Sequence[dict]) -> None:
  """Into the tables that the backends decide by, in place of the old rows."""
  for name, cell in CELLS.items():
    table = json.loads(cell.table.read_text()) if cell.table.exists() else {}
    for result in results:
      if result["cell"] == name and "failed" not in str(result):
        shape = parsed(name, result["shape"])
        heads = " x ".join(map(str, shape[3:]))
        rows = table.setdefault(result["device_kind"], {})
        rows[heads] = summary(result)._asdict()
    cell.table.write_text(json.dumps(table, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--cell", action="append", choices=CELLS)
  parser.add_argument("--chip", action="append", choices=CHIPS)
  parser.add_argument("--shape", action="append", help="needs one --cell")
  parser.add_argument("--json", type=pathlib.Path, help="where results go")
  parser.add_argument(
    "--jobs", type=int, default=1, help="programs compiled side by side"
  )
  parser.add_argument(
    "--table", action="store_true", help='write the tables that "auto" reads'
  )
  parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  cells = args.cell or list(CELLS)
  if args.jobs < 1:
    raise UserError(f"--jobs={args.jobs} must be at least 1.")
  if args.shape and len(cells) != 1:
    raise UserError(
      f"--shape={args.shape[0]} is of one cell; give --cell as one of "
      f"{', '.join(CELLS)}."
    )
  if args.here:
    shape = parsed(cells[0], args.shape[0])
    found = compiled(CELLS[cells[0]], shape, args.chip[0], args.form)
    print(json.dumps(found | {"device_kind": device_kind(args.chip[0])}))
    return
  cases = [
    (cell, shape, chip)
    for cell in cells
    for shape in args.shape or CELLS[cell].shapes
    for chip in args.chip or CHIPS
  ]
  for cell, shape, _ in cases:
    parsed(cell, shape)
  print("Compiled, not measured; bundles and cycles in millions.")
  print(HEADER)
  results = []
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    forms = [
      [pool.submit(in_process, *case, form) for form in FORMS] for case in cases
    ]
    for case, futures in zip(cases, forms, strict=True):
      found = {
        form: future.result()
        for form, future in zip(FORMS, futures, strict=True)
      }
      print(line(*case, found), flush=True)
      cell, shape, chip = case
      results.append(
        {"cell": cell, "shape": shape, "chip": chip}
        | found
        | {"device_kind": found[NATIVE].get("device_kind")}
      )
      if args.json:  # row after row: a run that is cut off keeps its own
        args.json.write_text(json.dumps(results, indent=2) + "\n")
      if args.table:
        write_table(results)


if __name__ == "__main__":
  sys.exit(exit_code(main))
