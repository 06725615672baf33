"""The files beside `tokenizer.json` in a Hugging Face folder."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from xlstm_jax.data import format as files
from xlstm_jax.data import tokenizer as tokenizers
from xlstm_jax.errors import shown
from xlstm_jax.interop import large

CONFIG = "tokenizer_config.json"
# In a workdir: the tokenizer's files of the folder that was imported.
KEPT = "imported_tokenizer"
# In an export: the training data's tokenizer, if transformers has to read
# another tokenizer.json.
TRAINING = "training_tokenizer"
_NAMES = (
  tokenizers.HUGGING_FACE_FILE,
  CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.*",
  "additional_chat_templates/*.jinja",
  "vocab.*",
  "merges.txt",
  "*.model",
  "*.tiktoken",
  "tekken.json",
  "tokenization_*.py",
)
_MAX_BYTES = 512 * 2**20


def read(folder: pathlib.Path) -> dict[str, bytes]:
  """The tokenizer's files in a folder, by their names in it.

  Raises:
    UserError: one of them cannot be read.
  """
  return {
    path.relative_to(folder).as_posix(): files.read_regular_file(
      path, limit=_MAX_BYTES
    )
    for name in _NAMES
    for path in sorted(folder.glob(name))
    if path.is_file()
  }


def write(folder: pathlib.Path, found: Mapping[str, bytes]) -> None:
  """Writes what `read` returned."""
  for name, data in found.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, data)


def exported(
  tokenizer: tokenizers.Tokenizer | None,
  kept: Mapping[str, bytes],
  ids: Mapping[str, Any],
) -> dict[str, bytes]:
  """The tokenizer's files of an export, as `read` returns them.

  Args:
    tokenizer: the model's tokenizer; None for none.
    kept: files of the folder from which model and tokenizer were imported.
    ids: the model's `config.json`, which names ids of special tokens.

  Raises:
    UserError: a kept `tokenizer.json` is damaged.
  """
  if tokenizer is None:
    return dict(kept)
  found = {tokenizers.HUGGING_FACE_FILE: tokenizer.plain_file(), **kept}
  if CONFIG not in found:
    found[CONFIG] = _config(found[tokenizers.HUGGING_FACE_FILE], ids)
  return found


def save(
  target: pathlib.Path,
  tokenizer: tokenizers.Tokenizer | None,
  found: Mapping[str, bytes],
) -> None:
  """Writes what `exported` returned, and the tokenizer itself for imports."""
  write(target, found)
  if tokenizer is None:
    return
  path = target / tokenizers.HUGGING_FACE_FILE
  tokenizer.save(target)
  if path.read_bytes() != found[path.name]:
    write(target, found)
    (target / tokenizers.SPEC_FILE).unlink()
    (target / TRAINING).mkdir()
    tokenizer.save(target / TRAINING)


def _config(data: bytes, ids: Mapping[str, Any]) -> bytes:
  """A `tokenizer_config.json` with which transformers reads `data` unchanged.

  Without one, transformers takes the class that it lists for the model, which
  rebuilds the tokenizer like GPT-NeoX's.
  """
  content, known = _parsed(data)
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    # The name of a special token inside a text is text, as in training.
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    # `generate` refuses token_type_ids.
    "model_input_names": ["input_ids", "attention_mask"],
  }
  for name in large.TOKEN_IDS:
    for id in large.token_ids(ids, name)[:1]:
      if (token := tokenizers.name_of(known, id)) is not None:
        config[name.removesuffix("_id")] = token
  # transformers 4 switches the prefix space off unless this asks for it.
  first = content.get("pre_tokenizer") or {}
  if first.get("type") == "ByteLevel" and first.get("add_prefix_space", True):
    config["add_prefix_space"] = True
  return (json.dumps(config, indent=2) + "\n").encode()


def outside(
  found: Mapping[str, bytes], ids: Mapping[str, Any], vocab_size: int
) -> list[str]:
  """A sentence for each thing that names an id which the model does not have.

  Args:
    found: the tokenizer's files of an export.
    ids: the export's `config.json`.
    vocab_size: the model's number of ids.
  """
  ends = "transformers ends with an IndexError where it occurs"
  told = [
    f"config.json gives {name} as {id}, but the model has {vocab_size} ids: "
    f"{ends}."
    for name in large.TOKEN_IDS
    for id in large.token_ids(ids, name)
    if not 0 <= id < vocab_size
  ]
  if tokenizers.HUGGING_FACE_FILE not in found:
    return told
  _, known = _parsed(found[tokenizers.HUGGING_FACE_FILE])
  size = 1 + max(known.get_vocab(with_added_tokens=True).values(), default=-1)
  if size > vocab_size:
    told.append(
      f"The tokenizer has {size} ids, but the model only {vocab_size}: {ends}."
    )
  for name in large.TOKEN_IDS:
    name = name.removesuffix("_id")
    token = _tokenizer_config(found).get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and known.token_to_id(token) is None:
      told.append(
        f"tokenizer_config.json gives {name} as {shown(token)}, which "
        f"tokenizer.json does not have: transformers adds it, as id {size} of "
        f"a model with {vocab_size}."
      )
  return told


def _tokenizer_config(found: Mapping[str, bytes]) -> dict[str, Any]:
  """The `tokenizer_config.json`; an imported one may hold anything."""
  try:
    content = json.loads(found.get(CONFIG, b""))
  except (ValueError, RecursionError):
    return {}
  return content if isinstance(content, dict) else {}


def _parsed(data: bytes) -> tuple[dict[str, Any], Any]:
  """The content of a `tokenizer.json`, and the tokenizer that it defines."""
  path = pathlib.Path(tokenizers.HUGGING_FACE_FILE)
  content = files.parse_json(data, path)
  return content, tokenizers.build(content, path)
