"""xLSTM[1:0] of 1.42B parameters ("1.3B") on 15B tokens of SlimPajama.

The recipe of the xLSTM paper (arXiv 2405.04517); docs/slimpajama.md makes the
data:

  python -m xlstm_jax.train --config=experiments/xlstm_1b.py \\
    --workdir=runs/xlstm_1b

  [7:1]        --config=experiments/xlstm_1b.py:7:1
  300B tokens  --config.steps=300000 --config.batch_size=512
               --config.accumulation=32 --config.optim.peak_lr=5e-4

Published (xLSTM paper): peak learning rate 9e-4, and what all sizes share
(`xlstm_jax/config/recipes.py`). Ours: remat, accumulation and the mesh, which
change memory and speed only.

Machine: one H200 (h200:1). Computing 16 rows at a time and keeping their matmul
outputs takes 63 of the 105 GiB that JAX has there (compiled, docs/plan.md). On
n devices divide the accumulation by n, so that each device has as many rows at
a time.

Cost: computed, 1.64e20 training FLOPs (10.4 GFLOP a token, models.counts, and
15.7B tokens). Measured on one H200 (jax 0.11.2), with four of the parts: 23,300
tokens/s or 187 H200-hours, [7:1] 21,400 or 204.

Expected, validation perplexity: after 15B tokens unknown; after 300B tokens
8.89, [7:1] 9.00 (published). Measured: unknown.
"""

from ml_collections import ConfigDict

from xlstm_jax import config
from xlstm_jax.config import recipes
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models import presets
from xlstm_jax.sharding import MeshConfig

MACHINE = "h200:1"


def get_config(ratio: str = "1:0") -> ConfigDict:
  """The run; `ratio` is of mLSTM to sLSTM blocks, "1:0" or "7:1"."""
  return config.to_config_dict(
    recipes.slimpajama_15b(
      presets.paper("1.3B", ratio),
      peak_lr=9e-4,
      mesh=MeshConfig(data=1, fsdp=-1),
      compute=Compute(dtype="bfloat16", remat="matmuls"),
      accumulation=16,
    )
  )
