"""Compiles the kernels' forward and backward pass for an H200 without one.

    python compile_pallas_gpu.py KEYS VALUES [plain] [twice]

"plain" is without the normaliser; "twice" lowers another program with the same
kernels, too, and tells by what hashes the compiled kernels of both are found. A
process compiles for one kind of GPU only, hence a program of its own.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp

from xlstm_jax import sharding
from xlstm_jax.cells.documents import documents
from xlstm_jax.cells.mlstm.pallas_gpu import pallas_gpu
from xlstm_jax.cells.mlstm.state import empty_state
from xlstm_jax.plan import machines


def main(key_dim: int, value_dim: int, *, normalize: bool, twice: bool) -> None:
  batch, time, heads = 2, 1024, 2

  def loss(q, k, v, i, f):
    state = empty_state(batch, heads, key_dim, value_dim, jnp.float32)
    h, _ = pallas_gpu(
      q,
      k,
      v,
      i,
      f,
      documents(None, state.segment_B, time),
      state,
      stabilize=True,
      normalize=normalize,
      eps=1e-6,
    )
    return jnp.sum(h.astype(jnp.float32) ** 2)

  mesh = sharding.make_mesh(
    sharding.MeshConfig(), machines.machine("h200:1").devices
  )

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.replicated(mesh)
    )

  tokens = [array(batch, time, heads, d) for d in (key_dim, key_dim, value_dim)]
  gates = [array(batch, time, heads, dtype=jnp.float32)] * 2

  def half(*args):
    return loss(*args) / 2

  with jax.set_mesh(mesh):
    lowered = gradients(loss).lower(*tokens, *gates)
    if twice:
      again = gradients(half).lower(*tokens, *gates)
      print(json.dumps([kernel_hashes(lowered), kernel_hashes(again)]))
    else:
      lowered.compile()


def kernel_hashes(lowered) -> list[str]:
  return sorted(set(re.findall(r'kernel_hash = "(.*?)",', lowered.as_text())))


def gradients(function):
  return jax.jit(jax.grad(function, (0, 1, 2, 3, 4)))


if __name__ == "__main__":
  keys, values = map(int, sys.argv[1:3])
  main(
    keys,
    values,
    normalize="plain" not in sys.argv,
    twice="twice" in sys.argv,
  )
