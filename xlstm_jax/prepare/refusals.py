"""What a preparation does not go on with."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xlstm_jax import files
from xlstm_jax.data import documents, layout, tokenizer
from xlstm_jax.errors import UserError


def refuse_nesting(output: Path, arguments: Iterable[str]) -> None:
  for argument in arguments:
    _, path = documents.split_argument(argument)
    if os.path.isdir(path) and output.resolve().is_relative_to(
      Path(path).resolve()
    ):
      raise UserError(
        f"--output={output} is inside the input {path}: a rerun would read its "
        "own output."
      )


def refuse_strangers(output: Path) -> None:
  # What a killed preparation left.
  ours = files.temporary_path(output / layout.PROGRESS)
  for entry in output.iterdir():
    if entry != ours:
      raise UserError(
        f"{output} holds something else ({entry.name}) and no interrupted "
        "preparation; give a new or empty folder as --output."
      )


def refuse_other_settings(
  output: Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
  if old != new:
    raise UserError(
      f"{output} was begun with {_typed(old, new)}, not with "
      f"{_typed(new, old)}; use the same options or another --output."
    )


def _typed(settings: dict[str, Any], others: dict[str, Any]) -> str:
  """The options that differ from others, about as a user types them."""
  return " ".join(
    f"--{name[:40]}={_shortened(value)}"
    for name, value in settings.items()
    if name not in others or value != others[name]
  )


def _shortened(value: Any) -> str:
  """A value of `Options.settings`, with 12 digits of a tokenizer's hash."""
  name, separator, hash = str(value)[:200].partition(" ")
  if name == tokenizer.HuggingFaceTokenizer.kind:
    name = tokenizer.HUGGING_FACE_FILE
  return f"{name} ({hash[:12]})" if separator else name


def other_inputs(output: Path) -> UserError:
  return UserError(
    f"{output} was begun with other inputs: their names, sizes or contents "
    "have changed; use another --output."
  )
