"""Times whole training steps: tokens/s, MFU and memory, row by row.

  python scripts/bench_train.py --json=bench.json
  python scripts/bench_train.py --model=1.3B --mesh=none --mesh=data=1
  python scripts/bench_train.py --model=1.3B --mesh=data=1 --mesh=data=2 \\
    --mesh=data=1,fsdp=2 --batch=8
  python scripts/bench_train.py --config=experiments/xlstm_125m.py:7:1 \\
    --config='experiments/xlstm_1b.py --config.accumulation=32'

The step is the one that `train` runs (`xlstm_jax.train.step`), in bfloat16 with
float32 parameters and AdamW, on random tokens. Rows are models x contexts x
backends x meshes. Each runs in a process of its own, and one that cannot run
says why. --mesh=none is a plain `jax.jit` of the step without any sharding. A
mesh uses as many devices as its sizes multiply to, and --batch is the number of
rows of each of its data and fsdp shares. --unrolled compiles every block
(compute.scan=False). That takes longer to compile, and saves copies of what is
kept for the backward pass.

--config times the step of an experiment, with any overrides written after it,
on all devices and in the memory that training would have. --mesh and the other
options are then ignored. "planned" is the device memory that the step takes
according to the compiler, in GiB.

Times are medians over rounds. Two utilisations, of the chips' bf16 peak:
"6N" counts 6 FLOPs per parameter and token (embeddings too), as the published
rows do; "MFU" counts `models.counts.train_flops_per_token`: the matrix products
and the causal half of the cells, three forward passes, no recomputation. Peak
memory is the allocator's, of the first device. --profile says where the time
of a step goes on a GPU, by kind of kernel.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal

import jax
import numpy as np

from xlstm_jax import config, metrics, sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models import counts, presets
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import memory
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps


def _heads(size: str, num_heads: int) -> ModelConfig:
  """A size of the 7B architecture with the heads of another benchmark."""
  cfg = presets.large(size)
  mixer = dataclasses.replace(cfg.mlstm_large, num_heads=num_heads)
  return dataclasses.replace(cfg, mlstm_large=mixer)


MODELS = {
  "165M": presets.large("165M"),
  "1.3B": presets.large("1.3B"),
  "125M-paper": presets.paper("125M"),
  # The shapes of the published PyTorch rows: K=64, V=128 and K=128, V=256.
  "165M-6heads": _heads("165M", 6),
  "1.3B-8heads": _heads("1.3B", 8),
}
UNSHARDED = "none"
# Kinds of GPU kernels by their names, the first that matches.
KINDS = {
  "mLSTM kernels": "mosaic",
  "collectives": "nccl|all_gather|all_reduce|reduce_scatter",
  "matrix products": "gemm|nvjet|cutlass|cublas|xmma|dot",
  "copies": "memcpy|memset|copy|transpose|concatenate|slice|pad",
  "reductions": "reduce",
  "elementwise": "fusion|wrapped|convert|loop|input",
}
ROUNDS, STEPS = 8, 4  # a round is timed as a whole
RECIPE_SECONDS = 12  # of an experiment's steps, of which some take longer
TIME_LIMIT = 900  # seconds for a row, compilation included


@dataclasses.dataclass(frozen=True)
class Row:
  """What is timed; `mesh` as on the command line."""

  model: str
  context: int
  backend: str
  mesh: str
  batch: int
  remat: Literal["none", "matmuls", "block"]
  unrolled: bool = False
  profile: bool = False

  @property
  def mesh_config(self) -> MeshConfig:
    """The sizes of the mesh: one device if there is none."""
    sizes = {"data": 1}
    if self.mesh != UNSHARDED:
      sizes |= mesh_sizes(self.mesh)
    return MeshConfig(**sizes)

  @property
  def devices(self) -> int:
    """How many it runs on."""
    cfg = self.mesh_config
    return math.prod(getattr(cfg, axis) for axis in sharding.AXES)


def mesh_sizes(text: str) -> dict[str, int]:
  """The sizes in text such as "data=2,fsdp=4"."""
  pairs = [part.partition("=") for part in text.split(",")]
  sizes = {axis: size for axis, _, size in pairs}
  if not all(
    axis in sharding.AXES and size.isdecimal() and int(size) > 0
    for axis, size in sizes.items()
  ):
    raise UserError(
      f"--mesh={text} must be {UNSHARDED!r} or sizes of "
      f"{', '.join(sharding.AXES)}, such as data=2,fsdp=4."
    )
  return {axis: int(size) for axis, size in sizes.items()}


def run_config(row: Row, model: ModelConfig) -> RunConfig:
  """The training run of which a step is timed."""
  mesh = row.mesh_config
  return RunConfig(
    model=model,
    data=DataConfig(context=row.context),
    mesh=mesh,
    compute=Compute(
      mlstm_backend=row.backend, remat=row.remat, scan=not row.unrolled
    ),
    batch_size=row.batch * mesh.data * mesh.fsdp,
  )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An experiment whose own step is timed.

  Attributes:
    config: FILE.py, FILE.py:TEXT, and overrides after it.
  """

  config: str
  profile: bool = False

  def run_config(self) -> RunConfig:
    """The training run of which a step is timed."""
    path, *overrides = self.config.split()
    return config.from_experiment(path, overrides)


def bench(row: Row, model: ModelConfig) -> dict[str, Any]:
  """One row of the table, in this process."""
  devices = jax.devices()[: row.devices]
  if len(devices) < row.devices:
    raise UserError(
      f"--mesh={row.mesh} needs {row.devices} devices; there are "
      f"{len(devices)}."
    )
  cfg = run_config(row, model)
  if row.mesh != UNSHARDED:
    return _on_mesh(cfg, devices, STEPS, math.inf, profile=row.profile)
  config.validate(cfg, None, row.devices)
  definition = Definition(cfg.model, cfg.compute)
  mesh = sharding.make_mesh(cfg.mesh, devices)
  state = jax.device_put(states.init(definition, mesh, seed=0), devices[0])
  step = jax.jit(
    functools.partial(
      steps.train_step, definition=definition, cfg=cfg, mesh=mesh
    ),
    donate_argnums=0,
  )
  placed = [jax.device_put(b, devices[0]) for b in _batches(cfg, STEPS)]
  return _timed(cfg, 1, step, state, placed, math.inf, profile=row.profile)


def bench_recipe(recipe: Recipe) -> dict[str, Any]:
  """One row of the table of experiments, in this process."""
  cfg = recipe.run_config()
  devices = jax.devices()
  result = _on_mesh(cfg, devices, 1, RECIPE_SECONDS, profile=recipe.profile)
  return result | {"parts": cfg.accumulation, "remat": cfg.compute.remat}


def _on_mesh(
  cfg: RunConfig, devices, count: int, seconds: float, *, profile: bool
) -> dict[str, Any]:
  """Times the step as it trains, on `count` batches in turn."""
  config.validate(cfg, None, len(devices))
  definition = Definition(cfg.model, cfg.compute)
  mesh = sharding.make_mesh(cfg.mesh, devices)
  state = states.init(definition, mesh, seed=0)
  with jax.set_mesh(mesh):
    step = steps.compiled(definition, cfg, mesh)
    where = sharding.batch_sharding(mesh)
    placed = [jax.device_put(b, where) for b in _batches(cfg, count)]
    return _timed(
      cfg, len(devices), step, state, placed, seconds, profile=profile
    )


def _batches(cfg: RunConfig, count: int) -> list[dict[str, np.ndarray]]:
  """Random tokens, each row one document."""
  rng = np.random.default_rng(0)
  shape = (cfg.batch_size, cfg.data.context)
  ids = rng.integers(0, cfg.model.vocab_size, (count, 2, *shape), np.int32)
  ones = np.ones(shape, np.int32)
  return [{"inputs": x, "targets": y, "segments": ones} for x, y in ids]


def _timed(
  cfg: RunConfig,
  devices: int,
  step,
  state,
  placed,
  enough: float,
  *,
  profile: bool,
) -> dict[str, Any]:
  """Figures of a step; no round begins after `enough` seconds of others."""
  started = time.perf_counter()
  step = step.lower(state, placed[0]).compile()
  compile_seconds = time.perf_counter() - started
  rounds, loss = [], math.nan
  while len(rounds) < 2 or (
    len(rounds) <= ROUNDS and len(placed) * sum(rounds[1:]) < enough
  ):
    started = time.perf_counter()
    losses = []
    for batch in placed:
      state, measured = step(state, batch)
      losses.append(measured["loss"])
    loss = float(losses[-1])
    rounds.append((time.perf_counter() - started) / len(placed))
  if not math.isfinite(loss):
    raise UserError(f"The loss is {loss} after {state.step} steps.")
  seconds = statistics.median(rounds[1:])
  tokens = cfg.batch_size * cfg.data.context / seconds
  kind = jax.devices()[0].device_kind
  peak = metrics.peak_flops(kind)
  stats = jax.devices()[0].memory_stats() or {}
  result = {
    "device": kind,
    "devices": devices,
    "rows": cfg.batch_size,
    "ms": seconds * 1e3,
    "spread": (max(rounds[1:]) - min(rounds[1:])) / seconds,
    "tokens_per_second": tokens,
    "compile_seconds": compile_seconds,
    "planned_gib": memory.taken(step) / 2**30,
    "loss": loss,
  }
  if peak is not None:
    share = tokens / (peak * devices)
    flops = counts.train_flops_per_token(cfg.model, cfg.data.context)
    result["mfu"] = share * flops
    result["mfu_6n"] = share * 6 * counts.parameters(cfg.model)
  if "peak_bytes_in_use" in stats:
    result["peak_gib"] = stats["peak_bytes_in_use"] / 2**30
  if profile:
    result["profile"] = _profile(step, state, placed)
  return result


def _profile(step, state, placed) -> dict[str, float]:
  """ms per step of the first device, by kind of kernel."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for batch in placed:
        state, _ = step(state, batch)
      jax.block_until_ready(state)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  devices = sorted(
    (plane for plane in planes if plane.name.startswith("/device:GPU")),
    key=lambda plane: plane.name,
  )
  if not devices:
    raise UserError("--profile needs a GPU: there are no kernels in the trace.")
  totals = collections.Counter()
  for line in devices[0].lines:
    if line.name.startswith("Stream"):
      for event in line.events:
        totals[kind(event.name)] += event.duration_ns / 1e6 / len(placed)
  return dict(totals.most_common())


def kind(kernel: str) -> str:
  """What a GPU kernel of that name does."""
  return next(
    (
      name
      for name, pattern in KINDS.items()
      if re.search(pattern, kernel, re.IGNORECASE)
    ),
    "other",
  )


def in_process(row: Row | Recipe) -> dict[str, Any]:
  """Its figures from a process of its own, or why it did not finish."""
  given = [
    f"--{name}" if value is True else f"--{name}={value}"
    for name, value in vars(row).items()
    if value is not False
  ]
  # An experiment gets what it would have in training.
  more = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
  try:
    done = subprocess.run(
      [sys.executable, __file__, *given, "--here"],
      env=os.environ | ({} if isinstance(row, Recipe) else more),
      capture_output=True,
      text=True,
      timeout=TIME_LIMIT,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"no result in {TIME_LIMIT} s"}
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": last}
  return json.loads(done.stdout.strip().splitlines()[-1])


HEAD = (
  f"{'model':12} {'context':>7} {'backend':10} {'mesh':14} {'rows':>5} "
  f"{'ms':>8} {'spread':>6} {'tokens/s':>9} {'6N':>6} {'MFU':>6} {'GiB':>6}"
)


RECIPE_HEAD = (
  f"{'experiment':24} {'rows':>5} {'parts':>5} {'remat':8} {'ms':>8} "
  f"{'spread':>6} {'tokens/s':>9} {'6N':>6} {'MFU':>6} {'planned':>8} "
  f"{'GiB':>6} {'compile':>8}"
)


def line(row: Row, result: dict[str, Any]) -> str:
  """A row of the table."""
  start = f"{row.model:12} {row.context:7} {row.backend:10} {row.mesh:14}"
  if "failed" in result:
    return f"{start} {result['failed'][:120]}"
  return f"{start} {result['rows']:5} {_speed(result)} {_peak(result)}"


def recipe_line(recipe: Recipe, result: dict[str, Any]) -> str:
  """A row of the table of experiments."""
  name = pathlib.Path(recipe.config.split()[0]).name
  if "failed" in result:
    return f"{name:24} {result['failed'][:120]}"
  return (
    f"{name:24} {result['rows']:5} {result['parts']:5} {result['remat']:8} "
    f"{_speed(result)} {result['planned_gib']:8.1f} {_peak(result)} "
    f"{result['compile_seconds']:6.0f} s"
  )


def _speed(result: dict[str, Any]) -> str:
  def share(name):
    return f"{result[name]:6.1%}" if name in result else f"{'-':>6}"

  return (
    f"{result['ms']:8.1f} {share('spread')} {result['tokens_per_second']:9.0f} "
    f"{share('mfu_6n')} {share('mfu')}"
  )


def _peak(result: dict[str, Any]) -> str:
  peak = result.get("peak_gib")
  return f"{'-' if peak is None else f'{peak:.1f}':>6}"


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  add = parser.add_argument
  add("--config", action="append", help="experiment, and overrides after it")
  add("--model", action="append", choices=MODELS)
  add("--context", action="append", type=int, help="tokens of a row")
  add("--backend", action="append", help="backend of the mLSTM cell")
  add("--mesh", action="append", help="such as data=2,fsdp=4, or none")
  add("--batch", type=int, default=8, help="rows per share of the mesh")
  add("--remat", default="matmuls", choices=("none", "matmuls", "block"))
  add("--unrolled", action="store_true", help="compile block by block")
  add("--profile", action="store_true", help="also show where time goes")
  add("--json", type=pathlib.Path, help="file for the results")
  add("--here", action="store_true", help="one row, here, as JSON")
  args = parser.parse_args(argv)
  recipes = [Recipe(text, args.profile) for text in args.config or ()]
  rows = [
    Row(
      *each,
      batch=args.batch,
      remat=args.remat,
      unrolled=args.unrolled,
      profile=args.profile,
    )
    for each in itertools.product(
      args.model or MODELS,
      args.context or (2048, 8192),
      args.backend or ("auto",),
      args.mesh or ("data=1",),
    )
  ]
  for mesh in args.mesh or ():
    if mesh != UNSHARDED:
      mesh_sizes(mesh)
  for recipe in recipes:
    recipe.run_config()  # a mistake in the last is told before the first runs
  if args.here:
    if recipes:
      print(json.dumps(bench_recipe(recipes[0])))
    else:
      print(json.dumps(bench(rows[0], MODELS[rows[0].model])))
    return
  print(RECIPE_HEAD if recipes else HEAD)
  results = []
  for row in recipes or rows:
    result = in_process(row)
    results.append({**vars(row), **result})
    print(
      recipe_line(row, result)
      if isinstance(row, Recipe)
      else line(row, result),
      flush=True,
    )
    for name, ms in result.get("profile", {}).items():
      print(f"    {name:16} {ms:9.2f} ms", flush=True)
    if args.json:  # row after row: a run that is cut off keeps its own
      args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(exit_code(main))
