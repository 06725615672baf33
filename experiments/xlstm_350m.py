"""xLSTM[1:0] of 409M parameters ("350M") on 15B tokens of SlimPajama.

The recipe of the xLSTM paper (arXiv 2405.04517); docs/slimpajama.md makes the
data:

  python -m xlstm_jax.train --config=experiments/xlstm_350m.py \\
    --workdir=runs/xlstm_350m

  [7:1]        --config=experiments/xlstm_350m.py:7:1
  300B tokens  --config.steps=600000 --config.optim.peak_lr=7.5e-4

Published (xLSTM paper): peak learning rate 1e-3, and what all sizes share
(`xlstm_jax/config/recipes.py`). Ours: remat, accumulation and the mesh, which
change memory and speed only.

Machine: one H100 of 80 GB (h100:1). Computing 16 rows at a time and keeping
their matmul outputs takes 25 of the 59 GiB that JAX has there (compiled,
docs/plan.md). On n devices divide the accumulation by n, so that each device
has as many rows at a time.

Cost: computed, 4.39e19 training FLOPs (2.79 GFLOP a token, models.counts, and
15.7B tokens). Measured on one H200 (jax 0.11.2), with four of the parts: 64,000
tokens/s or 68 H200-hours, [7:1] 58,500 or 75.

Expected, validation perplexity: after 15B tokens 13.43, [7:1] 13.48; after 300B
tokens 11.31, [7:1] 11.37 (all published). Measured: unknown.
"""

from ml_collections import ConfigDict

from xlstm_jax import config
from xlstm_jax.config import recipes
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models import presets
from xlstm_jax.sharding import MeshConfig

MACHINE = "h100:1"


def get_config(ratio: str = "1:0") -> ConfigDict:
  """The run; `ratio` is of mLSTM to sLSTM blocks, "1:0" or "7:1"."""
  return config.to_config_dict(
    recipes.slimpajama_15b(
      presets.paper("350M", ratio),
      peak_lr=1e-3,
      mesh=MeshConfig(data=-1),
      compute=Compute(dtype="bfloat16", remat="matmuls"),
      accumulation=16,
    )
  )
