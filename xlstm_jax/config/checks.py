"""What the parts of a configuration demand of one another."""

import dataclasses
import math
from collections.abc import Iterator

import jax

from xlstm_jax import sharding
from xlstm_jax.config.conversion import value_of
from xlstm_jax.config.run import RunConfig
from xlstm_jax.data.format import Manifest
from xlstm_jax.errors import UserError


def validate(cfg: RunConfig, manifest: Manifest | None, devices: int) -> None:
  """Checks what the parts of a configuration demand of one another.

  Args:
    cfg: the configuration.
    manifest: of the first dataset; None where there is none yet.
    devices: how many the mesh is to cover.

  Raises:
    UserError: names every problem, a sentence each.
  """
  out_of_range = list(_range_problems(cfg))
  problems = [
    *out_of_range,
    *_optim_problems(cfg),
    *_limit_problems(cfg),
    # These divide by such numbers.
    *(() if out_of_range else _channel_problems(cfg)),
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
  "model.feedforward.round_to": 1,
  "model.mlstm.num_heads": 1,
  "model.mlstm.round_to": 1,
  "model.mlstm.conv_window": 0,
  "model.mlstm.qkv_block": 0,
  "model.mlstm_large.num_heads": 1,
  "model.slstm.num_heads": 1,
  "model.slstm.conv_window": 0,
}
# What is added to a denominator.
_NOT_NEGATIVE = (
  "model.norm.eps",
  "model.head_norm.eps",
  "model.mlstm.eps",
  "model.mlstm_large.eps",
)
# Sizes relative to others, and caps.
_ABOVE_0 = (
  "model.logit_cap",
  "model.feedforward.factor",
  "model.mlstm.factor",
  "model.mlstm.gate_cap",
  "model.mlstm_large.qk_factor",
  "model.mlstm_large.v_factor",
  "model.mlstm_large.gate_cap",
)
_DROPOUT = ("model.dropout", "model.feedforward.dropout")


def _range_problems(cfg: RunConfig) -> Iterator[str]:
  for key, least in _AT_LEAST.items():
    value = value_of(cfg, key)
    if value is not None and value < least:
      yield f"config.{key} is {value}; it must be at least {least}."
  for keys, good, expected in (
    (_NOT_NEGATIVE, lambda x: x >= 0, "at least 0"),
    (_ABOVE_0, lambda x: x > 0, "above 0"),
    (_DROPOUT, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    (("seed",), lambda x: 0 <= x < 2**63, "at least 0 and below 2^63"),
  ):
    for key in keys:
      value = value_of(cfg, key)
      if value is not None and not good(value):
        yield f"config.{key} is {value}; it must be {expected}."


def _channel_problems(cfg: RunConfig) -> Iterator[str]:
  """Factors so small that nothing is left of the width."""
  width = cfg.model.width
  if "mlstm_large" in cfg.model.kinds and not all(
    cfg.model.mlstm_large.head_channels(width)
  ):
    large = cfg.model.mlstm_large
    yield (
      f"With config.model.width={width} and num_heads={large.num_heads} a head "
      f"has no channel left of mlstm_large.qk_factor={large.qk_factor} or "
      f"v_factor={large.v_factor}: raise the factor or the width."
    )
  if {"slstm", "mlstm_large"} & {*cfg.model.kinds} and not (
    cfg.model.feedforward.hidden(width)
  ):
    yield (
      f"With config.model.width={width} the feed-forward has no unit left of "
      f"feedforward.factor={cfg.model.feedforward.factor}: raise either."
    )


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
  yield from _head_problems(cfg, sizes["tensor"])
  yield from _unit_problems(cfg, sizes["tensor"])
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


def _head_problems(cfg: RunConfig, tensor: int) -> Iterator[str]:
  heads = {
    "mlstm": cfg.model.mlstm.num_heads,
    "mlstm_large": cfg.model.mlstm_large.num_heads,
    "slstm": cfg.model.slstm.num_heads,
  }
  for kind in sorted(set(cfg.model.kinds)):
    if heads[kind] % tensor:
      fitting = [n for n in range(1, heads[kind] + 1) if not heads[kind] % n]
      yield (
        f"config.model.{kind}.num_heads is {heads[kind]}; "
        f"mesh.tensor={tensor} cannot split that evenly, but "
        f"{_listed(fitting)} could."
      )


def _unit_problems(cfg: RunConfig, tensor: int) -> Iterator[str]:
  """Of what a model's layers have besides heads.

  A vocabulary may stay whole, as it is the tokenizer's.
  """
  kinds, width = set(cfg.model.kinds), cfg.model.width
  hidden = cfg.model.feedforward.hidden(width)
  if kinds != {"mlstm"} and hidden % tensor:
    yield (
      f"config.model.feedforward has {hidden} hidden units; "
      f"mesh.tensor={tensor} cannot split them evenly: set "
      f"model.feedforward.round_to to a multiple of {tensor}."
    )
  # Channels split where heads do; blocks of q, k and v are not of heads, and a
  # single one is split by its outputs.
  inner, block = cfg.model.mlstm.inner(width), cfg.model.mlstm.qkv_block
  blocks = inner // block if block else 1
  if "mlstm" in kinds and not inner % tensor and blocks > 1 and blocks % tensor:
    yield (
      f"config.model.mlstm.qkv_block is {block}; mesh.tensor={tensor} cannot "
      f"split {blocks} blocks of the {inner} inner channels evenly: set "
      f"mesh.tensor=1 or a qkv_block that divides {inner // tensor}."
    )


def _time_problems(cfg: RunConfig, devices: int) -> Iterator[str]:
  context = cfg.data.context
  if context % devices:
    yield (
      f"config.data.context is {context}; the mesh splits time over {devices} "
      f"devices and needs a multiple of that, such as "
      f"{_multiple(context, devices)}."
    )
  window = cfg.model.mlstm.conv_window if "mlstm" in cfg.model.kinds else 0
  if context // devices < window - 1:
    yield (
      f"config.data.context is {context}; split over mesh.sequence={devices} "
      f"devices, each needs the {window - 1} tokens that the next one's "
      f"convolution sees: a context of {devices * (window - 1)} or more fits."
    )
  slstm = [at for at, kind in enumerate(cfg.model.kinds) if kind == "slstm"]
  if slstm:
    yield (
      f"config.mesh.sequence is {devices}, but the blocks {slstm} are "
      "sLSTM, whose every token waits for the one before: time can only be "
      "split over devices for mLSTM blocks. Set mesh.sequence=1 and use these "
      "devices for mesh.fsdp or mesh.data."
    )


def _multiple(value: int, unit: int) -> int:
  """The multiple of `unit` nearest to `value`, but at least one."""
  return max(round(value / unit), 1) * unit


def _listed(numbers: list[int]) -> str:
  *most, last = map(str, numbers)
  return f"{', '.join(most)} or {last}" if most else last


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
  if cfg.diagnose_every is not None and set(cfg.model.kinds) == {"slstm"}:
    yield (
      f"config.diagnose_every is {cfg.diagnose_every}, but all blocks are "
      "sLSTM, and only mLSTM blocks have memories to diagnose: set "
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
