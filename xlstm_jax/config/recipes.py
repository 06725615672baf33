"""Published training recipes, which experiments complete."""

from xlstm_jax.config.run import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.optim import OptimConfig
from xlstm_jax.sharding import MeshConfig


def slimpajama_15b(
  model: ModelConfig,
  *,
  peak_lr: float,
  mesh: MeshConfig,
  compute: Compute,
  accumulation: int,
) -> RunConfig:
  """15B tokens of SlimPajama, as the xLSTM paper trains (arXiv 2405.04517).

  Published: GPT-2 tokenizer, windows of 2048, 256 sequences a batch, 30k steps
  (compared after 28,170), AdamW (0.9, 0.95) with eps 1e-5, weight decay 0.1 but
  not on embeddings, warm-up over 750 steps, cosine to a tenth, untied
  embeddings. Published by a third party: clipping at a global norm of 1.

  Args:
    model: a model of `presets.paper`.
    peak_lr: peak learning rate, published for every size.
    mesh: arrangement of the devices. This and the next two are ours; they
      change memory and speed only.
    compute: precision, and what is recomputed.
    accumulation: number of parts of a batch.
  """
  return RunConfig(
    model=model,
    data=DataConfig(paths=("data/slimpajama",), context=2048),
    optim=OptimConfig(
      peak_lr=peak_lr,
      schedule="cosine",
      warmup_steps=750,
      final_fraction=0.1,
      eps=1e-5,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    mesh=mesh,
    compute=compute,
    steps=30_000,
    batch_size=256,
    accumulation=accumulation,
    loss_chunk=256,
    eval_every=1000,
    eval_tokens=2**22,
    save_every=1000,
  )
