"""A small xLSTM[3:1] on the standard library's source files, byte by byte.

`make quickstart` prepares the corpus, runs this, evaluates and samples. By hand
(docs/tutorial.md), after the preparation:

  python -m xlstm_jax.train --config=experiments/quickstart.py \\
    --workdir=runs/quickstart

Machine: any CPU (cpu), with 2 GiB of memory for the step.

Cost: measured on 2 CPU cores, 3m10s in all, 4m00s with the environment.

Expected: measured, 1.93 bits per held-out byte (perplexity 3.81); a byte bigram
model reaches 3.54.
"""

from ml_collections import ConfigDict

from xlstm_jax import config
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.optim import OptimConfig

MACHINE = "cpu"


def get_config() -> ConfigDict:
  """The run as the command line sees it."""
  return config.to_config_dict(
    config.RunConfig(
      model=ModelConfig(vocab_size=257, width=128, num_blocks=4, slstm_at=(1,)),
      data=DataConfig(paths=("runs/quickstart/data",), context=256),
      optim=OptimConfig(peak_lr=8e-3, warmup_steps=50, final_fraction=0.02),
      # bfloat16 gains nothing on a CPU.
      compute=Compute(dtype="float32"),
      steps=800,
      batch_size=4,
      log_every=20,
      eval_every=200,
      eval_tokens=2**15,
      save_every=200,
    )
  )
