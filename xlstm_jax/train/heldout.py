"""Evaluates a run on its held-out text."""

from collections.abc import Callable

from xlstm_jax.checkpoints import EVAL_LOSS
from xlstm_jax.config import RunConfig
from xlstm_jax.data import pipeline
from xlstm_jax.data.shards import Split
from xlstm_jax.evaluate.perplexity import Result, Score, evaluate_split
from xlstm_jax.models.language_model import Params
from xlstm_jax.train.run import Run


def opened(cfg: RunConfig) -> list[Split]:
  """The held-out splits of a run; empty if the run does not evaluate."""
  if cfg.eval_every is None:
    return []
  return pipeline.open_splits(cfg.data, split="heldout")


def scores(
  run: Run, params: Params, *, before_batch: Callable[[], None]
) -> dict[str, float]:
  """The held-out loss, in total and of every source.

  Args:
    run: the run whose held-out text is scored.
    params: the parameters to score.
    before_batch: called before every batch; may raise to end the evaluation.
  """
  cfg = run.cfg
  all_tokens = sum(split.tokens for split in run.heldout)
  sources: dict[str, Score] = {}
  for split in run.heldout:
    limit = cfg.eval_tokens
    if limit is not None:
      limit = max(limit * split.tokens // all_tokens, 1)
    result = evaluate_split(
      run.definition,
      params,
      split,
      context=cfg.data.context,
      batch_size=cfg.batch_size // cfg.accumulation,
      mesh=run.mesh,
      max_tokens=limit,
      piece=cfg.data.context,
      loss_chunk=cfg.loss_chunk,
      before_batch=before_batch,
    )
    for name, score in result.sources.items():
      sources[name] = sources.get(name, Score()) + score
  total = Result(sources).total
  found = {EVAL_LOSS: total.loss, "eval_perplexity": total.perplexity}
  if total.bits_per_byte is not None:
    found["eval_bits_per_byte"] = total.bits_per_byte
  return found | {f"eval_loss/{n}": s.loss for n, s in sources.items()}
