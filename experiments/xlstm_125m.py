"""xLSTM[1:0] of 164M parameters ("125M") on 15B tokens of SlimPajama.

The recipe of the xLSTM paper (arXiv 2405.04517); docs/slimpajama.md makes the
data:

  python -m xlstm_jax.train --config=experiments/xlstm_125m.py \\
    --workdir=runs/xlstm_125m

  [7:1]        --config=experiments/xlstm_125m.py:7:1  (the places of its two
               sLSTM blocks are recalled, not published)
  300B tokens  --config.steps=600000 --config.optim.peak_lr=1.5e-3

Published (xLSTM paper): GPT-2 tokenizer, windows of 2048, 256 sequences a
batch, 30k steps (compared after 28,170), AdamW (0.9, 0.95) with eps 1e-5,
weight decay 0.1 but not on embeddings, peak learning rate 3e-3, warm-up over
750 steps, cosine to a tenth, untied embeddings. Published by a third party:
clipping at a global norm of 1. Ours: the accumulation and the mesh, which
change memory only.

Cost: computed, 1.47e19 training FLOPs (0.936 GFLOP a token, models.counts, and
15.7B tokens), or 10 H200-hours at 40 % of 989 TFLOP/s. Measured: unknown.

Expected, validation perplexity: after 15B tokens unknown; after 300B tokens
14.63, [7:1] 14.60 (published). Measured: unknown.
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
      presets.paper("125M", ratio),
      peak_lr=3e-3,
      mesh=MeshConfig(data=-1),
      compute=Compute(dtype="bfloat16", remat="none"),
      accumulation=32,
    )
  )
