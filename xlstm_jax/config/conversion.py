"""Converts between the dataclasses and the ConfigDict that a user sees."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict, FieldReference

from xlstm_jax.config.run import RunConfig
from xlstm_jax.errors import UserError, shown


def to_config_dict(cfg: RunConfig) -> ConfigDict:
  """A locked, type-safe ConfigDict with the values of `cfg`.

  Fields that may be None are typed placeholders: they accept None and values
  of their type.
  """
  values = _to_config_dict(cfg)
  values.lock()
  return values


def _to_config_dict(node: Any) -> ConfigDict:
  values = ConfigDict()
  for name, hint in hints(type(node)).items():
    value = getattr(node, name)
    if dataclasses.is_dataclass(value):
      values[name] = _to_config_dict(value)
    elif is_optional(hint):
      values[name] = FieldReference(value, field_type=_python_type(hint))
    else:
      values[name] = value
  return values


def from_config_dict(values: ConfigDict) -> RunConfig:
  """The inverse of `to_config_dict`; absent keys get their defaults.

  Raises:
    UserError: a key is unknown (the message names the nearest one), or a value
      has a wrong type.
  """
  return from_mapping(RunConfig, values.to_dict())


def from_mapping(cls: type, values: Any, prefix: str = "") -> Any:
  """`from_config_dict` for any config class and any mapping."""
  if not isinstance(values, Mapping):
    raise UserError(
      f"{f'config.{prefix}'.rstrip('.')} is {shown(values)}; it must be a "
      f"section with the keys {', '.join(hints(cls))}."
    )
  fields = hints(cls)
  for key in values:
    if key not in fields:
      raise unknown_key(f"{prefix}{key}")
  return cls(
    **{
      key: _checked(fields[key], value, f"{prefix}{key}")
      for key, value in values.items()
    }
  )


def _checked(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint`; raises a UserError if it is no such value."""
  if dataclasses.is_dataclass(hint):
    return from_mapping(typing.cast(type, hint), value, f"{path}.")
  if is_optional(hint):
    if value is None:
      return None
    hint = without_none(hint)
  if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
    item = typing.get_args(hint)[0]
    return tuple(
      _checked(item, v, f"{path}[{at}]") for at, v in enumerate(value)
    )
  if typing.get_origin(hint) is Literal and value in typing.get_args(hint):
    return value
  if hint is float and type(value) is int and abs(value) < 2**53:
    return float(value)
  if isinstance(hint, type) and type(value) is hint and _is_finite(value):
    return value
  raise UserError(
    f"config.{path} is {shown(value)}; it must be {describe(hint)}."
  )


def _is_finite(value: Any) -> bool:
  return not isinstance(value, float) or math.isfinite(value)


def describe(hint: Any) -> str:
  """The values of this type, in words."""
  if typing.get_origin(hint) is Literal:
    return "one of " + ", ".join(map(repr, typing.get_args(hint)))
  if typing.get_origin(hint) is tuple:
    return f"a tuple, each item {describe(typing.get_args(hint)[0])}"
  return {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
  }[hint]


@functools.cache
def hints(cls: type) -> dict[str, Any]:
  """The type of every field of a config class."""
  known = typing.get_type_hints(cls)
  return {field.name: known[field.name] for field in dataclasses.fields(cls)}


def is_optional(hint: Any) -> bool:
  """Whether the type is `T | None`."""
  return isinstance(hint, types.UnionType) and type(None) in hint.__args__


def without_none(hint: Any) -> Any:
  """T of `T | None`."""
  (inner,) = (arg for arg in hint.__args__ if arg is not type(None))
  return inner


def _python_type(hint: Any) -> type:
  """The class of the values of an optional field."""
  hint = without_none(hint)
  origin = typing.get_origin(hint)
  if origin is Literal:
    return type(typing.get_args(hint)[0])
  return origin or hint


def unknown_key(key: str) -> UserError:
  """The error for a key that does not exist, with the nearest key."""
  existing = list(keys(RunConfig))
  # A right name in the wrong section is nearer than a similar spelling.
  name = key.rsplit(".", 1)[-1]
  same_name = [k for k in existing if k.rsplit(".", 1)[-1] == name]
  candidates = same_name or existing
  nearest = difflib.get_close_matches(key, candidates, 1, cutoff=0)[0]
  return UserError(
    f"There is no config.{key[:100]}; the nearest key is config.{nearest}."
  )


def keys(cls: type, prefix: str = "") -> Iterator[str]:
  """All fields of a config class, dotted."""
  for name, hint in hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield from keys(typing.cast(type, hint), f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}"


def value_of(cfg: RunConfig, key: str) -> Any:
  """The value of a dotted key."""
  return functools.reduce(getattr, key.split("."), cfg)
