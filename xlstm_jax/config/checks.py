"""Checks of a configuration, and of its parts against one another."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from xlstm_jax import ranges, sharding
from xlstm_jax.config.run import RunConfig
from xlstm_jax.data.layout import Manifest
from xlstm_jax.errors import UserError
from xlstm_jax.evaluators.table import EVALUATORS
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.kinds import KINDS, has_memory
from xlstm_jax.optim import OPTIMIZERS


def validate(cfg: RunConfig, manifest: Manifest | None, devices: int) -> None:
  """Checks a configuration, and its parts against one another.

  Args:
    cfg: the configuration.
    manifest: the first dataset's manifest; None if there is none yet.
    devices: number of devices that the mesh is to cover.

  Raises:
    UserError: something is wrong; a sentence names each problem.
  """
  problems = [
    *ranges.problems(cfg, "config."),
    *_optim_problems(cfg),
    *_other_problems(cfg),
    *(_data_problems(cfg, manifest) if manifest is not None else ()),
  ]
  # These divide by numbers of the model.
  if not any(ranges.problems(cfg.model, "")):
    problems += _mesh_problems(cfg, devices)
  if problems:
    raise UserError(" ".join(problems))


def _optim_problems(cfg: RunConfig) -> Iterator[str]:
  optim = cfg.optim
  if optim.name not in OPTIMIZERS:
    yield (
      f"config.optim.name is {optim.name!r}; it must be one of "
      f"{', '.join(map(repr, OPTIMIZERS))}."
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


def _mesh_problems(cfg: RunConfig, devices: int) -> Iterator[str]:
  try:
    shape = sharding.mesh_shape(cfg.mesh, devices)
  except UserError as error:
    yield str(error)
    return
  sizes = dict(zip(sharding.AXES, shape, strict=True))
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
  if cfg.profile and not (
    len(cfg.profile) == 2 and 1 <= cfg.profile[0] <= cfg.profile[1] <= cfg.steps
  ):
    yield (
      f"config.profile is {cfg.profile}; it must be (first, last), two steps "
      f"between 1 and {cfg.steps}, or ()."
    )
  yield from _evaluator_problems(cfg)
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


def _evaluator_problems(cfg: RunConfig) -> Iterator[str]:
  names = cfg.evaluators.names
  known = ", ".join(map(repr, EVALUATORS))
  for name in names:
    if name not in EVALUATORS:
      yield (
        f"config.evaluators.names holds {name!r}; each must be one of {known}."
      )
  if len(set(names)) < len(names):
    yield f"config.evaluators.names is {names}; name each of them once."
  if cfg.eval_every is not None and not names:
    yield (
      f"config.eval_every is {cfg.eval_every}, but config.evaluators.names is "
      f"empty: name some of {known}, or set eval_every=none."
    )


def _data_problems(cfg: RunConfig, manifest: Manifest) -> Iterator[str]:
  ids = manifest.tokenizer.vocab_size
  if cfg.model.vocab_size < ids:
    yield (
      f"config.model.vocab_size is {cfg.model.vocab_size}, but the tokenizer "
      f"of {cfg.data.paths[0]} has {ids} ids; set it to {ids} or more."
    )
  if not manifest.splits["train"].total.tokens:
    yield f"The train split of {cfg.data.paths[0]} is empty."
  heldout = cfg.eval_every and any(
    EVALUATORS[name].reads_heldout
    for name in cfg.evaluators.names
    if name in EVALUATORS
  )
  if heldout and not manifest.splits["heldout"].total.tokens:
    yield (
      f"The held-out split of {cfg.data.paths[0]} is empty: set "
      "--config.eval_every=none or prepare it with a larger held-out fraction."
    )
