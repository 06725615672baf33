"""The surface of the configuration: typed, locked, and strictly converted."""

import dataclasses
import typing

import pytest
from ml_collections import ConfigDict

from xlstm_jax import config
from xlstm_jax.config import RunConfig, conversion
from xlstm_jax.errors import UserError
from xlstm_jax.optim import OptimConfig


def test_a_configuration_returns_from_its_surface():
  cfg = RunConfig(
    optim=OptimConfig(clip_norm=None, decay_steps=7),
    steps=3,
    profile=(1, 2),
    eval_every=2,
  )
  assert config.from_config_dict(config.to_config_dict(cfg)) == cfg


def test_the_surface_is_locked_and_typed():
  values = config.to_config_dict(RunConfig())
  with pytest.raises(AttributeError, match="peek_lr"):
    values.optim.peek_lr = 1.0
  with pytest.raises(TypeError, match="steps"):
    values.steps = "many"


def test_placeholders_take_their_type_and_none():
  values = config.to_config_dict(RunConfig())
  values.optim.decay_steps = 5
  values.optim.clip_norm = None
  values.data.weights = (1.0, 2.0)
  cfg = config.from_config_dict(values)
  assert cfg.optim.decay_steps == 5
  assert cfg.optim.clip_norm is None
  assert cfg.data.weights == (1.0, 2.0)
  with pytest.raises(TypeError):
    values.eval_every = "often"


def test_integers_stand_for_numbers_and_lists_for_tuples():
  cfg = conversion.from_mapping(
    RunConfig, {"optim": {"peak_lr": 1}, "data": {"paths": ["a", "b"]}}
  )
  assert type(cfg.optim.peak_lr) is float
  assert cfg.data.paths == ("a", "b")


@pytest.mark.parametrize(
  ("key", "nearest"),
  [
    ("stesp", "steps"),
    ("optim.peek_lr", "optim.peak_lr"),
    ("peak_lr", "optim.peak_lr"),
    ("model.mlstm.heads", "model.mlstm.num_heads"),
    ("optim.peak_lr.x", "optim.peak_lr"),
  ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
  assert str(conversion.unknown_key(key)) == (
    f"There is no config.{key}; the nearest key is config.{nearest}."
  )


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"stesp": 3}, "no config.stesp; the nearest key is config.steps"),
    ({"optim": {"lr": 3}}, "no config.optim.lr; the nearest"),
    ({"steps": 3.0}, "config.steps is 3.0; it must be an integer"),
    ({"steps": True}, "config.steps is True; it must be an integer"),
    ({"steps": None}, "config.steps is None; it must be an integer"),
    ({"optim": 3}, "config.optim is 3; it must be a section"),
    ({"optim": {"eps": float("inf")}}, "eps is inf; it must be a finite"),
    ({"optim": {"eps": 10**400}}, "it must be a finite"),
    ({"optim": {"schedule": "cosin"}}, "one of 'cosine', 'exponential'"),
    ({"data": {"paths": "a"}}, "'a'; it must be a tuple, each item a string"),
    ({"data": {"paths": ["a", 3]}}, r"paths\[1\] is 3; it must be a string"),
    ({"data": {"shuffle": 1}}, "shuffle is 1; it must be true or false"),
    ({"eval_every": "x"}, "eval_every is 'x'; it must be an integer"),
    ([], r"config is \[\]; it must be a section"),
  ],
)
def test_wrong_values_are_refused_with_what_is_expected(values, message):
  with pytest.raises(UserError, match=message):
    conversion.from_mapping(RunConfig, values)


def leaves(cls):
  for hint in conversion.hints(cls).values():
    if dataclasses.is_dataclass(hint):
      yield from leaves(hint)
    else:
      yield hint


def test_every_type_of_the_schema_is_understood():
  for hint in leaves(RunConfig):
    inner = (
      conversion.without_none(hint) if conversion.is_optional(hint) else hint
    )
    assert conversion.describe(inner)
    item = (typing.get_args(hint) or (None, None))[1]
    assert typing.get_origin(hint) is not tuple or item is ...


def test_every_default_has_its_type():
  values = config.to_config_dict(RunConfig())
  assert isinstance(values, ConfigDict)
  assert config.from_config_dict(values) == RunConfig()
