"""Exact perplexity and bits per byte of a split."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from xlstm_jax import sharding
from xlstm_jax.data.shards import Split, open_split
from xlstm_jax.errors import UserError
from xlstm_jax.evaluate import batches
from xlstm_jax.evaluate.batches import Batch
from xlstm_jax.models.language_model import Definition, Params
from xlstm_jax.objective import token_losses

Context = int | Literal["document"]


@dataclasses.dataclass(frozen=True)
class Score:
  """The loss summed over `tokens` targets.

  Attributes:
    nats: the sum of -log p(target).
    tokens: targets: the tokens of documents and their ends.
    bytes: UTF-8 bytes of the text these targets are; None when they are a
      part of the split.
  """

  nats: float = 0.0
  tokens: int = 0
  bytes: int | None = 0

  def __add__(self, other: "Score") -> "Score":
    size = None
    if self.bytes is not None and other.bytes is not None:
      size = self.bytes + other.bytes
    return Score(self.nats + other.nats, self.tokens + other.tokens, size)

  @property
  def loss(self) -> float:
    """Nats per target."""
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    """exp(loss)."""
    with np.errstate(over="ignore"):
      return float(np.exp(self.loss))

  @property
  def bits_per_byte(self) -> float | None:
    """Bits per UTF-8 byte of text; None without any text."""
    return self.nats / math.log(2) / self.bytes if self.bytes else None


@dataclasses.dataclass(frozen=True)
class Result:
  """The scores of every source that has targets."""

  sources: Mapping[str, Score]

  @property
  def total(self) -> Score:
    """The score over all sources."""
    return sum(self.sources.values(), Score())


def evaluate_split(
  definition: Definition,
  params: Params,
  split: Split | str | os.PathLike[str],
  *,
  context: Context,
  batch_size: int,
  mesh: Mesh,
  max_tokens: int | None = None,
  piece: int = 1024,
  loss_chunk: int = 256,
  before_batch: Callable[[], None] = lambda: None,
) -> Result:
  """Scores every token of every document and its end exactly once.

  The result depends on `batch_size`, `piece` and `mesh` by rounding alone. The
  losses leave the device in fp32 and are added up in fp64. However long the
  windows or documents are, a device holds its share of `batch_size` times
  `piece` positions at a time, or of `batch_size` windows if they are shorter.

  Args:
    definition: the model; dropout is off.
    params: its parameters, on `mesh`.
    split: what to score, or the folder whose "heldout" split it is.
    context: windows of so many positions, each from an empty state; or
      "document", where the state is carried through every document.
    batch_size: rows at a time, at most.
    mesh: rows are spread over data and fsdp, positions over sequence.
    max_tokens: score at most about so many targets: whole windows at equal
      distances over the split, always the same; None for all.
    piece: positions at a time of a window or document that is longer; a batch
      of fewer rows has as many more.
    loss_chunk: positions whose logits exist at a time.
    before_batch: called before every batch; may raise to end the evaluation.

  Raises:
    UserError: the model lacks tokens of the split, the mesh cannot divide a
      batch, or `max_tokens` is given for whole documents.
  """
  if not isinstance(split, Split):
    split = open_split(split, "heldout")
  if split.vocab_size > definition.cfg.vocab_size:
    raise UserError(
      f"{split.directory} has {split.vocab_size} token ids, the model only "
      f"{definition.cfg.vocab_size}; prepare it with the model's tokenizer."
    )
  if context != "document":
    # A window is no longer than the split.
    context = min(context, batches.multiple(split.tokens, batches.step(mesh)))
  length = piece if context == "document" else min(context, piece)
  _check_batch(batch_size, length, mesh)
  if context == "document":
    if max_tokens is not None:
      raise UserError(
        "A limit of tokens needs windows; with context 'document' whole "
        "documents are scored."
      )
    carry = True
    stops = np.cumsum(split.document_lengths().astype(np.int64) + 1)
    starts = np.concatenate([[0], stops[:-1]])
    sources = split.document_sources()
  else:
    sources = None
    carry = context > piece
    starts = batches.window_numbers(split, context, max_tokens) * context
    stops = np.minimum(starts + context, split.tokens)
  if carry:
    pieces = batches.lanes(
      split, starts, stops, sources, batch_size, piece, mesh
    )
  else:
    pieces = batches.windows(split, starts // length, batch_size, length, mesh)
  nats_S, tokens_S = _sums(
    definition,
    params,
    pieces,
    len(split.sources),
    carry=carry,
    loss_chunk=loss_chunk,
    mesh=mesh,
    before_batch=before_batch,
  )
  return by_source(split, nats_S, tokens_S, whole=max_tokens is None)


def _check_batch(batch_size: int, length: int, mesh: Mesh) -> None:
  if length < 1 or batch_size < 1:
    raise UserError(
      f"A batch of {batch_size} rows of {length} tokens cannot be scored; "
      "both must be at least 1."
    )
  shards = sharding.batch_shards(mesh)
  if batch_size % shards or length % mesh.shape["sequence"]:
    raise UserError(
      f"The mesh {dict(mesh.shape)} cannot divide batches of {batch_size} rows "
      f"of {length} tokens: rows must be a multiple of {shards}, tokens of "
      f"{mesh.shape['sequence']}."
    )


def by_source(split: Split, nats_S, tokens_S, *, whole: bool) -> Result:
  """The sums of every source as scores; `whole` if the split was scored."""
  sources = {}
  for at, name in enumerate(split.sources):
    counts = split.counts[name]
    if whole and tokens_S[at] != counts.tokens:
      raise AssertionError(
        f"{tokens_S[at]} targets of {name} were scored, not {counts.tokens}"
      )
    if tokens_S[at]:
      sources[name] = Score(
        float(nats_S[at]),
        int(tokens_S[at]),
        counts.bytes if whole else None,
      )
  return Result(sources)


def _sums(
  definition,
  params,
  pieces,
  num_sources,
  *,
  carry,
  loss_chunk,
  mesh,
  before_batch,
) -> tuple[np.ndarray, np.ndarray]:
  """Nats and targets per source."""
  nats_S = np.zeros(num_sources)
  tokens_S = np.zeros(num_sources, np.int64)

  def add(batch: Batch, loss_BT: jax.Array) -> None:
    real_BT = batch["segments"] > 0
    sources = batch["sources"][real_BT]
    losses = np.asarray(loss_BT)[real_BT].astype(np.float64)
    nats_S[:] += np.bincount(sources, losses, minlength=num_sources)
    tokens_S[:] += np.bincount(sources, minlength=num_sources)

  # The losses of a batch are fetched while the next one is computed.
  waiting = None
  state = None
  with jax.set_mesh(mesh):
    for batch in pieces:
      before_batch()
      tokens = _put(batch, mesh)
      if carry and state is None:
        state = _empty(definition, params, len(batch["inputs"]))
      loss_BT, state = _losses(
        definition, params, tokens, state, loss_chunk=loss_chunk, carry=carry
      )
      if waiting is not None:
        add(*waiting)
      waiting = batch, loss_BT
  if waiting is not None:
    add(*waiting)
  return nats_S, tokens_S


def _put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """What the model reads, on the mesh; every process takes its share."""
  target = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(
      batch[name].shape, target, batch[name].__getitem__
    )
    for name in ("inputs", "targets", "segments")
  }


@functools.partial(jax.jit, static_argnames=("definition", "batch_size"))
def _empty(definition, params, batch_size):
  return _by_rows(definition.bind(params).empty_state(batch_size))


@functools.partial(
  jax.jit, static_argnames=("definition", "loss_chunk", "carry")
)
def _losses(definition, params, batch, state, *, loss_chunk, carry):
  """The loss of every target [B, T], whole on every process; the state."""
  lm = definition.bind(params)
  x_BTD, state = lm(batch["inputs"], segments_BT=batch["segments"], state=state)
  loss_BT = token_losses(
    lm.vocabulary_weight(),
    x_BTD,
    batch["targets"],
    chunk=loss_chunk,
    cap=lm.cfg.logit_cap,
  )
  loss_BT = sharding.constrain(loss_BT, None, None)
  return loss_BT, _by_rows(state) if carry else None


def _by_rows(state):
  """The same sharding in every call: states are [repeats, rows, ...]."""
  return jax.tree.map(
    lambda x: sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2)),
    state,
  )
