"""A run of seconds, for the checkpoint that is kept beside this file."""

from xlstm_jax.config import RunConfig, to_config_dict


def get_config():
  cfg = to_config_dict(RunConfig())
  cfg.model.vocab_size = 320
  cfg.model.width = 16
  cfg.model.num_blocks = 2
  cfg.model.slstm_at = (1,)
  cfg.model.mlstm.num_heads = 2
  cfg.model.mlstm.round_to = 16
  cfg.model.slstm.num_heads = 2
  cfg.model.dropout = 0.1
  cfg.compute.dtype = "float32"
  cfg.data.context = 32
  cfg.batch_size = 8
  cfg.optim.warmup_steps = 3
  cfg.steps = 6
  cfg.log_every = 1
  cfg.save_every = 2
  cfg.eval_every = 4
  cfg.checkpoint.keep_latest = 3
  cfg.compilation_cache = None
  return cfg
