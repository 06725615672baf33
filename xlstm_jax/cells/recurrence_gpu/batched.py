"""`jax.vmap` of the kernels: more rows, or more heads."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from xlstm_jax.cells.varying import vary_together


def batched(
  function: Callable, terms: Sequence[str], results: Sequence[str]
) -> Callable:
  """`function` of arrays with a rule for `vmap`.

  What shares its matrices becomes more rows; with matrices of its own, more
  heads.

  Args:
    function: Of arrays to a tuple of arrays.
    terms: The axes of every argument, a letter each: B is rows, and H heads or
      F groups of heads.
    results: The axes of every result.
  """

  @jax.custom_batching.custom_vmap
  def run(*args):
    # What a kernel returns does not tell over which axes of a mesh it varies.
    return vary_together(function(*args), args)[0]

  @run.def_vmap
  def _rule(size, are_batched, *args):
    own_matrices = any(
      is_batched and "B" not in term
      for is_batched, term in zip(are_batched, terms, strict=True)
    )
    letters = "HF" if own_matrices else "B"

    def fold(x, is_batched, term):
      axis = _axis(term, letters)
      if axis is None:
        return x
      if not is_batched:
        x = jnp.broadcast_to(x, (size, *x.shape))
      x = jnp.moveaxis(x, 0, axis)
      return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def unfold(x: Array, term: str) -> Array:
      axis = _axis(term, letters)
      assert axis is not None, "every result has rows and heads"
      shape = (*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
      return jnp.moveaxis(x.reshape(shape), axis, 0)

    found = run(*map(fold, args, are_batched, terms))
    found = tuple(map(unfold, found, results))
    return found, (True,) * len(found)

  return run


def _axis(term: str, letters: str) -> int | None:
  """The axis of a term that has one of the letters."""
  return next((term.index(x) for x in letters if x in term), None)
