"""Checks of a configuration, and of its parts against one another."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from xlstm_jax import sharding
from xlstm_jax.config.conversion import value_of
from xlstm_jax.config.run import RunConfig
from xlstm_jax.data.format import Manifest
from xlstm_jax.errors import UserError
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.kinds import KINDS, has_memory
from xlstm_jax.ranges import range_of


def validate(cfg: RunConfig, manifest: Manifest | None, devices: int) -> None:
  """Checks a configuration, and its parts against one another.

  Args:
    cfg: the configuration.
    manifest: the first dataset's manifest; None if there is none yet.
    devices: number of devices that the mesh is to cover.

  Raises:
    UserError: something is wrong; a sentence names each problem.
  """
  out_of_range = list(_range_problems(cfg))
  problems = [
    *out_of_range,
    *_optim_problems(cfg),
    *_limit_problems(cfg),
    # These checks divide by the numbers that may be out of range.
    *(() if out_of_range else _mesh_problems(cfg, devices)),
    *_other_problems(cfg),
    *(_data_problems(cfg, manifest) if manifest is not None else ()),
  ]
  if problems:
    raise UserError(" ".join(problems))


# The least value of the integers that have one.
_AT_LEAST = {
  "steps": 1,
  "batch_size": 1,
  "accumulation": 1,
  "log_every": 1,
  "eval_every": 1,
  "eval_tokens": 1,
  "diagnose_every": 1,
  "save_every": 1,
  "loss_chunk": 1,
  "data.context": 1,
  "checkpoint.keep_latest": 1,
  "checkpoint.keep_best": 0,
  "checkpoint.keep_every": 1,
  "checkpoint.keep_minutes": 1,
  "checkpoint.retries": 0,
  "health.max_skipped": 0,
  "health.window": 2,
  "health.rise_windows": 1,
  "health.max_rollbacks": 0,
  "optim.warmup_steps": 0,
  "optim.cooldown_steps": 0,
  "compute.mlstm_chunk": 1,
}


def _range_problems(cfg: RunConfig) -> Iterator[str]:
  for key, least in _AT_LEAST.items():
    value = value_of(cfg, key)
    if value is not None and value < least:
      yield f"config.{key} is {value}; it must be at least {least}."
  if not 0 <= cfg.seed < 2**63:
    yield f"config.seed is {cfg.seed}; it must be at least 0 and below 2^63."
  yield from _field_problems(cfg, "config.")


def _field_problems(section: Any, prefix: str) -> Iterator[str]:
  """The numbers outside the ranges that their fields state."""
  for field in dataclasses.fields(section):
    value, allowed = getattr(section, field.name), range_of(field)
    if dataclasses.is_dataclass(value):
      yield from _field_problems(value, f"{prefix}{field.name}.")
    elif allowed is not None and value is not None and value not in allowed:
      yield f"{prefix}{field.name} is {value}; it must be {allowed}."


def _optim_problems(cfg: RunConfig) -> Iterator[str]:
  optim = cfg.optim
  limits = {
    "peak_lr": (optim.peak_lr > 0, "above 0"),
    "final_fraction": (0 < optim.final_fraction <= 1, "above 0, at most 1"),
    "b1": (0 <= optim.b1 < 1, "at least 0 and below 1"),
    "b2": (0 <= optim.b2 < 1, "at least 0 and below 1"),
    "eps": (optim.eps > 0, "above 0"),
    "weight_decay": (optim.weight_decay >= 0, "at least 0"),
    "clip_norm": (optim.clip_norm is None or optim.clip_norm > 0, "above 0"),
  }
  for key, (good, expected) in limits.items():
    if not good:
      yield (
        f"config.optim.{key} is {getattr(optim, key)}; it must be {expected}."
      )
  if optim.warmup_steps + optim.cooldown_steps > cfg.steps:
    yield (
      f"{optim.warmup_steps} steps of warm-up and {optim.cooldown_steps} of "
      f"cooldown do not fit into config.steps={cfg.steps}: change "
      "optim.warmup_steps, optim.cooldown_steps or steps."
    )
  if optim.decay_steps is not None and optim.decay_steps < optim.warmup_steps:
    yield (
      f"config.optim.decay_steps is {optim.decay_steps}; the decay cannot end "
      f"before the warm-up of {optim.warmup_steps} steps."
    )


def _limit_problems(cfg: RunConfig) -> Iterator[str]:
  for key, seconds in dataclasses.asdict(cfg.limits).items():
    if seconds <= 0:
      yield f"config.limits.{key} is {seconds}; it must be above 0."
  spike = cfg.health.spike_deviations
  if spike is not None and spike <= 0:
    yield (
      f"config.health.spike_deviations is {spike}; it must be above 0, or none."
    )


def _mesh_problems(cfg: RunConfig, devices: int) -> Iterator[str]:
  sizes = dict(
    zip(sharding.AXES, sharding.mesh_shape(cfg.mesh, devices), strict=True)
  )
  shards = sizes["data"] * sizes["fsdp"]
  unit = shards * max(cfg.accumulation, 1)
  if cfg.batch_size % unit:
    yield (
      f"config.batch_size is {cfg.batch_size}; {shards} shares of the mesh "
      f"(data x fsdp) and {cfg.accumulation} accumulation parts need a "
      f"multiple of {unit}, such as {_multiple(cfg.batch_size, unit)}."
    )
  yield from _width_problems(cfg, sizes["data"], sizes["fsdp"])
  yield from _kind_problems(cfg.model, sizes["tensor"])
  yield from _head_problems(cfg.model, sizes["tensor"])
  yield from _feedforward_problems(cfg.model, sizes["tensor"])
  if sizes["sequence"] > 1:
    yield from _time_problems(cfg, sizes["sequence"])


def _width_problems(cfg: RunConfig, data: int, fsdp: int) -> Iterator[str]:
  width = cfg.model.width
  if width % fsdp:
    fits = math.gcd(width, fsdp)
    yield (
      f"config.model.width is {width}; mesh.fsdp={fsdp} cannot split that "
      "evenly, and every device would hold all parameters: set "
      f"mesh.fsdp={fits} and mesh.data={data * fsdp // fits}."
    )


def _kind_problems(model: ModelConfig, tensor: int) -> Iterator[str]:
  for row, cfg in model.kinds_used.values():
    yield from row.problems(cfg, model.width, tensor=tensor)


def _head_problems(model: ModelConfig, tensor: int) -> Iterator[str]:
  for kind, (row, cfg) in model.kinds_used.items():
    if row.heads is None:
      continue
    heads = getattr(cfg, row.heads)
    if heads % tensor:
      fitting = [n for n in range(1, heads + 1) if not heads % n]
      yield (
        f"config.model.{kind}.{row.heads} is {heads}; mesh.tensor={tensor} "
        f"cannot split that evenly, but {_listed(fitting)} could."
      )


def _feedforward_problems(model: ModelConfig, tensor: int) -> Iterator[str]:
  if not any(map(model.has_feedforward, model.kinds_used)):
    return
  hidden = model.feedforward.hidden(model.width)
  if not hidden:
    yield (
      f"With config.model.width={model.width} the feed-forward has no unit "
      f"left of feedforward.factor={model.feedforward.factor}: raise either."
    )
  if hidden % tensor:
    yield (
      f"config.model.feedforward has {hidden} hidden units; "
      f"mesh.tensor={tensor} cannot split them evenly: set "
      f"model.feedforward.round_to to a multiple of {tensor}."
    )


def _time_problems(cfg: RunConfig, devices: int) -> Iterator[str]:
  context = cfg.data.context
  if context % devices:
    yield (
      f"config.data.context is {context}; the mesh splits time over {devices} "
      f"devices and needs a multiple of that, such as "
      f"{_multiple(context, devices)}."
    )
  kinds = cfg.model.kinds_used
  overlap = max(
    (row.time_overlap(of) for row, of in kinds.values() if row.time_overlap),
    default=0,
  )
  if context // devices < overlap:
    yield (
      f"config.data.context is {context}; split over mesh.sequence={devices} "
      f"devices, each needs the {overlap} tokens that the next one's "
      f"convolution sees: a context of {devices * overlap} or more fits."
    )
  whole = [kind for kind, (row, _) in kinds.items() if row.time_overlap is None]
  if whole:
    at = [at for at, kind in enumerate(cfg.model.kinds) if kind in whole]
    others = [kind for kind, row in KINDS.items() if row.time_overlap]
    yield (
      f"config.mesh.sequence is {devices}, but the blocks {at} are of kind "
      f"{' and '.join(whole)}, whose every token waits for the one before: "
      f"time can only be split over devices for {_listed(others, 'and')} "
      "blocks. Set mesh.sequence=1 and use these devices for mesh.fsdp or "
      "mesh.data."
    )


def _multiple(value: int, unit: int) -> int:
  """The multiple of `unit` nearest to `value`, and at least `unit`."""
  return max(round(value / unit), 1) * unit


def _listed(items: Sequence[Any], word: str = "or") -> str:
  *most, last = map(str, items)
  return f"{', '.join(most)} {word} {last}" if most else last


def _other_problems(cfg: RunConfig) -> Iterator[str]:
  if cfg.save_minutes is not None and cfg.save_minutes <= 0:
    yield f"config.save_minutes is {cfg.save_minutes}; it must be above 0."
  if cfg.profile and not (
    len(cfg.profile) == 2 and 1 <= cfg.profile[0] <= cfg.profile[1] <= cfg.steps
  ):
    yield (
      f"config.profile is {cfg.profile}; it must be (first, last), two steps "
      f"between 1 and {cfg.steps}, or ()."
    )
  every = cfg.eval_every
  if (
    every
    and cfg.checkpoint.keep_best > 0
    and cfg.save_every % every
    and every % cfg.save_every
  ):
    yield (
      f"With config.eval_every={every} and save_every={cfg.save_every} hardly "
      "any checkpoint is evaluated and could be the best: make one a multiple "
      "of the other, or set checkpoint.keep_best=0."
    )
  if cfg.diagnose_every is not None and not any(
    map(has_memory, cfg.model.kinds)
  ):
    yield (
      f"config.diagnose_every is {cfg.diagnose_every}, but no block "
      "is an mLSTM, and only these have memories to diagnose: set "
      "diagnose_every=none."
    )
  wide = "float64" in (cfg.compute.dtype, cfg.compute.param_dtype)
  if wide and not jax.config.jax_enable_x64:
    yield "float64 needs the environment variable JAX_ENABLE_X64=1."


def _data_problems(cfg: RunConfig, manifest: Manifest) -> Iterator[str]:
  ids = manifest.tokenizer.vocab_size
  if cfg.model.vocab_size < ids:
    yield (
      f"config.model.vocab_size is {cfg.model.vocab_size}, but the tokenizer "
      f"of {cfg.data.paths[0]} has {ids} ids; set it to {ids} or more."
    )
  if not manifest.splits["train"].total.tokens:
    yield f"The train split of {cfg.data.paths[0]} is empty."
  if cfg.eval_every and not manifest.splits["heldout"].total.tokens:
    yield (
      f"The held-out split of {cfg.data.paths[0]} is empty: set "
      "--config.eval_every=none or prepare it with a larger held-out fraction."
    )
