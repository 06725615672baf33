"""The evaluation of a run, by the evaluators of its configuration."""

from collections.abc import Callable

from xlstm_jax.config import RunConfig
from xlstm_jax.data import pipeline
from xlstm_jax.data.shards import Split
from xlstm_jax.evaluators import table
from xlstm_jax.evaluators.evaluator import Subject
from xlstm_jax.models.language_model import Params
from xlstm_jax.train.run import Run


def opened(cfg: RunConfig) -> list[Split]:
  """The held-out splits of a run that evaluates on them."""
  if cfg.eval_every is None or not cfg.evaluators.read_heldout:
    return []
  return pipeline.open_splits(cfg.data, split="heldout")


def scores(
  run: Run, params: Params, *, before_batch: Callable[[], None]
) -> dict[str, float]:
  """The figures of all evaluators.

  Args:
    run: whose evaluators and held-out text.
    params: to score.
    before_batch: called before every batch; may raise to end the evaluation.
  """
  cfg = run.cfg
  subject = Subject(
    definition=run.definition,
    params=params,
    mesh=run.mesh,
    heldout=run.heldout,
    context=cfg.data.context,
    batch_size=cfg.batch_size // cfg.accumulation,
    piece=cfg.data.context,
    loss_chunk=cfg.loss_chunk,
    max_tokens=cfg.eval_tokens,
    before_batch=before_batch,
  )
  return table.figures(subject, cfg.evaluators, cfg.evaluators.names)
