"""Arrays that vary over the same axes of a mesh, as loops want them."""

import jax


def alike[*Trees](*trees: *Trees) -> tuple[*Trees]:
  """`trees`, every array varying over all mesh axes over which any varies.

  Inside `jax.shard_map` JAX tells arrays that are the same on every device,
  zeros for one, from others, and what a scan carries must not turn from the
  one into the other. The gradient of an array that was the same is the sum
  over the devices. Elsewhere, with `check_vma=False` too, this does nothing.
  """
  varying = frozenset().union(
    *(jax.typeof(x).mat.varying for x in jax.tree.leaves(trees))
  )

  def vary(x):
    # Sorted, for every process has to make the same program.
    missing = tuple(sorted(varying - jax.typeof(x).mat.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, trees)
