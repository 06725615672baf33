"""Each cross-check refuses its mistake, and nothing else."""

import dataclasses
import typing
from collections.abc import Iterator

import pytest

from xlstm_jax import config
from xlstm_jax.config import RunConfig, conversion
from xlstm_jax.data.layout import Counts, Manifest, SplitManifest, TokenizerSpec
from xlstm_jax.errors import UserError
from xlstm_jax.ranges import range_of
from xlstm_jax.sharding import MeshConfig


def manifest(train=100, heldout=100):
  return Manifest(
    tokenizer=TokenizerSpec("byte", "hash", 257, 256),
    sources=("a",),
    splits={
      name: SplitManifest({"a": Counts(1, tokens, 1)}, ())
      for name, tokens in (("train", train), ("heldout", heldout))
    },
    origin={},
  )


def cfg(**changes):
  """A configuration that fits; dots in keys are written as two underscores."""
  values = config.to_config_dict(RunConfig())
  fitting = {
    "model.vocab_size": 257,
    "data.paths": ("corpus",),
    "mesh.data": -1,
    "batch_size": 16,
    "steps": 100,
  }
  changed = {k.replace("__", "."): v for k, v in changes.items()}
  values.update_from_flattened_dict(fitting | changed)
  return config.from_config_dict(values)


def test_a_configuration_that_fits_passes():
  config.validate(cfg(), manifest(), 8)
  config.validate(
    cfg(
      mesh__data=2,
      mesh__fsdp=2,
      mesh__tensor=2,
      accumulation=4,
      eval_every=10,
      save_every=20,
      profile=(1, 100),
      optim__warmup_steps=50,
      optim__cooldown_steps=50,
      optim__clip_norm=None,
    ),
    manifest(),
    8,
  )
  config.validate(cfg(mesh__sequence=8, data__context=24), manifest(), 8)
  config.validate(
    cfg(
      model__mlstm__conv_window=0,
      model__mlstm__qkv_block=0,
      model__mlstm__eps=0.0,
      model__mlstm_large__gate_cap=None,
      model__feedforward__dropout=0.0,
      model__dropout=0.99,
      seed=2**63 - 1,
    ),
    manifest(),
    8,
  )


def test_a_feed_forward_that_no_block_has_may_have_any_size():
  blocks = {"model__slstm_at": tuple(range(24)), "mesh__tensor": 2}
  without = blocks | {"model__slstm__feedforward": False}
  for odd in (
    {"model__feedforward__round_to": 3},
    {
      "model__feedforward__factor": 1e-9,
      "model__feedforward__rounding": "floor",
    },
  ):
    config.validate(cfg(**without, **odd), manifest(), 8)
    with pytest.raises(UserError, match="feedforward"):
      config.validate(cfg(**blocks, **odd), manifest(), 8)


def test_there_may_be_no_data_yet():
  config.validate(cfg(model__vocab_size=1), None, 8)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 0}, r"config\.steps is 0; it must be at least 1"),
    ({"batch_size": -8}, r"config\.batch_size is -8; .* at least 1"),
    ({"accumulation": 0}, r"config\.accumulation is 0; .* at least 1"),
    ({"eval_every": 0}, r"config\.eval_every is 0; .* at least 1"),
    ({"diagnose_every": 0}, r"config\.diagnose_every is 0; .* at least 1"),
    (
      {"diagnose_every": 5, "model__slstm_at": tuple(range(24))},
      "diagnose_every is 5, but no block is an mLSTM.*diagnose_every=none",
    ),
    ({"loss_chunk": 0}, r"config\.loss_chunk is 0; .* at least 1"),
    ({"data__context": 0}, r"config\.data\.context is 0; .* at least 1"),
    ({"checkpoint__keep_latest": 0}, r"keep_latest is 0; .* at least 1"),
    ({"optim__peak_lr": 0.0}, r"peak_lr is 0\.0; it must be above 0"),
    ({"optim__b2": 1.0}, r"b2 is 1\.0; .* below 1"),
    ({"optim__clip_norm": 0.0}, r"clip_norm is 0\.0; it must be above 0"),
    ({"optim__final_fraction": 1.5}, r"final_fraction is 1\.5; .* at most 1"),
    (
      {"optim__warmup_steps": 60, "optim__cooldown_steps": 60},
      r"60 steps of warm-up and 60 of cooldown do not fit into .*steps=100",
    ),
    (
      {"optim__warmup_steps": 60, "optim__decay_steps": 59},
      "the decay cannot end before the warm-up of 60 steps",
    ),
    (
      {"batch_size": 13},
      "batch_size is 13; 8 shares .* a multiple of 8, such as 16",
    ),
    (
      {"accumulation": 4},
      "16; 8 shares .* 4 accumulation .* multiple of 32, such as 32",
    ),
    ({"mesh__data": 3}, "The mesh .* does not fit 8 devices"),
    (
      {"mesh__sequence": 8, "data__context": 100},
      "context is 100; the mesh splits time over 8 .*, such as 96",
    ),
    (
      {"mesh__sequence": 8, "data__context": 16},
      "each needs the 3 tokens .* a context of 24 or more fits",
    ),
    (
      {"mesh__sequence": 2, "model__slstm_at": (3, 20)},
      r"mesh\.sequence is 2, but the blocks \[3, 20\] are of kind slstm, .* "
      "over devices for mlstm and mlstm_large blocks",
    ),
    (
      {"mesh__tensor": 8},
      r"mlstm\.num_heads is 4; mesh\.tensor=8 cannot .* 1, 2 or 4 could",
    ),
    (
      {"model__slstm_at": (1,), "model__slstm__num_heads": 3}
      | {"mesh__tensor": 2},
      r"slstm\.num_heads is 3; mesh\.tensor=2 cannot split",
    ),
    (
      {"model__width": 100, "mesh__data": 1, "mesh__fsdp": 8},
      r"width is 100; mesh\.fsdp=8 cannot .* mesh\.fsdp=4 and mesh\.data=2\.",
    ),
    (
      {"model__width": 75, "mesh__data": 2, "mesh__fsdp": 4},
      r"width is 75; mesh\.fsdp=4 cannot .* mesh\.fsdp=1 and mesh\.data=8\.",
    ),
    (
      {"model__mlstm_block": "large", "model__feedforward__round_to": 3}
      | {"mesh__tensor": 2},
      r"has 999 hidden units; mesh\.tensor=2 .*round_to to a multiple of 2",
    ),
    (
      {"model__slstm_at": (1,), "model__feedforward__round_to": 3}
      | {"mesh__tensor": 2},
      r"has 999 hidden units; mesh\.tensor=2 ",
    ),
    (
      {"model__mlstm__qkv_block": 512, "mesh__tensor": 2},
      "qkv_block is 512; .* 3 blocks of the 1536 .* that divides 768",
    ),
    ({"profile": (3,)}, r"profile is \(3,\); it must be \(first, last\)"),
    ({"profile": (5, 101)}, "between 1 and 100"),
    (
      {"eval_every": 10, "save_every": 25},
      "make one a multiple of the other",
    ),
    ({"compute__dtype": "float64"}, "float64 needs .*JAX_ENABLE_X64"),
    ({"seed": -1}, r"seed is -1; .* at least 0 and below 9223372036854775808"),
    (
      {"seed": 2**63},
      r"seed is 9223372036854775808; .* below 9223372036854775808",
    ),
    ({"compute__mlstm_chunk": 0}, "mlstm_chunk is 0; .* at least 1"),
    ({"model__mlstm__num_heads": 0}, r"mlstm\.num_heads is 0; .* 1"),
    # A mesh that splits heads divides by their number.
    (
      {"model__mlstm__num_heads": -3, "mesh__tensor": 2},
      r"mlstm\.num_heads is -3; it must be at least 1",
    ),
    ({"model__mlstm_large__num_heads": 0}, r"large\.num_heads is 0; .* 1"),
    ({"model__slstm__num_heads": 0}, r"slstm\.num_heads is 0; .* 1"),
    ({"model__mlstm__factor": 0.0}, r"mlstm\.factor is 0\.0; .* above 0"),
    ({"model__mlstm_large__qk_factor": -0.5}, r"qk_factor is -0\.5; .* 0"),
    ({"model__mlstm_large__v_factor": 0.0}, r"v_factor is 0\.0; .* above 0"),
    ({"model__feedforward__factor": -1.3}, r"rd\.factor is -1\.3; .* above 0"),
    ({"model__mlstm__round_to": 0}, r"mlstm\.round_to is 0; .* least 1"),
    ({"model__feedforward__round_to": 0}, r"rd\.round_to is 0; .* least 1"),
    ({"model__mlstm__conv_window": -1}, r"mlstm\.conv_window is -1; .* 0"),
    ({"model__slstm__conv_window": -1}, r"slstm\.conv_window is -1; .* 0"),
    ({"model__mlstm__qkv_block": -4}, r"qkv_block is -4; .* least 0"),
    ({"model__dropout": 1.0}, r"model\.dropout is 1\.0; .* below 1"),
    ({"model__dropout": -0.1}, r"model\.dropout is -0\.1; .* at least 0"),
    ({"model__feedforward__dropout": 1.5}, r"rd\.dropout is 1\.5; .* below 1"),
    ({"model__norm__eps": -1e-5}, r"model\.norm\.eps is -1e-05; .* least 0"),
    ({"model__head_norm__eps": -1.0}, r"head_norm\.eps is -1\.0; .* least 0"),
    ({"model__mlstm__eps": -1.0}, r"mlstm\.eps is -1\.0; .* least 0"),
    ({"model__mlstm_large__eps": -1.0}, r"large\.eps is -1\.0; .* least 0"),
    ({"model__logit_cap": 0.0}, r"logit_cap is 0\.0; it must be above 0"),
    ({"model__mlstm__gate_cap": -1.0}, r"mlstm\.gate_cap is -1\.0; .* 0"),
    ({"model__mlstm_large__gate_cap": 0.0}, r"large\.gate_cap is 0\.0; .* 0"),
    (
      {"model__mlstm_block": "large", "model__mlstm_large__qk_factor": 0.01},
      r"num_heads=8 a head has no channel left of .*qk_factor=0\.01",
    ),
    (
      {"model__mlstm_block": "large", "model__feedforward__factor": 1e-6}
      | {"model__feedforward__rounding": "floor"}
      | {"model__feedforward__round_to": 1},
      "the feed-forward has no unit left",
    ),
    (
      {"model__vocab_size": 256},
      "vocab_size is 256, but the tokenizer of corpus has 257 ids",
    ),
  ],
)
def test_each_mistake_is_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    config.validate(cfg(**changes), manifest(), 8)


def test_only_units_that_the_model_has_must_be_split():
  """Others that do not split: hidden units without feed-forward, maps."""
  paper = {"model__feedforward__round_to": 3, "mesh__tensor": 2}
  config.validate(cfg(**paper), manifest(), 8)
  large = {"model__mlstm_block": "large", "model__mlstm__qkv_block": 512}
  config.validate(cfg(**large, mesh__tensor=2), manifest(), 8)
  dense = {"model__mlstm__qkv_block": 0}
  config.validate(cfg(**dense, mesh__tensor=4), manifest(), 8)


def test_empty_splits_are_named():
  with pytest.raises(UserError, match="The train split of corpus is empty"):
    config.validate(cfg(), manifest(train=0), 8)
  config.validate(cfg(), manifest(heldout=0), 8)
  with pytest.raises(UserError, match="The held-out split of corpus is empty"):
    config.validate(cfg(eval_every=100), manifest(heldout=0), 8)


def test_all_mistakes_are_told_at_once():
  with pytest.raises(UserError) as error:
    config.validate(cfg(steps=0, model__vocab_size=1), manifest(), 8)
  assert "config.steps is 0" in str(error.value)
  assert "config.model.vocab_size is 1" in str(error.value)


def test_other_mistakes_do_not_hide_those_of_the_mesh():
  with pytest.raises(UserError) as error:
    config.validate(cfg(optim__eps=0.0, steps=0, batch_size=7), manifest(), 8)
  assert "config.optim.eps is 0.0; it must be above 0." in str(error.value)
  assert "config.batch_size is 7" in str(error.value)


def test_every_number_has_a_range():
  checked = {
    # In ModelConfig itself, so that it holds for imported models too.
    *("model.vocab_size", "model.width", "model.num_blocks", "model.slstm_at"),
    # With the number of devices.
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    # Any number is a seed of the shuffling, or a bias.
    *("data.seed", "model.mlstm.input_gate_bias"),
    "model.mlstm_large.input_gate_bias",
    # By what reads them.
    *("data.weights", "profile"),
  }
  without = set(numbers_without_range(RunConfig))
  assert without == checked


def numbers_without_range(cls: type, prefix: str = "") -> Iterator[str]:
  for field in dataclasses.fields(cls):
    hint = conversion.hints(cls)[field.name]
    inner = {hint, *typing.get_args(hint)}
    inner |= {arg for one in inner for arg in typing.get_args(one)}
    if dataclasses.is_dataclass(hint):
      section = typing.cast(type, hint)
      yield from numbers_without_range(section, f"{prefix}{field.name}.")
    elif {int, float} & inner and not range_of(field):
      yield f"{prefix}{field.name}"
