"""The evaluators by name, and which of them a run has."""

import dataclasses

from xlstm_jax import metrics
from xlstm_jax.evaluators import perplexity
from xlstm_jax.evaluators.evaluator import Evaluator, Subject

# `evaluate` reports this one in full, by its own options.
PERPLEXITY = "perplexity"
EVALUATORS: dict[str, Evaluator] = {
  PERPLEXITY: Evaluator(perplexity.run, reads_heldout=True),
}


@dataclasses.dataclass(frozen=True)
class EvaluatorsConfig:
  """What evaluates a run; an evaluator's settings are a field of its name.

  Attributes:
    names: The evaluators that run every `eval_every` steps and in `evaluate`.
      Checkpoints are ranked by the held-out loss of "perplexity".
  """

  names: tuple[str, ...] = (PERPLEXITY,)

  @property
  def read_heldout(self) -> bool:
    """Whether any of them needs held-out text."""
    return any(EVALUATORS[name].reads_heldout for name in self.names)


def figures(
  subject: Subject, cfg: EvaluatorsConfig, names: tuple[str, ...]
) -> dict[str, float]:
  """The figures of some evaluators, each as "eval_" and its name.

  Raises:
    ValueError: two evaluators give a figure of the same name.
  """
  found: dict[str, float] = {}
  for name in names:
    settings = getattr(cfg, name, None)
    for figure, value in EVALUATORS[name].run(subject, settings).items():
      key = f"{metrics.EVALUATED}{figure}"
      if key in found:
        raise ValueError(f"{name} gives {figure!r}, as another evaluator does")
      found[key] = value
  return found
