"""Workdirs with a checkpoint, written without training."""

import contextlib
from pathlib import Path

import jax

from xlstm_jax import config
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data.tokenizer import ByteTokenizer
from xlstm_jax.models.language_model import Definition
from xlstm_jax.progress import LossHistory, Progress, WindowOrder


def write_run(
  workdir: Path,
  cfg: RunConfig,
  *,
  steps: dict[int, float],
  tokenizer_hash: str = ByteTokenizer.hash,
) -> dict[int, dict]:
  """Saves other parameters at every step, with a held-out loss each.

  Returns the parameters.
  """
  config.save(workdir, cfg)
  definition = Definition(cfg.model, cfg.compute)
  saved = {}
  keep = CheckpointConfig(keep_latest=len(steps))
  with contextlib.closing(
    Checkpoints(workdir / "checkpoints", keep)
  ) as checkpoints:
    for step, loss in steps.items():
      saved[step] = definition.init(jax.random.key(step))
      progress = Progress(
        step=step,
        windows=0,
        seed=cfg.seed,
        tokenizer=tokenizer_hash,
        data=[],
        order=WindowOrder.of(cfg.data),
        health=LossHistory(),
        owes_evaluation=False,
      )
      checkpoints.save(
        step,
        {"params": saved[step], "progress": progress.to_json()},
        {"eval_loss": loss},
      )
  return saved
