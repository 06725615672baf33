"""One of two processes that evaluate together: RANK PORT DATA."""

import sys

import jax

rank, port, data = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))

# These touch devices, which must be those of both processes.
from test_evaluate import DEFINITION  # noqa: E402

from xlstm_jax import sharding  # noqa: E402
from xlstm_jax.evaluate.perplexity import evaluate_split  # noqa: E402

mesh = sharding.make_mesh(sharding.MeshConfig())
where = sharding.shardings(mesh, DEFINITION.axes(), DEFINITION.abstract())
params = jax.jit(DEFINITION.init, out_shardings=where)(jax.random.key(0))
for context in (16, "document"):
  result = evaluate_split(
    DEFINITION,
    params,
    data,
    context=context,
    batch_size=4,
    mesh=mesh,
    piece=16,
  )
  print("nats", result.total.nats)
