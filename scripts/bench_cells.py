"""Times the cells' backends and public peers, errors beside each time.

  python scripts/bench_cells.py --json=bench.json
  python scripts/bench_cells.py --shape=1,256,2,64,128 --row=chunkwise-64
  python scripts/bench_cells.py --tune --shape=8,8192,8,256,512 --jobs=8

A shape is rows, tokens, heads, keys and values for the mLSTM, and rows, tokens,
heads and units for the sLSTM and the LSTM. Every row of the table runs in a
process of its own; one that cannot run says why. Times are medians of rounds,
in ms, on random data: bfloat16 for the mLSTM; for the others gates are float32,
as their mixer makes them, and matrices bfloat16. Errors are relative to the
definition in float64, on 256 tokens of the same heads. Peers: mlstm_kernels'
two Triton kernels (without the normaliser's gradient), FLA's simple_gla and
cuDNN's causal attention in JAX, of the same width in heads of 128; the last two
compute something else, and their errors are relative to the definition of that.
GiB are the peak of one forward and backward pass, arguments and results
included: in JAX of the compiled program, in PyTorch of what was allocated. FLA
refuses the backward pass of simple_gla on Hopper with Triton from 3.4 to before
3.7.1. With --jobs so many rows are made ready side by side, while the GPU runs
one of them; the Pallas kernels' then compile without XLA trying out fusions on
the GPU.

--tune times the block sizes of the Pallas kernels, forward and backward, and
writes those that were fastest at each shape into the table that the backend
reads for such heads: of several shapes with the same heads the last one's.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.cells.lstm import lstm
from xlstm_jax.cells.mlstm import mlstm
from xlstm_jax.cells.mlstm.hopper import block_sizes
from xlstm_jax.cells.mlstm.hopper.block_sizes import Blocks, out_width
from xlstm_jax.cells.slstm import slstm
from xlstm_jax.errors import UserError, exit_code

ROWS = (
  "pallas_gpu",
  "pallas_gpu-128",
  "pallas_tpu",
  "chunkwise-64",
  "chunkwise-128",
  "chunkwise-256",
  "mlstm_kernels-xl",
  "mlstm_kernels-limit",
  "simple_gla",
  "cudnn",
)
RECURRENT_ROWS = (
  *("slstm-pallas_gpu", "slstm-pallas_tpu", "slstm-recurrent"),
  *("lstm-pallas_gpu", "lstm-pallas_tpu", "lstm-recurrent"),
)
IN_TORCH = ("mlstm_kernels-xl", "mlstm_kernels-limit", "simple_gla")
SHAPES = ("8,8192,8,256,512", "8,8192,16,128,256")
# The heads of the paper's 125M, 350M, 760M and 1.3B, and larger batches.
RECURRENT_SHAPES = (
  *("16,2048,4,192", "16,2048,4,256", "16,2048,4,384", "16,2048,4,512"),
  *("64,2048,4,192", "64,2048,4,256"),
)
GRADIENTS = ("dq", "dk", "dv", "di", "df")
RECURRENT_GRADIENTS = ("dx", "dR", "db")
DRAWN = 8192  # random tokens, which repeat: drawing more takes a minute
TIME_LIMIT = 600  # seconds for a row, compilation included
ROUNDS = 3  # of timing block sizes
NEAR = 1.1  # times the fastest: up to there they are in all rounds
# No fusion is tried out on the GPU, which another row has.
UNTUNED = {"xla_gpu_autotune_level": 0}


def inputs(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
  """Tokens and the cotangent as float32 of bfloat16 precision, and gates."""
  B, T, H, K, V = shape
  rng = np.random.default_rng(0)
  drawn = math.gcd(B * T, DRAWN)

  def normal(*dims):
    return rng.standard_normal((drawn, H, *dims), np.float32)

  def whole(x):
    """The drawn tokens again and again."""
    return np.resize(x, (B, T, *x.shape[1:]))

  x = {"q": normal(K), "k": normal(K), "v": normal(V), "dh": normal(V)}
  x = {
    name: np.asarray(a.astype(jnp.bfloat16), np.float32)
    for name, a in x.items()
  }
  x |= {"i": normal() - 2, "f": normal() + 3}
  return {name: whole(a) for name, a in x.items()}


def in_heads(q, k, v):
  """All in heads of 128; copies make queries and keys as wide as the values."""
  q, k = (jnp.concatenate([x, x], -1)[..., : v.shape[-1]] for x in (q, k))
  return [x.reshape(*x.shape[:2], -1, 128) for x in (q, k, v)]


def cudnn(q, k, v, i, f):
  del i, f
  return jax.nn.dot_product_attention(
    *in_heads(q, k, v), is_causal=True, implementation="cudnn"
  )


def causal_attention(q, k, v, i, f):
  del i, f
  q, k, v = in_heads(q, k, v)
  scores_BHTS = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
  past_TS = jnp.tri(q.shape[1], dtype=bool)
  weights_BHTS = jax.nn.softmax(scores_BHTS, where=past_TS)
  return jnp.einsum("bhts,bshv->bthv", weights_BHTS, v)


def decaying_attention(q, k, v, i, f):
  del i
  F_BHT = jnp.cumsum(jax.nn.log_sigmoid(f), 1).swapaxes(1, 2)
  decay_BHTS = jnp.exp(jnp.tril(F_BHT[..., None] - F_BHT[..., None, :]))
  scores_BHTS = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
  weights_BHTS = jnp.tril(scores_BHTS * decay_BHTS)
  return jnp.einsum("bhts,bshv->bthv", weights_BHTS, v)


# What a row is to compute, where it is not the mLSTM.
DEFINITIONS = {"simple_gla": decaying_attention, "cudnn": causal_attention}


def cell(row: str):
  backend, _, chunk = row.partition("-")
  options = {"backend": backend, "chunk": int(chunk) if chunk else None}
  return lambda q, k, v, i, f: mlstm(q, k, v, i_BTH=i, f_BTH=f, **options)[0]


def recurrent_cell(row: str):
  """A row's function of x, R and b, on rows of three documents."""
  name, _, backend = row.partition("-")

  def forward(x, R, b):
    B, T = x.shape[:2]
    segments_BT = jnp.broadcast_to(1 + jnp.arange(T) * 3 // T, (B, T))
    run = {"slstm": slstm, "lstm": lstm}[name]
    return run(x, R, b, segments_BT=segments_BT, backend=backend)[0]

  return forward


def recurrent_inputs(shape: tuple[int, ...]) -> list[np.ndarray]:
  """x, R, b and dy as float32; of R the numbers are bfloat16."""
  B, T, H, D = shape
  rng = np.random.default_rng(0)

  def normal(*dims):
    return rng.standard_normal(dims, np.float32)

  # Random numbers repeat: drawing more takes a minute.
  drawn = math.gcd(B * T, DRAWN)
  x, dy = (
    np.resize(normal(drawn, *dims), (B, T, *dims))
    for dims in ((4, H, D), (H, D))
  )
  R = np.asarray(jnp.bfloat16(0.5 * D**-0.5 * normal(4, H, D, D)), np.float32)
  b = np.zeros((4, H, D), np.float32)
  b[1] = 4  # a unit remembers about 50 tokens
  return [x, R, b, dy]


def recurrent_bench(
  row: str, shape: tuple[int, ...], lock: pathlib.Path | None
) -> dict:
  """`bench` of a recurrent cell."""

  def placed(arrays):
    x, R, b, dy = map(jnp.asarray, arrays)
    return x, R.astype(jnp.bfloat16), b, dy

  small = recurrent_inputs((8, 256, 2, shape[-1]))
  cpu = jax.devices("cpu")[0]
  with jax.enable_x64(True), jax.default_device(cpu):
    definition = recurrent_cell(row.partition("-")[0] + "-recurrent")
    y, gradients = with_gradients(definition)[1](*map(np.float64, small))
    expected = [np.asarray(a) for a in (y, *gradients)]
  wait_for_turn(lock)
  forward, both = with_gradients(recurrent_cell(row))
  y, gradients = both(*placed(small))
  found = [np.asarray(a, np.float64) for a in (y, *gradients)]
  arrays = placed(recurrent_inputs(shape))
  compiled = both.lower(*arrays).compile()
  return {
    "forward": measured(lambda: forward(*arrays[:3]), jax.block_until_ready),
    "both": measured(lambda: compiled(*arrays), jax.block_until_ready),
    "peak_gib": peak_bytes(compiled) / 2**30,
    "errors": errors(found, expected, ("y", *RECURRENT_GRADIENTS)),
  }


def with_gradients(forward):
  """Forward, and forward and backward, of arguments and the cotangent."""

  def both(*args):
    *args, dh = args
    h, back = jax.vjp(forward, *args)
    return h, back(dh.reshape(h.shape))

  return jax.jit(forward), jax.jit(both)


def jax_functions(row: str):
  return with_gradients(cudnn if row == "cudnn" else cell(row))


def jax_types(shape: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
  """Those of `host_arrays` in bfloat16."""
  *tokens, K, V = shape

  def array(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((*tokens, *dims), dtype)

  gate = array(dtype=jnp.float32)
  return [array(K), array(K), array(V), gate, gate, array(V)]


def host_arrays(x, dtype) -> list[np.ndarray]:
  """q, k, v, i, f and dh, where they wait for the device."""
  wide = jnp.promote_types(dtype, jnp.float32)
  types = {"q": dtype, "k": dtype, "v": dtype, "i": wide, "f": wide}
  return [x[n].astype(t) for n, t in (types | {"dh": dtype}).items()]


def torch_functions(row: str):
  """The same in PyTorch."""
  import torch  # pyright: ignore[reportMissingImports]

  # Else mlstm_kernels casts to float32 what comes in bfloat16.
  half = {"autocast_kernel_dtype": torch.bfloat16}
  match row:
    case "mlstm_kernels-xl":
      from mlstm_kernels.torch.chunkwise.triton_xl_chunk.fwbw import (  # pyright: ignore[reportMissingImports]
        mlstm_chunkwise__xl_chunk,
      )

      forward = functools.partial(
        mlstm_chunkwise__xl_chunk, chunk_size=128, **half
      )
    case "mlstm_kernels-limit":
      from mlstm_kernels.torch.chunkwise.triton_limit_chunk.fwbw import (  # pyright: ignore[reportMissingImports]
        mlstm_chunkwise__limit_chunk,
      )

      forward = functools.partial(
        mlstm_chunkwise__limit_chunk, chunk_size=64, **half
      )
    case _:
      from fla.ops.simple_gla import (  # pyright: ignore[reportMissingImports]
        chunk_simple_gla,
      )

      def forward(q, k, v, i, f):
        del i
        return chunk_simple_gla(q, k, v, torch.nn.functional.logsigmoid(f))[0]

  def both(q, k, v, i, f, dh):
    args = [x.detach().requires_grad_() for x in (q, k, v, i, f)]
    h = forward(*args)
    h.backward(dh)
    return h, tuple(x.grad for x in args)

  return forward, both


def torch_arrays(row: str, x):
  import torch  # pyright: ignore[reportMissingImports]

  def placed(name):
    a = torch.tensor(heads_first(row, x[name]).copy()).cuda()
    return a if name in ("i", "f") else a.to(torch.bfloat16)

  return [placed(name) for name in ("q", "k", "v", "i", "f", "dh")]


def on_host(row: str, a) -> np.ndarray | None:
  """A result of a PyTorch function as [B, T, H, ...], if there is one."""
  return a if a is None else heads_first(row, a.detach().float().cpu().numpy())


def heads_first(row: str, a):
  """[B, T, H, ...] as mlstm_kernels has it, [B, H, T, ...], and back."""
  return a if row == "simple_gla" else a.swapaxes(1, 2)


def measured(run, wait) -> float:
  """Median over rounds of the mean time of a few calls, in ms."""
  wait(run())
  wait(run())
  rounds = []
  for _ in range(10):
    start = time.perf_counter()
    result = None
    for _ in range(5):
      result = run()
    wait(result)
    rounds.append((time.perf_counter() - start) / 5 * 1e3)
  return statistics.median(rounds)


def truth(row: str, x) -> list[np.ndarray]:
  """h and the gradients by the row's definition in float64, on the CPU."""
  cpu = jax.devices("cpu")[0]
  with jax.enable_x64(True), jax.default_device(cpu):
    _, both = with_gradients(DEFINITIONS.get(row) or cell("recurrent"))
    h, gradients = both(*host_arrays(x, np.float64))
    return [np.asarray(a) for a in (h, *gradients)]


def errors(
  results, expected, names: Sequence[str] = ("h", *GRADIENTS)
) -> dict[str, float]:
  """Relative errors of what the row's function depends on."""
  triples = zip(names, results, expected, strict=True)
  return {
    name: float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))
    for name, a, b in triples
    if b.any()
  }


def wait_for_turn(lock: pathlib.Path | None) -> None:
  """Waits until no process that had its turn is left.

  A process has memory on the GPU until it ends: the lock stays open so long.
  """
  if lock is not None:
    fcntl.flock(os.open(lock, os.O_RDWR), fcntl.LOCK_EX)


def bench(
  row: str, shape: tuple[int, ...], lock: pathlib.Path | None = None
) -> dict:
  """One row of the table, in this process."""
  if row in RECURRENT_ROWS:
    return recurrent_bench(row, shape, lock)
  # simple_gla is tuned anew for another number of heads.
  few = (1, 256, shape[2] if row == "simple_gla" else 2, *shape[3:])
  small = inputs(few)
  expected = truth(row, small)
  if row in IN_TORCH:
    return torch_bench(row, shape, small, expected, lock)
  arrays = host_arrays(inputs(shape), jnp.bfloat16)
  ahead = lock is not None and row.startswith("pallas_gpu")
  if not ahead:
    wait_for_turn(lock)
  options = UNTUNED if ahead else None
  forward, both = jax_functions(row)
  of_few = both.lower(*jax_types(few)).compile(options)
  types = jax_types(shape)
  forward = forward.lower(*types[:5]).compile(options)
  both = both.lower(*types).compile(options)
  if ahead:
    wait_for_turn(lock)
  arrays = jax.device_put(arrays)
  result: dict[str, Any] = {
    "forward": measured(lambda: forward(*arrays[:5]), jax.block_until_ready),
    "both": measured(lambda: both(*arrays), jax.block_until_ready),
    "peak_gib": peak_bytes(both) / 2**30,
  }
  h, gradients = of_few(*host_arrays(small, jnp.bfloat16))
  found = [np.asarray(a) for a in (h, *gradients)]
  return result | {"errors": errors(found, expected)}


def peak_bytes(compiled) -> int:
  """What a compiled program takes, with its arguments and results.

  JAX's own statistics count pieces of memory, which are up to 128 MiB larger
  than what they are for.
  """
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def torch_bench(
  row: str,
  shape: tuple[int, ...],
  small,
  expected,
  lock: pathlib.Path | None,
) -> dict:
  import torch  # pyright: ignore[reportMissingImports]

  forward, both = torch_functions(row)
  x = inputs(shape)
  wait_for_turn(lock)
  arrays = torch_arrays(row, x)

  def wait(x):
    del x
    torch.cuda.synchronize()

  result: dict[str, Any] = {
    "forward": measured(lambda: forward(*arrays[:5]), wait)
  }
  try:
    result["both"] = measured(lambda: both(*arrays), wait)
  except RuntimeError as error:
    if row != "simple_gla":
      raise
    # FLA refuses the backward pass where Triton would compute it wrongly.
    return result | {"note": str(error)}
  torch.cuda.reset_peak_memory_stats()
  wait(both(*arrays))
  result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
  h, gradients = both(*torch_arrays(row, small))
  found = [on_host(row, a) for a in (h, *gradients)]
  return result | {"errors": errors(found, expected)}


def candidates(key_dim: int, value_dim: int) -> list[Blocks]:
  """Block sizes that come to different parts."""
  K = block_sizes.padded_keys(key_dim)
  V = block_sizes.padded(value_dim)
  apart = block_sizes.values_apart(K)
  gradients = [(K,), (V,)] if apart else [(K, V)]
  columns = block_sizes.COLUMNS
  found: dict[tuple[int, ...], Blocks] = {}
  for sizes in itertools.product(block_sizes.CHUNKS, columns, columns, columns):
    blocks = Blocks(*sizes)
    parts = (
      blocks.chunk,
      out_width(blocks.state_columns, V),
      out_width(blocks.sum_columns, V),
      *(out_width(blocks.gradient_columns, *dims) for dims in gradients),
    )
    found.setdefault(parts, blocks)
  return list(found.values())


def bench_blocks(
  shape: tuple[int, ...], blocks: Blocks, lock: pathlib.Path | None
) -> dict:
  """Forward and backward with these block sizes, in this process."""
  kind = jax.devices()[0].device_kind
  dims = block_sizes.name(*shape[3:])
  block_sizes.table()[kind] = {dims: blocks._asdict()}
  _, both = jax_functions("pallas_gpu")
  both = both.lower(*jax_types(shape)).compile(UNTUNED)
  arrays = host_arrays(inputs(shape), jnp.bfloat16)
  wait_for_turn(lock)
  arrays = jax.device_put(arrays)
  milliseconds = measured(lambda: both(*arrays), jax.block_until_ready)
  return {"device": kind, "both": milliseconds}


def tune(shapes: Sequence[str], run: Callable[..., Iterator[dict]]) -> None:
  """Writes the fastest block sizes into the table; prints what was timed.

  Those near the fastest are timed again, for processes differ by some percent.
  """
  cases = [
    (shape, blocks)
    for shape in shapes
    for blocks in candidates(*parsed(shape)[3:])
  ]
  times: dict[tuple[str, Blocks], list[float]] = {}
  table = block_sizes.table()
  columns = " ".join(f"{field.split('_')[0]:>8}" for field in Blocks._fields)
  print(f"{'shape':20} {columns} {'both':>9}")
  for _ in range(ROUNDS):
    results = run([("pallas_gpu", *case) for case in cases])
    timed: dict[tuple[str, Blocks], float] = {}
    best: dict[str, tuple[float, Blocks]] = {}
    for case, result in zip(cases, results, strict=True):
      shape, blocks = case
      start = f"{shape:20} " + " ".join(f"{size:8}" for size in blocks)
      if "failed" in result:
        print(f"{start} {result['failed'][:120]}", flush=True)
        continue
      print(f"{start} {result['both']:9.3f}", flush=True)
      times.setdefault(case, []).append(result["both"])
      timed[case] = statistics.median(times[case])
      found = timed[case], blocks
      best[shape] = min(best.get(shape, found), found)
      dims = block_sizes.name(*parsed(shape)[3:])
      heads = table.setdefault(result["device"], {})
      heads[dims] = best[shape][1]._asdict()
      block_sizes.TABLE.write_text(json.dumps(table, indent=2) + "\n")
    cases = [
      (shape, blocks)
      for (shape, blocks), time_ in timed.items()
      if time_ <= NEAR * best[shape][0]
    ]


def in_process(
  row: str,
  shape: str,
  blocks: Blocks | None = None,
  *,
  lock: str | None = None,
  time_limit: float = TIME_LIMIT,
) -> dict:
  """`bench` in a process of its own, or why it did not finish."""
  environment = os.environ | {
    "DISABLE_LLVM_OPT": "slp-recursion-max-depth",  # Triton 3.6 aborts else
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  command = [sys.executable, __file__, f"--row={row}", f"--shape={shape}"]
  if blocks is not None:
    command.append("--blocks=" + ",".join(map(str, blocks)))
  if lock is not None:
    command.append(f"--lock={lock}")
  try:
    done = subprocess.run(
      [*command, "--here"],
      env=environment,
      capture_output=True,
      text=True,
      timeout=time_limit,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"no result in {time_limit} s"}
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": last}
  return json.loads(done.stdout.strip().splitlines()[-1])


def line(shape: str, row: str, result: dict) -> str:
  start = f"{shape:20} {row:19}"
  if "failed" in result:
    return f"{start} {result['failed'][:120]}"

  def number(name, width, digits):
    x = result.get(name)
    return f"{'-':>{width}}" if x is None else f"{x:{width}.{digits}f}"

  figures = f"{number('forward', 9, 3)} {number('both', 9, 3)}"
  error = " ".join(f"{n} {e:.1e}" for n, e in result.get("errors", {}).items())
  note = result.get("note", "")[:120]
  return f"{start} {figures} {number('peak_gib', 7, 2)}  {error}{note}"


def parsed(shape: str) -> tuple[int, ...]:
  try:
    numbers = tuple(map(int, shape.split(",")))
  except ValueError:
    numbers = ()
  if len(numbers) not in (4, 5) or min(numbers) < 1:
    raise UserError(
      f"--shape={shape} must be five positive numbers: rows, tokens, heads, "
      "keys, values; for example 8,8192,8,256,512; or four: rows, tokens, "
      "heads, units; for example 16,2048,4,192."
    )
  return numbers


def cases_of(
  shapes: Sequence[str], rows: Sequence[str]
) -> list[tuple[str, str]]:
  """Every row with the shapes that it takes."""
  return [
    (row, shape)
    for shape in shapes
    for row in rows
    if (row in RECURRENT_ROWS) == (len(parsed(shape)) == 4)
  ]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--shape", action="append", help="rows,tokens,heads,K,V")
  parser.add_argument(
    "--row", action="append", choices=(*ROWS, *RECURRENT_ROWS)
  )
  parser.add_argument("--json", type=pathlib.Path, help="where results go")
  parser.add_argument(
    "--jobs", type=int, default=1, help="rows made ready side by side"
  )
  parser.add_argument(
    "--tune", action="store_true", help="write the table of block sizes"
  )
  parser.add_argument(
    "--here", action="store_true", help="one row, in this process, as JSON"
  )
  # With --here: block sizes in the table's order, and the file of who may run.
  parser.add_argument("--blocks", help=argparse.SUPPRESS)
  parser.add_argument("--lock", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.jobs < 1:
    raise UserError(f"--jobs={args.jobs} must be at least 1.")
  if args.tune and (args.row or args.json):
    raise UserError(
      "--tune times the block sizes of pallas_gpu and writes its table; give "
      "it no --row and no --json."
    )
  shapes = args.shape or (SHAPES if args.tune else SHAPES + RECURRENT_SHAPES)
  rows = args.row or ROWS + RECURRENT_ROWS
  if not cases_of(shapes, ROWS if args.tune else rows):
    raise UserError(
      "No row that was asked for takes such a shape: "
      f"{', '.join(RECURRENT_ROWS)} take four numbers, the others five."
    )
  if args.here:
    shape = parsed(shapes[0])
    if args.blocks:
      blocks = Blocks(*map(int, args.blocks.split(",")))
      result = bench_blocks(shape, blocks, args.lock)
    else:
      result = bench(rows[0], shape, args.lock)
    print(json.dumps(result))
    return
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(args.jobs))
    one = functools.partial(in_process, time_limit=TIME_LIMIT * args.jobs)
    if args.jobs > 1 or args.tune:
      file = stack.enter_context(tempfile.NamedTemporaryFile())
      one = functools.partial(one, lock=file.name)

    def run(cases):
      return pool.map(lambda case: one(*case), cases)

    if args.tune:
      tune(shapes, run)
      return
    print(f"{'shape':20} {'row':19} {'forward':>9} {'both':>9}     GiB  errors")
    cases, results = cases_of(shapes, rows), []
    for (row, shape), result in zip(cases, run(cases), strict=True):
      results.append({"shape": shape, "row": row, **result})
      print(line(shape, row, result), flush=True)
      if args.json:  # row after row: a run that is cut off keeps its own
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(exit_code(main))
