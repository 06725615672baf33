"""Optimizers by name, the schedules of their learning rate, and weight decay.

An optimizer is a row of `OPTIMIZERS`: a function from the configuration to an
optax transformation that turns clipped gradients into the direction of the
update. Clipping, weight decay and the learning rate are the same for all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.ranges import ranged

Tree = Any


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and the schedule of its learning rate.

  Attributes:
    name: The optimizer, a row of `OPTIMIZERS`. A run cannot change it.
    peak_lr: Learning rate after the warm-up.
    schedule: Shape of the learning rate between warm-up and cooldown: "cosine"
      and "exponential" fall to `final_fraction * peak_lr`, "constant" stays.
    warmup_steps: Number of steps of the linear rise from
      `peak_lr / warmup_steps`.
    final_fraction: Share of the peak that is left when the decay ends.
    decay_steps: Step at which the decay ends; the rate then stays. None ends it
      where the cooldown starts.
    cooldown_steps: Number of last steps in which the rate falls linearly
      towards 0; 0 for none.
    b1: Decay of Adam's mean of the gradients.
    b2: Decay of Adam's mean of their squares.
    eps: Number added to the root of the mean square.
    weight_decay: Share of a decaying parameter that is subtracted from it,
      times the learning rate.
    decay_embedding: Whether the token embedding decays too.
    clip_norm: Gradients with a larger global norm are scaled down to this; None
      for never.
  """

  name: str = "adamw"
  peak_lr: float = ranged(1e-3, above=0)
  schedule: Literal["cosine", "exponential", "constant"] = "cosine"
  warmup_steps: int = ranged(0, at_least=0)
  final_fraction: float = ranged(0.1, above=0, at_most=1)
  decay_steps: int | None = ranged(None, at_least=0)
  cooldown_steps: int = ranged(0, at_least=0)
  b1: float = ranged(0.9, at_least=0, below=1)
  b2: float = ranged(0.95, at_least=0, below=1)
  eps: float = ranged(1e-8, above=0)
  weight_decay: float = ranged(0.1, at_least=0)
  decay_embedding: bool = False
  clip_norm: float | None = ranged(1.0, above=0)


def learning_rate(
  cfg: OptimConfig, step: jax.typing.ArrayLike, *, steps: int
) -> jax.Array:
  """The learning rate of update number `step`, counted from 0, of `steps`.

  Every update of the run has a rate above 0: the warm-up ends on the peak at
  its last step and the cooldown ends on 1 / cooldown_steps of its start.
  """
  step = jnp.asarray(step, jnp.float32)
  warmup = jnp.minimum((step + 1) / max(cfg.warmup_steps, 1), 1)
  cooldown = jnp.clip((steps - step) / max(cfg.cooldown_steps, 1), 0, 1)
  decay_end = decay_end_step(cfg, steps=steps)
  progress = (step - cfg.warmup_steps) / max(decay_end - cfg.warmup_steps, 1)
  decay = _decay(cfg, jnp.clip(progress, 0, 1))
  return cfg.peak_lr * warmup * decay * cooldown


def decay_end_step(cfg: OptimConfig, *, steps: int) -> int:
  """The step at which the learning rate has decayed to its final fraction."""
  if cfg.decay_steps is not None:
    return cfg.decay_steps
  return steps - cfg.cooldown_steps


def _decay(cfg: OptimConfig, progress: jax.Array) -> jax.Array:
  if cfg.schedule == "cosine":
    cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
    return cfg.final_fraction + (1 - cfg.final_fraction) * cosine
  if cfg.schedule == "exponential":
    return cfg.final_fraction**progress
  return jnp.ones_like(progress)


def decays(path: str, cfg: OptimConfig) -> bool:
  """Whether weight decay acts on the parameter at `path` ("a/b/weight").

  Both published recipes are one rule here: the matrices, convolutions and
  gate maps, all named "weight", decay, the vocabulary projection too; norms,
  biases, learnable skips and the sLSTM's recurrent weights do not, and the
  token embedding only with `decay_embedding`.
  """
  *modules, leaf = path.split("/")
  if leaf != "weight":
    return False
  return cfg.decay_embedding or modules != ["embedding"]


def decay_mask(params: Tree, cfg: OptimConfig) -> Tree:
  """The tree of `params` with `decays` of each leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: decays(
      jax.tree_util.keystr(path, simple=True, separator="/"), cfg
    ),
    params,
  )


def adamw(cfg: OptimConfig) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101); the decay is that of all optimizers."""
  return optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)


# A transformation may keep any state: leaves that lie in it as a parameter lies
# in its tree, and have its shape, are sharded like the parameter.
OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
  "adamw": adamw,
}


def init(cfg: OptimConfig, params: Tree) -> optax.OptState:
  """The optimizer's state before the first update."""
  return OPTIMIZERS[cfg.name](cfg).init(params)


def update(
  cfg: OptimConfig, grads: Tree, state: optax.OptState, params: Tree
) -> tuple[Tree, optax.OptState]:
  """The updates, which are to be scaled by -rate, and the new state."""
  updates, state = OPTIMIZERS[cfg.name](cfg).update(
    clip(grads, cfg.clip_norm), state, params
  )
  updates = jax.tree.map(
    lambda u, p, decayed: u + cfg.weight_decay * p if decayed else u,
    updates,
    params,
    decay_mask(params, cfg),
  )
  return updates, state


def clip(grads: Tree, max_norm: float | None) -> Tree:
  """`grads`, scaled down to the global norm `max_norm` if theirs is larger."""
  if max_norm is None:
    return grads
  scale = max_norm / jnp.maximum(optax.tree.norm(grads), max_norm)
  return jax.tree.map(lambda g: g * scale, grads)
