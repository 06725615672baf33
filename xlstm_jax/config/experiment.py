"""Experiment files and the command line."""

import ast
import contextlib
import dataclasses
import importlib.util
import os
import re
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from xlstm_jax import paths
from xlstm_jax.config import conversion
from xlstm_jax.config.run import RunConfig
from xlstm_jax.errors import UserError, shown

# A dataclass's message about a field that it does not have.
_UNKNOWN_FIELD = (
  r"(\w+)\.__init__\(\) got an unexpected keyword argument '(.*?)'"
)


def from_experiment(path: str, overrides: Sequence[str] = ()) -> RunConfig:
  """The configuration of an experiment file with command-line overrides.

  Args:
    path: FILE.py, or FILE.py:TEXT to call `get_config(TEXT)`.
    overrides: arguments such as "--config.optim.peak_lr=1e-3".

  Raises:
    UserError: there is no such file, it has no `get_config`, or the file or an
      override has an unknown key or a value of a wrong type.
  """
  values = _load_experiment(path)
  for key, arguments in _grouped(overrides).items():
    _override(values, key, arguments)
  return _with_local_paths(conversion.from_config_dict(values))


def _with_local_paths(cfg: RunConfig) -> RunConfig:
  """The configuration with its paths expanded by `paths.local`.

  The cache keeps its `~`, because another user may evaluate the run.
  """

  def checked(key: str, rule: Callable[[str], str], path: str) -> str:
    try:
      return rule(path)
    except UserError as error:
      sentence = f"config.{key}: {error}"
      raise UserError(sentence) from error

  if cfg.compilation_cache is not None:
    checked("compilation_cache", paths.local, cfg.compilation_cache)
  if cfg.init_from is not None:
    init_from = checked("init_from", paths.reachable, cfg.init_from)
    cfg = dataclasses.replace(cfg, init_from=init_from)
  folders = tuple(
    checked("data.paths", paths.local, path) for path in cfg.data.paths
  )
  data = dataclasses.replace(cfg.data, paths=folders)
  return dataclasses.replace(cfg, data=data)


def _load_experiment(path: str) -> ConfigDict:
  # A URL has a colon too, but nothing that ends in .py before it.
  match = re.fullmatch(r"(.*?\.py):(.*)", path, re.DOTALL)
  file, *argument = match.groups() if match else (path,)
  file = paths.local(file) if file else file
  if not os.path.isfile(file):
    raise UserError(
      f"There is no experiment file {file!r}; give --config=FILE.py, for "
      "example --config=experiments/quickstart.py."
    )
  spec = importlib.util.spec_from_file_location("experiment", file)
  if spec is None or spec.loader is None:
    raise UserError(f"The experiment file {file!r} must end in .py.")
  module = importlib.util.module_from_spec(spec)
  with _explained(file):
    spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(
      f"{file} has no get_config(); an experiment defines a function of this "
      "name that returns its configuration."
    )
  with _explained(file):
    values = module.get_config(*argument)
  if not isinstance(values, ConfigDict):
    raise UserError(
      f"get_config() of {file} returned {type(values).__name__}, not the "
      "ConfigDict that config.to_config_dict makes; is a return missing?"
    )
  values.lock()
  return values


@contextlib.contextmanager
def _explained(file: str) -> Iterator[None]:
  """In this context, a mistake in the experiment names its line."""
  try:
    yield
  except SyntaxError as error:
    raise UserError(f"{file}, line {error.lineno}: {error.msg}.") from error
  except (
    # A wrong name or type, reported by a locked ConfigDict or a dataclass.
    AttributeError,
    KeyError,
    TypeError,
    # A value that a dataclass refuses.
    UserError,
    ImportError,
    NameError,
  ) as error:
    raise UserError(
      f"{_line_of(error, file)}: {_sentence_of(error)}"
    ) from error


def _line_of(error: BaseException, file: str) -> str:
  here = Path(file).resolve()
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if Path(f.filename).resolve() == here]
  return f"{file}, line {lines[-1]}" if lines else file


def _sentence_of(error: BaseException) -> str:
  """The message, without a ConfigDict's dump of the whole section."""
  text = str(error.args[0]) if error.args else repr(error)
  if match := re.search(_UNKNOWN_FIELD, text):
    section = _section_of(match[1])
    if section is not None:
      return str(conversion.unknown_key(f"{section}{match[2]}"))
  if match := re.search(r'Key "(.*?)" does not exist', text):
    nearest = re.search(r'Did you mean "(.*?)" instead', text)
    hint = f"; the nearest is {nearest[1]!r}" if nearest else ""
    return f"there is no key {match[1]!r} in this section{hint}."
  # An ImportError ends with the path of the module.
  sentence = re.sub(r" \(/.*\)$", "", text.splitlines()[0])
  return sentence if sentence.endswith((".", "?")) else f"{sentence}."


def _section_of(name: str) -> str | None:
  """The prefix of a config class in the configuration, such as "optim."."""
  return next(
    (prefix for prefix, cls in _sections(RunConfig) if cls.__name__ == name),
    None,
  )


def _sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
  yield prefix, cls
  for name, hint in conversion.hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield from _sections(typing.cast(type, hint), f"{prefix}{name}.")


def _grouped(overrides: Sequence[str]) -> dict[str, list[str]]:
  """The arguments of every overridden key, each as one `--config.KEY=...`."""
  grouped: dict[str, list[str]] = {}
  waiting = list(overrides)
  while waiting:
    argument = waiting.pop(0)
    match = re.fullmatch(r"--?(no)?config\.([^=]+)(=.*)?", argument, re.DOTALL)
    if match is None:
      raise UserError(
        f"The argument {shown(argument)} is not understood; overrides look "
        "like --config.optim.peak_lr=1e-3, and --help shows the flags."
      )
    negated, key, value = match.groups()
    if negated and value is not None:
      raise UserError(
        f"The argument {shown(argument)} says no and has a value; write "
        "--config.KEY=VALUE, or --noconfig.KEY for false."
      )
    if value is None and not negated and waiting and waiting[0][:1] != "-":
      argument += f"={waiting.pop(0)}"
    grouped.setdefault(key, []).append(argument)
  return grouped


def _override(values: ConfigDict, key: str, arguments: list[str]) -> None:
  """Sets one key from its command-line arguments."""
  hint = _hint_of(key)
  value = arguments[-1].partition("=")[2]
  if conversion.is_optional(hint) and value.lower() == "none":
    values.update_from_flattened_dict({key: None})
    return
  if hint == tuple[str, ...]:
    items = [item for one in arguments for item in _strings(key, one)]
    values.update_from_flattened_dict({key: tuple(items)})
    return
  registry = flags.FlagValues()
  argv = ["train", *arguments]
  try:
    config_flags.DEFINE_config_dict(
      "config", values, flag_values=registry, sys_argv=argv
    )
    registry(argv)
  except flags.Error as error:
    kind = (
      conversion.without_none(hint) if conversion.is_optional(hint) else hint
    )
    raise UserError(
      f"config.{key} is {shown(value)}; it must be {conversion.describe(kind)}."
    ) from error


def _strings(key: str, argument: str) -> tuple[str, ...]:
  """The items of one argument: its text, or a tuple written as in Python.

  Text is taken literally, because names may hold spaces, commas and digits.
  """
  text = argument.partition("=")[2]
  if text[:1] not in ("(", "["):
    if not text:
      raise UserError(
        f"config.{key} is given without a value; write --config.{key}=TEXT, "
        "once for every item."
      )
    return (text,)
  try:
    items = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    items = None
  if not isinstance(items, (list, tuple)) or not all(
    isinstance(item, str) for item in items
  ):
    raise UserError(
      f"config.{key} is {shown(text)}; what begins with a bracket must be a "
      f"tuple of strings, such as --config.{key}=\"('a', 'b')\"."
    )
  return tuple(items)


def _hint_of(key: str) -> Any:
  """The type of a dotted key."""
  hint: Any = RunConfig
  for name in key.split("."):
    if not dataclasses.is_dataclass(hint) or name not in conversion.hints(
      typing.cast(type, hint)
    ):
      raise conversion.unknown_key(key)
    hint = conversion.hints(typing.cast(type, hint))[name]
  if dataclasses.is_dataclass(hint):
    first = next(conversion.keys(typing.cast(type, hint), f"{key}."))
    raise UserError(
      f"config.{key} is a section; set its keys, such as --config.{first}=..."
    )
  return hint
