"""A language model that compiles in no time, with a model's interface."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FakeDefinition:
  """Embedding, a step of mixing within segments, dropout, a head."""

  vocab_size: int = 24
  width: int = 8
  dropout: float = 0.0

  def init(self, key):
    keys = jax.random.split(key, 3)
    Z, D = self.vocab_size, self.width
    return {
      "embedding": {"weight": jax.random.normal(keys[0], (Z, D))},
      "mixer": {
        "weight": jax.random.normal(keys[1], (D, D)) / D,
        "bias": jnp.zeros(D),
      },
      "head": {"weight": jax.random.normal(keys[2], (Z, D)) / 2},
    }

  def abstract(self):
    return jax.eval_shape(self.init, jax.random.key(0))

  def axes(self):
    return {
      "embedding": {"weight": ("vocabulary", "width")},
      "mixer": {"weight": ("width", "heads"), "bias": (None,)},
      "head": {"weight": ("vocabulary", "width")},
    }

  def bind(self, params):
    return FakeModel(self, params)


@dataclasses.dataclass(frozen=True)
class FakeModel:
  definition: FakeDefinition
  params: dict

  def __call__(self, tokens_BT, *, segments_BT, state=None, dropout_key=None):
    x_BTD = self.params["embedding"]["weight"][tokens_BT]
    same_BT = segments_BT == jnp.roll(segments_BT, 1, axis=1)
    same_BT = same_BT.at[:, 0].set(False)
    past_BTD = jnp.where(same_BT[..., None], jnp.roll(x_BTD, 1, axis=1), 0)
    mixer = self.params["mixer"]
    x_BTD = x_BTD + jnp.tanh(past_BTD @ mixer["weight"] + mixer["bias"])
    if dropout_key is not None and self.definition.dropout:
      keep = 1 - self.definition.dropout
      kept = jax.vmap(
        lambda key: jax.random.bernoulli(key, keep, x_BTD.shape[1:])
      )(dropout_key)
      x_BTD = jnp.where(kept, x_BTD / keep, 0)
    return x_BTD, state

  def logits(self, x_BTD):
    return x_BTD @ self.vocabulary_weight().T

  def vocabulary_weight(self):
    return self.params["head"]["weight"]
