"""The xLSTM language model, and its definition as functions of parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.embedding import Embedding, attend
from xlstm_jax.layers.linear import dropout, soft_cap
from xlstm_jax.layers.norm import Norm
from xlstm_jax.models.blocks import Block, pinned
from xlstm_jax.models.config import ModelConfig, Stack, stacks
from xlstm_jax.sharding import constrain

# A nested dict of arrays (or of their shapes or shardings), keyed by strings.
Params = dict[str, Any]
State = dict[str, Any]


class LanguageModel(nnx.Module):
  """Embedding, stacks of residual blocks, norm, vocabulary projection.

  The parameters of the blocks that repeat at one place of a stack have a
  leading axis G, whether the stack is scanned or not (`config.stacks`).
  """

  def __init__(self, cfg: ModelConfig, *, compute: Compute, rngs: nnx.Rngs):
    self.cfg = cfg
    self.compute = compute
    self.embedding = Embedding(
      cfg.vocab_size, cfg.width, compute=compute, rngs=rngs
    )
    self.blocks = nnx.Dict(
      {
        str(stack.start): _stacked(cfg, stack, compute=compute, rngs=rngs)
        for stack in stacks(cfg.kinds)
      }
    )
    norm = dataclasses.replace(
      cfg.norm, bias=cfg.norm.bias and cfg.out_norm_bias
    )
    self.norm = (
      Norm(norm, (cfg.width,), ("width",), compute=compute, rngs=rngs)
      if cfg.out_norm
      else None
    )
    self.head = (
      None
      if cfg.tie_embeddings
      else Embedding(cfg.vocab_size, cfg.width, compute=compute, rngs=rngs)
    )

  def __call__(
    self,
    tokens_BT: Int[Array, "B T"],
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    state: State | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], State]:
    """Hidden vectors before the vocabulary projection, and the new state.

    Args:
      tokens_BT: token ids.
      segments_BT: the document of each token, from 1 and never decreasing; 0 is
        trailing padding. Without it every token continues the state.
      state: the state that an earlier call returned; None is the empty past.
      dropout_key: a key for every row [B]; None turns dropout off.
    """
    x_BTD = self.embedding(tokens_BT)
    if self.cfg.embedding_dropout:
      key = None if dropout_key is None else _fold(dropout_key, -1)
      x_BTD = dropout(x_BTD, self.cfg.dropout, key)
    x_BTD = pinned(x_BTD)
    new_state = {}
    for stack in stacks(self.cfg.kinds):
      name = str(stack.start)
      x_BTD, new_state[name] = self._apply(
        stack,
        x_BTD,
        segments_BT=segments_BT,
        state=state[name] if state is not None else None,
        dropout_key=dropout_key,
      )
    if self.norm is not None:
      x_BTD = pinned(self.norm(x_BTD))
    return x_BTD, new_state

  def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T Z"]:
    """Capped fp32 logits of the hidden vectors that the model returned."""
    scores_BTZ = attend(self.vocabulary_weight(), pinned(x_BTD))
    logits_BTZ = soft_cap(scores_BTZ, self.cfg.logit_cap)
    return constrain(logits_BTZ, "batch", "time", "vocabulary")

  def vocabulary_weight(self) -> Float[Array, "Z D"]:
    """The weight of the vocabulary projection, in the compute dtype."""
    head = self.head if self.head is not None else self.embedding
    return head.rows()

  def empty_state(self, batch: int) -> State:
    """The empty past of `batch` rows, as the arrays of every state."""

    def repeated(block, repeats):
      return jax.tree.map(
        lambda x: jnp.broadcast_to(x, (repeats, *x.shape)),
        block.mixer.empty_state(batch),
      )

    return {
      str(stack.start): {
        place: repeated(block, stack.repeats)
        for place, block in self.blocks[str(stack.start)].items()
      }
      for stack in stacks(self.cfg.kinds)
    }

  def _apply(self, stack: Stack, x_BTD, *, segments_BT, state, dropout_key):
    """Applies the blocks of a stack, one repetition after the other."""
    definitions, params = {}, {}
    for place, block in self.blocks[str(stack.start)].items():
      definitions[place], params[place] = nnx.split(block)

    def repetition(x_BTD, scanned):
      index, params, state = scanned
      new_state = {}
      for at, place in enumerate(definitions):
        key = None if dropout_key is None else _fold(dropout_key, index + at)
        x_BTD, new_state[place] = nnx.merge(definitions[place], params[place])(
          x_BTD,
          segments_BT=segments_BT,
          state=state[place] if state is not None else None,
          dropout_key=key,
        )
      return x_BTD, new_state

    if self.compute.remat != "none":
      policy = None
      if self.compute.remat == "matmuls":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      repetition = jax.checkpoint(repetition, policy=policy)
    indices = stack.start + len(stack.unit) * jnp.arange(stack.repeats)
    scanned = (indices, params, state)
    if self.compute.scan and stack.repeats > 1:
      return jax.lax.scan(repetition, x_BTD, scanned)
    states = []
    for g in range(stack.repeats):
      one = jax.tree.map(lambda x, g=g: x[g], scanned)
      x_BTD, new_state = repetition(x_BTD, one)
      states.append(new_state)
    return x_BTD, jax.tree.map(lambda *x: jnp.stack(x), *states)


@dataclasses.dataclass(frozen=True)
class Definition:
  """A model as pure functions of its parameters.

  Parameters are a nested dict of arrays. Their tree depends on the kinds and
  indices of the blocks alone.
  """

  cfg: ModelConfig
  compute: Compute = Compute()

  def init(self, key: jax.Array) -> Params:
    """Newly drawn parameters; the same for every mesh and `compute`."""
    model = LanguageModel(self.cfg, compute=self.compute, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.split(model)[1])

  def abstract(self) -> Params:
    """Shape and dtype of every parameter."""
    return nnx.to_pure_dict(self._split()[1])

  def axes(self) -> Params:
    """Logical axis names of every parameter's dimensions."""

    def names(variable):
      axes = variable.get_metadata()["axes"]
      return (None,) * (variable.ndim - len(axes)) + axes

    return nnx.to_pure_dict(
      jax.tree.map(
        names,
        self._split()[1],
        is_leaf=lambda x: isinstance(x, nnx.Variable),
      )
    )

  def bind(self, params: Params) -> LanguageModel:
    """The model with these parameters."""
    return nnx.merge(self._split()[0], params)

  def _split(self):
    return _abstract(self.cfg, self.compute)


@functools.cache
def _abstract(cfg: ModelConfig, compute: Compute):
  def create():
    return nnx.split(
      LanguageModel(cfg, compute=compute, rngs=nnx.Rngs(jax.random.key(0)))
    )

  return jax.eval_shape(create)


def _stacked(cfg: ModelConfig, stack: Stack, *, compute, rngs):
  """The blocks of a stack; each is drawn from a key of its own."""
  blocks = {}
  for at, kind in enumerate(stack.unit):

    def create(key, index, kind: str = kind):
      block = Block(cfg, kind, index, compute=compute, rngs=nnx.Rngs(key))
      return nnx.split(block)

    indices = stack.start + at + len(stack.unit) * jnp.arange(stack.repeats)
    keys = jax.random.split(rngs.params(), stack.repeats)
    blocks[f"{at}_{kind}"] = nnx.merge(*jax.vmap(create)(keys, indices))
  return nnx.Dict(blocks)


def _fold(key: jax.Array, index) -> jax.Array:
  """The dropout keys [B] of block `index`; -1 is the embedding."""
  return jax.vmap(jax.random.fold_in, (0, None))(key, index + 1)
