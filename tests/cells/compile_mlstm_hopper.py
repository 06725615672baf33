"""Compiles the kernels' forward and backward pass for an H200 without one.

    python compile_mlstm_hopper.py KEYS VALUES [plain] [large] [mesh] [twice]

"plain" is without the normaliser; "large" is of 65,536 tokens and 384 keys in
all heads; "mesh" divides the rows over four GPUs by `jax.shard_map`. It prints
how many bytes the program needs on a GPU, arguments and results included.
"twice" lowers another program with the same kernels, too, and tells by what
hashes the compiled kernels of both are found. A process compiles for one kind
of GPU only, hence a program of its own.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xlstm_jax import sharding
from xlstm_jax.cells.mlstm import mlstm
from xlstm_jax.plan import machines


def main(key_dim: int, value_dim: int, options: set[str]) -> None:
  devices = machines.machine(
    "h200:4" if "mesh" in options else "h200:1"
  ).devices
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
  batch, time, heads = 2 * len(devices), 1024, 2
  if "large" in options:
    batch, time, heads = 32, 2048, 384 // key_dim

  def forward(q, k, v, i, f):
    gates = {"i_BTH": i, "f_BTH": f}
    normalize = "plain" not in options
    h, _ = mlstm(q, k, v, **gates, normalize=normalize, backend="pallas_gpu")
    return h

  def both(q, k, v, i, f, dh):
    h, backward = jax.vjp(forward, q, k, v, i, f)
    return h, backward(dh)

  rows = PartitionSpec("data")
  if "mesh" in options:
    both = jax.shard_map(both, mesh=mesh, in_specs=rows, out_specs=rows)

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, rows)
    )

  dims = (key_dim, key_dim, value_dim, value_dim)
  *tokens, dh = [array(batch, time, heads, dim) for dim in dims]
  gates = [array(batch, time, heads, dtype=jnp.float32)] * 2
  types = [*tokens, *gates, dh]

  def half(*args):
    return both(*args[:-1], args[-1] / 2)

  with jax.set_mesh(mesh):
    lowered = jax.jit(both).lower(*types)
    if "twice" in options:
      again = jax.jit(half).lower(*types)
      print(json.dumps([kernel_hashes(lowered), kernel_hashes(again)]))
    else:
      memory = lowered.compile().memory_analysis()
      parts = ("argument", "output", "temp")
      print(sum(getattr(memory, f"{part}_size_in_bytes") for part in parts))


def kernel_hashes(lowered) -> list[str]:
  return sorted(set(re.findall(r'kernel_hash = "(.*?)",', lowered.as_text())))


if __name__ == "__main__":
  keys, values = map(int, sys.argv[1:3])
  main(keys, values, set(sys.argv[3:]))
