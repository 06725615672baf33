"""AdamW, its learning-rate schedules, and which parameters decay."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Tree = Any
Moments = optax.ScaleByAdamState


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW and the schedule of its learning rate.

  Attributes:
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

  peak_lr: float = 1e-3
  schedule: Literal["cosine", "exponential", "constant"] = "cosine"
  warmup_steps: int = 0
  final_fraction: float = 0.1
  decay_steps: int | None = None
  cooldown_steps: int = 0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_embedding: bool = False
  clip_norm: float | None = 1.0


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


def init(params: Tree) -> Moments:
  """The moments before the first update.

  They are optax's `ScaleByAdamState` whatever the options, so that a
  checkpoint outlives a change of them.
  """
  return _state(optax.scale_by_adam().init(params))


def update(
  cfg: OptimConfig, grads: Tree, moments: Moments, params: Tree
) -> tuple[Tree, Moments]:
  """AdamW without its learning rate: the updates are to be scaled by -rate."""
  adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
  updates, state = adam.update(clip(grads, cfg.clip_norm), moments, params)
  updates = jax.tree.map(
    lambda u, p, decayed: u + cfg.weight_decay * p if decayed else u,
    updates,
    params,
    decay_mask(params, cfg),
  )
  return updates, _state(state)


def _state(state: optax.OptState) -> Moments:
  assert isinstance(state, Moments)
  return state


def clip(grads: Tree, max_norm: float | None) -> Tree:
  """`grads`, scaled down to the global norm `max_norm` if theirs is larger."""
  if max_norm is None:
    return grads
  scale = max_norm / jnp.maximum(optax.tree.norm(grads), max_norm)
  return jax.tree.map(lambda g: g * scale, grads)
