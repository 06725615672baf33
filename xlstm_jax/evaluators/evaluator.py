"""What an evaluator is given, and what it is in the table."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from xlstm_jax.data.shards import Split
from xlstm_jax.models.language_model import Definition, Params

Context = int | Literal["document"]
# By name; a name may have parts, as in "loss/books".
Figures = Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """A model to evaluate, and how.

  Attributes:
    definition: The model; dropout is off.
    params: Its parameters, on `mesh`.
    mesh: Rows are spread over data and fsdp, positions over sequence.
    heldout: Splits of text that was not trained on; none where no evaluator of
      the run reads it.
    context: Positions of a window, each from an empty state; or "document",
      where the state is carried through every document.
    batch_size: Rows at a time, at most.
    piece: Positions at a time of a longer window or document.
    loss_chunk: Positions whose logits exist at a time.
    max_tokens: Held-out targets to score, about; None for all.
    before_batch: To be called before every batch; may raise to end the
      evaluation.
  """

  definition: Definition
  params: Params
  mesh: Mesh
  heldout: Sequence[Split]
  context: Context
  batch_size: int
  piece: int
  loss_chunk: int = 256
  max_tokens: int | None = None
  before_batch: Callable[[], None] = lambda: None


class Evaluator(NamedTuple):
  """A row of the table.

  Attributes:
    run: Gives the figures of a subject, with the settings of `EvaluatorsConfig`
      under this evaluator's name, or None where it has none. All processes call
      it and must come to the same figures.
    reads_heldout: Whether it needs held-out text.
  """

  run: Callable[[Subject, object], Figures]
  reads_heldout: bool
