"""Small exports that transformers reads: `python exported.py FOLDER`.

Two models, one of sizes that the cache of transformers fits and one of others,
and tokenizers of every kind, whose files say what training ignores.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from xlstm_jax import config
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data.tokenizer import (
  HUGGING_FACE_FILE,
  SPEC_FILE,
  ByteTokenizer,
  HuggingFaceTokenizer,
  Tokenizer,
)
from xlstm_jax.interop import hf, large, tokenizer_files, workdir
from xlstm_jax.models import presets
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition, Params

DIGESTS = "digests.json"
WORDS = ["▁the", "▁quick", "▁brown", "▁fox"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["ü", "▁"]
SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def special(id: int, content: str, *, special: bool = True) -> dict[str, Any]:
  """An entry of `added_tokens`."""
  flags = dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
  )
  return {"id": id, "content": content, **flags, "special": special}


def numbered(*pieces: str) -> dict[str, int]:
  """A vocabulary in this order."""
  return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def byte_pairs(words: list[str], *first: str, **options: Any) -> dict[str, Any]:
  """A BPE that joins these words from their beginnings."""
  merges = [[w[:n], w[n]] for w in words for n in range(1, len(w))]
  merges = [list(pair) for pair in dict.fromkeys(map(tuple, merges))]
  pieces = [left + right for left, right in merges]
  return {
    "type": "BPE",
    "vocab": numbered(*first, *pieces),
    "merges": merges,
    **options,
  }


def template(*parts: tuple[str, int] | None) -> dict[str, Any]:
  """A post-processor that adds tokens around a text, which None stands for."""

  def placed(part):
    if part is None:
      return {"Sequence": {"id": "A", "type_id": 0}}
    return {"SpecialToken": {"id": part[0], "type_id": 0}}

  return {
    "type": "TemplateProcessing",
    "single": [placed(part) for part in parts],
    "pair": [
      {"Sequence": {"id": "A", "type_id": 0}},
      {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {
      part[0]: {"id": part[0], "ids": [part[1]], "tokens": [part[0]]}
      for part in parts
      if part is not None
    },
  }


LLAMA = {
  "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
  "normalizer": {
    "type": "Sequence",
    "normalizers": [
      {"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
  },
  "post_processor": template(("<s>", 1), None),
  "decoder": {
    "type": "Sequence",
    "decoders": [
      SPACES,
      {"type": "ByteFallback"},
      {"type": "Fuse"},
      {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
  },
  "model": byte_pairs(
    WORDS,
    *("<unk>", "<s>", "</s>", *BYTES, *LETTERS),
    byte_fallback=True,
    unk_token="<unk>",
  ),
}
_BYTE_LEVEL = json.loads(ByteTokenizer().plain_file())
PREFIXED = {
  "added_tokens": [special(0, "<|endoftext|>")],
  "pre_tokenizer": {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
  },
  "post_processor": {
    "type": "RobertaProcessing",
    "sep": ["<|endoftext|>", 0],
    "cls": ["<|endoftext|>", 0],
    "trim_offsets": True,
    "add_prefix_space": True,
  },
  "decoder": _BYTE_LEVEL["decoder"],
  "model": byte_pairs(
    [word.replace("▁", "Ġ") for word in WORDS],
    *("<|endoftext|>", *_BYTE_LEVEL["model"]["vocab"]),
  ),
}
WORD_PIECE = {
  "added_tokens": [
    special(0, "[UNK]"),
    special(1, "[CLS]"),
    special(2, "[EOS]"),
  ],
  "normalizer": {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
  },
  "pre_tokenizer": {"type": "BertPreTokenizer"},
  "post_processor": {
    "type": "BertProcessing",
    "sep": ["[EOS]", 2],
    "cls": ["[CLS]", 1],
  },
  "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
  "model": {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": numbered(
      *("[UNK]", "[CLS]", "[EOS]", "the", "qu", "##ick", "br", "##own", "fox"),
      *(mark + letter for letter in LETTERS for mark in ("", "##")),
    ),
  },
}
UNIGRAM = {
  # Its file cuts and pads, and its end of text is an ordinary added token.
  "truncation": {
    "direction": "Right",
    "max_length": 3,
    "strategy": "LongestFirst",
    "stride": 0,
  },
  "padding": {
    "strategy": {"Fixed": 8},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
  },
  "added_tokens": [special(1, "</s>", special=False)],
  "pre_tokenizer": {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "always",
    "split": True,
  },
  "post_processor": template(None, ("</s>", 1)),
  "decoder": {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "always",
    "split": True,
  },
  "model": {
    "type": "Unigram",
    "unk_id": 0,
    "byte_fallback": False,
    "vocab": [
      ["<unk>", 0.0],
      ["</s>", 0.0],
      *([word, -2.0] for word in WORDS),
      *([letter, -5.0] for letter in LETTERS),
    ],
  },
}


def tokenizer_of(content: dict[str, Any]) -> HuggingFaceTokenizer:
  """The tokenizer of a `tokenizer.json`."""
  filled = {"version": "1.0", "normalizer": None, "pre_tokenizer": None}
  data = json.dumps(filled | {"post_processor": None} | content).encode()
  return HuggingFaceTokenizer(data, pathlib.Path(HUGGING_FACE_FILE))


TOKENIZERS: dict[str, Tokenizer] = {
  "byte": ByteTokenizer(),
  "llama": tokenizer_of(LLAMA),
  "prefixed": tokenizer_of(PREFIXED),
  "word_piece": tokenizer_of(WORD_PIECE),
  "unigram": tokenizer_of(UNIGRAM),
}


def _model(width: int, vocab_size: int) -> ModelConfig:
  large_model = presets.large("7B")
  return dataclasses.replace(
    large_model,
    vocab_size=vocab_size,
    width=width,
    num_blocks=2,
    mlstm_large=dataclasses.replace(large_model.mlstm_large, num_heads=2),
  )


# The vocabularies are larger than those of the tokenizers.
MODELS = {
  "wide": ("llama", _model(128, 384)),
  "narrow": ("byte", _model(64, 272)),
}


@functools.cache
def parameters(name: str) -> Params:
  """Parameters whose outputs depend on the past and differ widely."""
  rng = np.random.default_rng(0)

  def drawn(path, like):
    noise = rng.standard_normal(like.shape).astype(np.float32)
    where = jax.tree_util.keystr(path)
    if "scale" in where:
      return 1 + noise / 10
    if "gates" in where and "bias" in where:
      return noise + np.float32(1)
    return noise / np.float32(1 if "embedding" in where else 6)

  abstract = Definition(MODELS[name][1]).abstract()
  return jax.tree_util.tree_map_with_path(drawn, abstract)


def make_run(folder: pathlib.Path, name: str) -> None:
  """A workdir as training leaves it."""
  tokenizer, model = MODELS[name]
  config.save(folder, RunConfig(model=model))
  checkpoints = Checkpoints(folder / workdir.CHECKPOINTS, CheckpointConfig())
  checkpoints.save(
    3, {"params": jax.tree.map(jax.device_put, parameters(name))}
  )
  checkpoints.close()
  TOKENIZERS[tokenizer].save(folder)


def make(folder: pathlib.Path) -> dict[str, list[str]]:
  """Writes all exports; returns what each said."""
  told = {}
  for name in MODELS:
    make_run(folder / f"run_{name}", name)
    told[name] = hf.export_folder(folder / f"run_{name}", folder / name)
  for name, tokenizer in TOKENIZERS.items():
    target = folder / "tokenizers" / name
    target.mkdir(parents=True)
    ids = dict.fromkeys(large.TOKEN_IDS, tokenizer.end_of_text)
    found = tokenizer_files.exported(tokenizer, {}, ids)
    tokenizer_files.save(target, tokenizer, found)
    content = {"model_type": "xlstm", **ids}
    (target / hf.CONFIG).write_text(json.dumps(content))
  return told


def digests(folder: pathlib.Path) -> dict[str, str]:
  """What identifies the files that transformers reads."""
  found = {}
  for place in (*MODELS, "tokenizers/*"):
    for path in sorted(folder.glob(f"{place}/*")):
      if path.is_file() and path.name != SPEC_FILE:
        data = path.read_bytes()
        if path.suffix == ".json":
          data = json.dumps(json.loads(data), sort_keys=True).encode()
        name = path.relative_to(folder).as_posix()
        found[name] = hashlib.sha256(data).hexdigest()[:12]
  return found


if __name__ == "__main__":
  out = pathlib.Path(sys.argv[1])
  make(out)
  (out / DIGESTS).write_text(json.dumps(digests(out)))
