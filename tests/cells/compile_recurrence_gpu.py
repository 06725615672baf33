"""Compiles the recurrent kernels' two passes for an H200 without one.

    python compile_recurrence_gpu.py CELL UNITS [bf16] [mesh] [vmap]

A process compiles for one kind of GPU only, hence a program of its own.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xlstm_jax import sharding
from xlstm_jax.cells import lstm, slstm
from xlstm_jax.plan import machines

CELLS = {"slstm": slstm.slstm, "lstm": lstm.lstm}


def main(cell: str, units: int, options: set[str]) -> None:
  devices = machines.machine(
    "h200:4" if "mesh" in options else "h200:1"
  ).devices
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
  B, T, H, D = 8 * len(devices), 64, 2, units
  dtype = jnp.bfloat16 if "bf16" in options else jnp.float32

  def both(x, R, b, segments, dy):
    def y(x, R, b):
      return CELLS[cell](x, R, b, segments_BT=segments, backend="pallas_gpu")[0]

    found, backward = jax.vjp(y, x, R, b)
    return found, *backward(dy)

  rows, shared = PartitionSpec("data"), PartitionSpec()
  specs = (rows, shared, shared, rows, rows)
  if "mesh" in options:
    both = jax.shard_map(
      both, mesh=mesh, in_specs=specs, out_specs=(rows, rows, shared, shared)
    )
  shapes = [
    ((B, T, 4, H, D), dtype),
    ((4, H, D, D), jnp.bfloat16),
    ((4, H, D), jnp.float32),
    ((B, T), jnp.int32),
    ((B, T, H, D), dtype),
  ]
  if "vmap" in options:
    both = jax.vmap(both)
    shapes = [((2, *shape), dtype) for shape, dtype in shapes]
  types = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for (shape, dtype), spec in zip(shapes, specs, strict=True)
  ]
  with jax.set_mesh(mesh):
    memory = jax.jit(both).lower(*types).compile().memory_analysis()
  print(memory.temp_size_in_bytes)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), set(sys.argv[3:]))
