"""xLSTM[1:0] of 409M parameters ("350M") on 15B tokens of SlimPajama.

The recipe of the xLSTM paper (arXiv 2405.04517); docs/slimpajama.md makes the
data:

  python -m xlstm_jax.train --config=experiments/xlstm_350m.py \\
    --workdir=runs/xlstm_350m

  [7:1]        --config=experiments/xlstm_350m.py:7:1
  300B tokens  --config.steps=600000 --config.optim.peak_lr=7.5e-4

Published (xLSTM paper): GPT-2 tokenizer, windows of 2048, 256 sequences a
batch, 30k steps (compared after 28,170), AdamW (0.9, 0.95) with eps 1e-5,
weight decay 0.1 but not on embeddings, peak learning rate 1e-3, warm-up over
750 steps, cosine to a tenth, untied embeddings. Published by a third party:
clipping at a global norm of 1. Ours: remat, accumulation and the mesh, which
change memory only.

Cost: computed, 4.39e19 training FLOPs (2.79 GFLOP a token, models.counts, and
15.7B tokens), or 31 H200-hours at 40 % of 989 TFLOP/s. Measured: unknown.

Expected, validation perplexity: after 15B tokens 13.43, [7:1] 13.48; after 300B
tokens 11.31, [7:1] 11.37 (all published). Measured: unknown.
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
      presets.paper("350M", ratio),
      peak_lr=1e-3,
      mesh=MeshConfig(data=-1),
      compute=Compute(dtype="bfloat16", remat="none"),
      accumulation=64,
    )
  )
