"""Compiles the recurrent cells' TPU kernels, forward and backward, without one.

    python compile_recurrence_tpu.py CHIP UNITS,ROWS[,OPTION...] ...

CHIP is v5e, v5p, v6e or v7x; options are "lstm" for that cell, "float32" for
such matrices, "bfloat16" for such inputs, and "mesh" for as many rows on each
of two devices, by `jax.shard_map`. Four heads, as the paper's models have.
"""

import os
import sys
import time

os.environ |= {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_SKIP_MDS_QUERY": "true",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_STDERR_LOG_LEVEL": "3",
}

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from xlstm_jax import sharding
from xlstm_jax.cells.lstm import lstm
from xlstm_jax.cells.slstm import slstm

TOPOLOGIES = {
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "v7x": "tpu7x:2x2x1",
}
HEADS, TIME = 4, 256


def main(chip: str, cases: list[str]) -> None:
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=TOPOLOGIES[chip]
  )
  for case in cases:
    D, B, *options = case.split(",")
    count = 2 if "mesh" in options else 1
    mesh = sharding.make_mesh(sharding.MeshConfig(), described.devices[:count])
    started = time.monotonic()
    with jax.set_mesh(mesh):
      compile_case(int(D), count * int(B), options, mesh)
    print(f"{case} compiled in {time.monotonic() - started:.0f} s")


def compile_case(D: int, B: int, options: list[str], mesh) -> None:
  rows, shared = PartitionSpec("data"), PartitionSpec()
  cell = lstm if "lstm" in options else slstm
  of_x = "bfloat16" if "bfloat16" in options else "float32"
  of_R = "float32" if "float32" in options else "bfloat16"

  def both(x, R, b, segments, dy):
    def forward(x, R, b):
      return cell(x, R, b, segments_BT=segments, backend="pallas_tpu")[0]

    y, back = jax.vjp(forward, x, R, b)
    return y, back(dy)

  def array(*shape, dtype, spec):
    place = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  args = (
    array(B, TIME, 4, HEADS, D, dtype=of_x, spec=rows),
    array(4, HEADS, D, D, dtype=of_R, spec=shared),
    array(4, HEADS, D, dtype="float32", spec=shared),
    array(B, TIME, dtype="int32", spec=rows),
    array(B, TIME, HEADS, D, dtype=of_x, spec=rows),
  )
  if "mesh" in options:
    both = jax.shard_map(
      both,
      mesh=mesh,
      in_specs=(rows, shared, shared, rows, rows),
      out_specs=(rows, (rows, shared, shared)),
    )
  text = jax.jit(both).lower(*args).compile().as_text()
  for name in ("recurrent_forward", "recurrent_backward"):
    assert name in text, f"the program has no {name}"


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2:])
