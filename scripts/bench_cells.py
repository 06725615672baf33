"""Times the mLSTM's backends and their public peers, errors beside each time.

  python scripts/bench_cells.py --json=bench.json
  python scripts/bench_cells.py --shape=1,256,2,64,128 --row=chunkwise-64

A shape is rows, tokens, heads, keys and values. Every row of the table runs in
a process of its own; one that cannot run says why. Times are medians of
rounds, in ms, on random bfloat16 data; errors are relative to the definition
in float64, on 256 tokens of the same heads. Peers: mlstm_kernels' two Triton
kernels (without the normaliser's gradient), FLA's simple_gla
and cuDNN's causal attention in JAX, of the same width in heads of 128; the last
two compute something else and so have no errors. FLA refuses the backward pass
of simple_gla on Hopper with Triton from 3.4 to before 3.7.1.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.cells.mlstm import mlstm
from xlstm_jax.errors import UserError, exit_code

ROWS = (
  "pallas_gpu",
  "pallas_gpu-128",
  "chunkwise-64",
  "chunkwise-128",
  "chunkwise-256",
  "mlstm_kernels-xl",
  "mlstm_kernels-limit",
  "simple_gla",
  "cudnn",
)
IN_TORCH = ("mlstm_kernels-xl", "mlstm_kernels-limit", "simple_gla")
OTHER_FUNCTIONS = ("simple_gla", "cudnn")
SHAPES = ("8,8192,8,256,512", "8,8192,16,128,256")
GRADIENTS = ("dq", "dk", "dv", "di", "df")
DRAWN = 8192  # random tokens, which repeat: drawing more takes a minute
TIME_LIMIT = 600  # seconds for a row, compilation included


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


def jax_functions(row: str):
  """Forward, and forward and backward, of (q, k, v, i, f, dh)."""
  backend, _, chunk = row.partition("-")

  def cell(q, k, v, i, f):
    options = {"backend": backend, "chunk": int(chunk) if chunk else None}
    return mlstm(q, k, v, i_BTH=i, f_BTH=f, **options)[0]

  def attention(q, k, v, i, f):
    del i, f
    # Queries and keys as wide as the values: copies fill them up.
    q, k = (jnp.concatenate([x, x], -1)[..., : v.shape[-1]] for x in (q, k))
    heads = (*v.shape[:2], -1, 128)
    q, k, v = (x.reshape(heads) for x in (q, k, v))
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation="cudnn"
    )

  forward = attention if row == "cudnn" else cell

  def both(q, k, v, i, f, dh):
    h, back = jax.vjp(forward, q, k, v, i, f)
    return h, back(dh.reshape(h.shape))

  return jax.jit(forward), jax.jit(both)


def jax_arrays(x, dtype):
  wide = jnp.promote_types(dtype, jnp.float32)
  tokens = [jnp.asarray(x[name], dtype) for name in ("q", "k", "v")]
  gates = [jnp.asarray(x[name], wide) for name in ("i", "f")]
  return [*tokens, *gates, jnp.asarray(x["dh"], dtype)]


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
    a = x[name] if row == "simple_gla" else heads_first(x[name])
    a = torch.tensor(a.copy()).cuda()
    return a if name in ("i", "f") else a.to(torch.bfloat16)

  return [placed(name) for name in ("q", "k", "v", "i", "f", "dh")]


def heads_first(a):
  """[B, T, H, ...] as mlstm_kernels has it, [B, H, T, ...], and back."""
  return a.swapaxes(1, 2)


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


def truth(x) -> list[np.ndarray]:
  """h and the gradients by the definition in float64."""
  with jax.enable_x64(True):
    _, both = jax_functions("recurrent")
    h, gradients = both(*jax_arrays(x, jnp.float64))
    return [np.asarray(a) for a in (h, *gradients)]


def errors(results, x) -> dict[str, float]:
  pairs = zip(("h", *GRADIENTS), results, truth(x), strict=True)
  return {
    name: float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))
    for name, a, b in pairs
  }


def bench(row: str, shape: tuple[int, ...]) -> dict:
  """One row of the table, in this process."""
  small = inputs((1, 256, 2, *shape[3:]))
  if row in IN_TORCH:
    import torch  # pyright: ignore[reportMissingImports]

    forward, both = torch_functions(row)
    arrays, few = (torch_arrays(row, x) for x in (inputs(shape), small))

    def wait(x):
      del x
      torch.cuda.synchronize()

    def from_device(a):
      return heads_first(a.detach().float().cpu().numpy())

    to_numpy = from_device
  else:
    forward, both = jax_functions(row)
    arrays, few = (jax_arrays(x, jnp.bfloat16) for x in (inputs(shape), small))

    def wait(x):
      jax.block_until_ready(x)

    to_numpy = np.asarray

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
  if row in IN_TORCH:
    import torch  # pyright: ignore[reportMissingImports]

    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
  elif statistics_ := jax.devices()[0].memory_stats():
    result["peak_gib"] = statistics_["peak_bytes_in_use"] / 2**30
  if row not in OTHER_FUNCTIONS:
    h, gradients = both(*few)
    result["errors"] = errors([to_numpy(a) for a in (h, *gradients)], small)
  return result


def in_process(row: str, shape: str) -> dict:
  """`bench` in a process of its own, or why it did not finish."""
  environment = os.environ | {
    "DISABLE_LLVM_OPT": "slp-recursion-max-depth",  # Triton 3.6 aborts else
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  command = [sys.executable, __file__, f"--row={row}", f"--shape={shape}"]
  try:
    done = subprocess.run(
      [*command, "--here"],
      env=environment,
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
  if len(numbers) != 5 or min(numbers) < 1:
    raise UserError(
      f"--shape={shape} must be five positive numbers: rows, tokens, heads, "
      "keys, values; for example 8,8192,8,256,512."
    )
  return numbers


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--shape", action="append", help="rows,tokens,heads,K,V")
  parser.add_argument("--row", action="append", choices=ROWS)
  parser.add_argument("--json", type=pathlib.Path, help="where results go")
  parser.add_argument(
    "--here", action="store_true", help="one row, in this process, as JSON"
  )
  args = parser.parse_args(argv)
  shapes, rows = args.shape or SHAPES, args.row or ROWS
  for shape in shapes:
    parsed(shape)
  if args.here:
    print(json.dumps(bench(rows[0], parsed(shapes[0]))))
    return
  print(f"{'shape':20} {'row':19} {'forward':>9} {'both':>9}     GiB  errors")
  results = []
  for shape in shapes:
    for row in rows:
      result = in_process(row, shape)
      results.append({"shape": shape, "row": row, **result})
      print(line(shape, row, result), flush=True)
  if args.json:
    args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(exit_code(main))
