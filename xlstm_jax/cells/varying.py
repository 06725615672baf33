"""Makes arrays vary over the same mesh axes, as loops in JAX require."""

import jax


def vary_together[*Trees](*trees: *Trees) -> tuple[*Trees]:
  """`trees`, with every array varying over each mesh axis that any varies over.

  Inside `jax.shard_map`, JAX distinguishes arrays that are equal on every
  device, such as zeros, from arrays that vary. A scan must not carry an array
  that is one first and the other later. The gradient of an array that was equal
  everywhere is the sum over the devices. Outside `jax.shard_map`, and with
  `check_vma=False`, this function does nothing.
  """
  varying = frozenset().union(
    *(jax.typeof(x).mat.varying for x in jax.tree.leaves(trees))
  )

  def vary(x):
    # Sorted, because every process has to build the same program.
    missing = tuple(sorted(varying - jax.typeof(x).mat.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, trees)
