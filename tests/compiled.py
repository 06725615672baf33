"""Compilation for tests: half the time, for programs that run once.

In a session of pytest it is that of all programs (conftest.py).
"""

import functools

import jax

jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)
