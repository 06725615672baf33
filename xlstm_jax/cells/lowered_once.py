"""Kernels that a process lowers and compiles once.

Python takes a second to lower a kernel of the mLSTM, and the compiler several.
JAX lowers it again for every program that has the kernel, and JAX 0.11 compiles
it again, too: it numbers what it lowers, and the number is part of what finds a
compiled kernel. Here it is lowered into a module of its own (`jax.export`),
which the programs call.
"""

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import jax.export

from xlstm_jax.cells.more_rows import more_rows
from xlstm_jax.cells.varying import vary_together

PLATFORM = "cuda"


def lowered_once(*static: str) -> Callable[[Callable], Callable]:
  """Decorates a kernel of arrays that all have batch rows in front.

  The rows of a `vmap` become more of these. In interpret mode, which a static
  argument "interpret" switches on, the kernel is an ordinary function.

  Args:
    static: names of the arguments that are no arrays; all go by name.
  """

  def decorate(kernel):
    def function(tree, options):
      def of(*leaves):
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return kernel(*args, **kwargs, **dict(options))

      return of

    @functools.cache
    def exported(tree, options, *shapes):
      export = jax.export.export(
        jax.jit(function(tree, options)), platforms=[PLATFORM]
      )
      # Contexts of the caller, a mesh for one, end at a thread's border.
      with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(export, *shapes).result()

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(tree, options, *leaves):
      if dict(options).get("interpret"):
        return function(tree, options)(*leaves)
      shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
      results = exported(tree, options, *shapes).call(*leaves)
      # What is exported does not tell over which axes of a mesh it varies.
      return vary_together(results, leaves)[0]

    @functools.wraps(kernel)
    def call(*args, **kwargs):
      options = tuple((n, kwargs.pop(n)) for n in static if n in kwargs)
      leaves, tree = jax.tree.flatten((args, kwargs))

      return more_rows(functools.partial(run, tree, options))(*leaves)

    return call

  return decorate
