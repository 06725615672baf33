"""An experiment of two blocks of the 7B kind, with heads of 64 x 128."""

from ml_collections import ConfigDict

from xlstm_jax import config
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.sharding import MeshConfig

CFG = config.RunConfig(
  model=ModelConfig(
    vocab_size=1024,
    width=512,
    num_blocks=2,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=4),
  ),
  data=DataConfig(context=512),
  mesh=MeshConfig(data=1, fsdp=-1),
  compute=Compute(dtype="bfloat16", remat="block"),
  batch_size=16,
)


def get_config() -> ConfigDict:
  """The run as the command line sees it."""
  return config.to_config_dict(CFG)
