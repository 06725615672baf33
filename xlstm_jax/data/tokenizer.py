"""Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`."""

import abc
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError

SPEC_FILE = "tokenizer_spec.json"
HUGGING_FACE_FILE = "tokenizer.json"
TRAINED_END_OF_TEXT = "<|endoftext|>"
# GPT-2 and GPT-NeoX, Llama 3, Llama 1-2 and T5, Gemma, BERT-like, DeepSeek.
END_OF_TEXT_NAMES = (
  TRAINED_END_OF_TEXT,
  "<|end_of_text|>",
  "</s>",
  "<eos>",
  "[EOS]",
  "<|eos|>",
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_MAX_FILE_BYTES = 512 * 2**20
# Encoding takes about 140 bytes of memory per byte of text, so longer texts are
# encoded in overlapping windows of this many characters.
_WINDOW = 2**18
_OVERLAP = 2**13
# Number of tokens that must agree on either side of where windows are joined.
_SHARED = 32
# Not \b, which also matches at the end of the searched part.
_WORD_EDGE = re.compile(r"(?<=\w)\W|(?<=\W)\w")


class StreamDecoder:
  """Turns ids that arrive one by one into text, never half a character.

  The text of `prompt`, the results of `feed` and the final `flush` add up to
  `decode` of all ids, if the text of the first ids is the beginning of the text
  of more ids. It is not if a decoder spells out bytes that form no character.
  Then the ids since the last text are shown as they decode on their own.

  Args:
    tokenizer: the tokenizer of the ids.
    prompt: the ids before the first one that arrives.
  """

  def __init__(self, tokenizer: "Tokenizer", prompt: Iterable[int]):
    self._tokenizer = tokenizer
    # The last ids that have text on their own, and the ids that are decoded
    # together with new ones.
    self._anchor: list[int] = list(prompt)
    self._before = self._anchor
    self._text_before = tokenizer.decode(self._before)
    self._pending: list[int] = []

  def feed(self, token: int) -> str:
    """The text that `token` completes, possibly empty."""
    self._pending.append(token)
    text = self._new_text()
    return "" if text.endswith("\ufffd") else self._show(text)

  def flush(self) -> str:
    """The text that stands for an unfinished character at the end."""
    return self._show(self._new_text())

  def _new_text(self) -> str:
    # The text that a token adds depends on its place, because decoders strip
    # spaces at the beginning, join pieces of words and drop repetitions. So it
    # is decoded after the ids before it.
    whole = self._tokenizer.decode(self._before + self._pending)
    if whole.startswith(self._text_before):
      return whole[len(self._text_before) :]
    return self._tokenizer.decode(self._pending)

  def _show(self, text: str) -> str:
    if text:
      alone = self._tokenizer.decode(self._pending)
      # These ids may have nothing but what a decoder strips at the beginning of
      # a text. Then the ids after them would be stripped as well.
      if alone:
        self._anchor = self._before = self._pending
      else:
        self._before = self._anchor + self._pending
      self._text_before = alone or self._tokenizer.decode(self._before)
      self._pending = []
    return text


class Tokenizer(abc.ABC):
  """Ids in [0, vocab_size); the end-of-text id never occurs inside a text."""

  kind: str
  vocab_size: int
  end_of_text: int
  hash: str

  @property
  def spec(self) -> files.TokenizerSpec:
    return files.TokenizerSpec(
      self.kind, self.hash, self.vocab_size, self.end_of_text
    )

  @property
  def dtype(self) -> np.dtype:
    """Little-endian uint16 or uint32."""
    return files.token_dtype(self.vocab_size)

  def encode(self, text: str) -> np.ndarray:
    """The ids of one text, without an end-of-text."""
    try:
      data = text.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f"The text {text[:40]!r} is not valid Unicode."
      ) from error
    tokens, lengths = self.encode_documents([data])
    if lengths[0] < 0:
      raise UserError(
        f"The text {text[:40]!r} cannot be told from the end of a text by this "
        "tokenizer."
      )
    return tokens[:-1]

  @abc.abstractmethod
  def encode_documents(
    self, texts: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encodes UTF-8 texts to (d1 E d2 E ... dn E, lengths without the E).

    A text whose ids cannot be kept free of E has length -1 and no tokens, not
    even an E.
    """

  @abc.abstractmethod
  def decode(self, tokens: Iterable[int]) -> str:
    """The text of the ids; end-of-text adds nothing, broken UTF-8 is U+FFFD."""

  @abc.abstractmethod
  def plain_file(self) -> bytes:
    """A `tokenizer.json` with which every reader gets the ids of `encode`."""

  def stream(self, prompt: Iterable[int] | None = None) -> StreamDecoder:
    """A decoder for ids that arrive one by one.

    Args:
      prompt: the ids before them, empty at the beginning of a text; None if
        some text comes before them that ended with a word.
    """
    if prompt is None:
      tokens, lengths = self.encode_documents([b"a"])
      prompt = tokens[: max(lengths[0], 0)]
    return StreamDecoder(self, prompt)

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes what `load(directory)` needs."""
    data = json.dumps(dataclasses.asdict(self.spec), indent=1)
    files.write_atomically(Path(directory) / SPEC_FILE, f"{data}\n".encode())


class ByteTokenizer(Tokenizer):
  """The 256 byte values, and id 256 for the end of text."""

  kind = "byte"
  vocab_size = 257
  end_of_text = 256
  hash = hashlib.sha256(b"xlstm_jax byte tokenizer 1").hexdigest()

  def encode_documents(
    self, texts: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    joined = np.frombuffer(b"\0".join((*texts, b"")), np.uint8)
    tokens = joined.astype(self.dtype)
    tokens[np.cumsum(lengths + 1) - 1] = self.end_of_text
    return tokens, lengths

  def decode(self, tokens: Iterable[int]) -> str:
    data = bytes(int(t) for t in tokens if t != self.end_of_text)
    return data.decode("utf-8", errors="replace")

  def plain_file(self) -> bytes:
    vocab = {char: byte for byte, char in enumerate(_byte_chars())}
    tokenizer = tokenizers.Tokenizer(
      models.BPE({**vocab, TRAINED_END_OF_TEXT: self.end_of_text}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([TRAINED_END_OF_TEXT])
    return tokenizer.to_str(pretty=True).encode()


class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizer.json`, used for text only.

  It adds no special tokens, and encodes the name of one inside a text by its
  characters. Truncation and padding are switched off.
  """

  kind = "huggingface"

  def __init__(
    self, data: bytes, path: Path, end_of_text: str | int | None = None
  ):
    """Reads the bytes of `path`; `end_of_text` None looks for a known name.

    Raises:
      UserError: the file is no tokenizer, or has no known end-of-text token.
    """
    self._data = data
    content = files.parse_json(data, path)
    name, self.end_of_text = _find_end_of_text(
      build(content, path), path, end_of_text
    )
    self._end_of_text_name = name
    self._tokenizer = build(_as_special(content, name), path)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
    self.vocab_size = max(ids) + 1
    if self.vocab_size > files.MAX_VOCAB_SIZE:
      raise UserError(f"{path} has the id {self.vocab_size - 1}: too large.")
    identity = b"%d\n%s" % (self.end_of_text, data)
    self.hash = hashlib.sha256(identity).hexdigest()

  def encode_documents(
    self, texts: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    plain = self._encode([text.decode() for text in texts])
    documents: list[np.ndarray | None] = list(plain)
    for i, tokens in enumerate(plain):
      if (tokens == self.end_of_text).any():
        documents[i] = self._encode_apart(texts[i].decode())
    end = np.array([self.end_of_text], self.dtype)
    lengths = np.array([-1 if d is None else len(d) for d in documents])
    pieces = [end[:0]]
    for tokens in documents:
      if tokens is not None:
        pieces += [tokens, end]
    return np.concatenate(pieces), lengths

  def decode(self, tokens: Iterable[int]) -> str:
    kept = [int(t) for t in tokens if t != self.end_of_text]
    if not kept:
      # A decoder that strips at the end panics if there are no tokens at all.
      return ""
    with _explained("the tokenizer failed on ids"):
      return self._tokenizer.decode(kept, skip_special_tokens=False)

  def plain_file(self) -> bytes:
    """The file itself, if nothing in it is ignored here."""
    content = json.loads(self._data)
    plain = _as_special(content, self._end_of_text_name)
    plain |= {"truncation": None, "padding": None}
    if self._tokenizer.num_special_tokens_to_add(is_pair=False):
      plain["post_processor"] = None
    # Null, empty and missing mean the same.
    if _filled(plain) == _filled(content):
      return self._data
    return json.dumps(plain).encode()

  def save(self, directory: str | os.PathLike[str]) -> None:
    files.write_atomically(Path(directory) / HUGGING_FACE_FILE, self._data)
    super().save(directory)

  def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    short = iter(self._encode_whole([t for t in texts if len(t) <= _WINDOW]))
    return [
      next(short) if len(text) <= _WINDOW else self._encode_long(text)
      for text in texts
    ]

  def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]:
    with _explained("the tokenizer failed on a text"):
      encoded = self._tokenizer.encode_batch_fast(
        texts, add_special_tokens=False
      )
    return [np.array(one.ids, self.dtype) for one in encoded]

  def _encode_long(self, text: str) -> np.ndarray:
    """The ids of a long text, in the memory that a window of it takes.

    Windows overlap. Their overlap is also encoded on its own: it begins where
    the second window does, and ends where the first does. In its middle all
    three have the same tokens, and there the windows are joined.

    A word must end or begin after that place. Otherwise the second window may
    still depend on where it began, as it does among digits that are taken in
    threes. If there is no such place, as in a word without end, the first
    window grows.
    """
    parts: list[np.ndarray] = []
    start, end, begin = 0, _WINDOW, 0
    [left] = self._encode_whole([text[start:end]])
    while end < len(text):
      second = end - _OVERLAP
      [right] = self._encode_whole([text[second : second + _WINDOW]])
      shared, starts = self._encode_with_starts(text[second:end])
      joint, last = _shared_tokens(left, shared, right)
      if joint < last and _WORD_EDGE.search(
        text, second + starts[joint] + 1, second + starts[last]
      ):
        parts.append(left[begin : len(left) - len(shared) + joint])
        left, begin = right, joint
        start, end = second, second + _WINDOW
        continue
      end = start + 2 * (end - start)
      [grown] = self._encode_whole([text[start:end]])
      if _equal(left, grown) < begin + _SHARED:
        # The text that follows changes what was joined: encode the whole.
        return self._encode_whole([text])[0]
      left = grown
    return np.concatenate((*parts, left[begin:]))

  def _encode_with_starts(self, text: str) -> tuple[np.ndarray, list[int]]:
    """The ids of a text, and the character at which each token begins."""
    with _explained("the tokenizer failed on a text"):
      encoded = self._tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(encoded.ids, self.dtype)
    return ids, [start for start, _ in encoded.offsets]

  def _encode_apart(self, text: str) -> np.ndarray | None:
    """Encodes a text in which the model finds the end-of-text token's name.

    Unigram models have the name as an ordinary piece, so every occurrence is
    cut in two. The result is None if that does not help, for example because
    <unk> is the end of text.
    """
    name = self._end_of_text_name
    pieces = text.split(name)
    half = len(name) // 2
    parts = [piece + name[:half] for piece in pieces[:-1]] + pieces[-1:]
    parts[1:] = [name[half:] + part for part in parts[1:]]
    tokens = np.concatenate(self._encode(parts))
    return None if (tokens == self.end_of_text).any() else tokens


def _shared_tokens(
  left: np.ndarray, shared: np.ndarray, right: np.ndarray
) -> tuple[int, int]:
  """Two tokens of `shared`, a middle one and the last, that all three have.

  The arguments are the ids of two windows and of their overlap. They agree from
  `_SHARED` tokens before the first result until as many after the last. If
  there are no such tokens, the last result is before the first.
  """
  last = _equal(shared, right) - _SHARED
  first = len(shared) - _equal(shared[::-1], left[::-1]) + _SHARED
  return max((first + last) // 2, first), last


def _equal(one: np.ndarray, other: np.ndarray) -> int:
  """The number of leading entries that are the same."""
  size = min(len(one), len(other))
  differ = np.flatnonzero(one[:size] != other[:size])
  return int(differ[0]) if len(differ) else size


def load(
  spec: str | os.PathLike[str], *, end_of_text: str | None = None
) -> Tokenizer:
  """A tokenizer by name or place.

  `spec` is "byte", a `tokenizer.json`, or a folder: one that prepare or train
  wrote, or any other with a `tokenizer.json`. `end_of_text` names the
  end-of-text token if it has none of the usual names.

  Raises:
    UserError: there is no tokenizer, it is malformed, or it was altered.
  """
  if spec == ByteTokenizer.kind:
    return ByteTokenizer()
  path = Path(spec)
  if path.is_dir():
    if (path / SPEC_FILE).exists():
      return _load_saved(path)
    path = path / HUGGING_FACE_FILE
  if not path.exists():
    raise UserError(
      f"There is no tokenizer at {path}; give the path of a tokenizer.json, or "
      f"{ByteTokenizer.kind}."
    )
  data = files.read_regular_file(path, limit=_MAX_FILE_BYTES)
  return HuggingFaceTokenizer(data, path, end_of_text)


def train(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
  """Trains a byte-level BPE; the same texts in the same order give the same.

  The vocabulary has the end-of-text token, the 256 byte values and merges. It
  is smaller than `vocab_size` if the texts have too few distinct pairs.
  """
  if not 257 <= vocab_size <= 2**20:
    raise UserError(
      f"A trained vocabulary has 257 to {2**20} entries, not {vocab_size}."
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[TRAINED_END_OF_TEXT],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  data = tokenizer.to_str(pretty=True).encode()
  return HuggingFaceTokenizer(data, Path(HUGGING_FACE_FILE))


def training_parts(text: str) -> Iterator[str]:
  """A long text in parts that train a tokenizer as the whole text does.

  Parts end after a word, before a blank or a line end, where the trained
  tokenizer always starts a new piece. A word without end is cut.
  """
  start = 0
  while len(text) - start > _WINDOW:
    stop = start + _WINDOW
    while stop > start and not (
      text[stop] in " \n" and not text[stop - 1].isspace()
    ):
      stop = max(text.rfind(c, start, stop) for c in " \n")
    stop = stop if stop > start else start + _WINDOW
    yield text[start:stop]
    start = stop
  yield text[start:]


def _load_saved(directory: Path) -> Tokenizer:
  path = directory / SPEC_FILE
  data = files.read_regular_file(path, limit=2**20)
  spec = files.tokenizer_spec(files.parse_json(data, path), path)
  if spec.kind == ByteTokenizer.kind:
    tokenizer = ByteTokenizer()
  else:
    path = directory / HUGGING_FACE_FILE
    data = files.read_regular_file(path, limit=_MAX_FILE_BYTES)
    tokenizer = HuggingFaceTokenizer(data, path, spec.end_of_text)
  if tokenizer.spec != spec:
    raise UserError(
      f"{path} was altered: it is not the tokenizer that {SPEC_FILE} beside it "
      "describes."
    )
  return tokenizer


def build(content: Any, path: Path) -> tokenizers.Tokenizer:
  """The tokenizer that a `tokenizer.json` defines; a UserError if none."""
  with _explained(f"{path} is not a usable tokenizer.json"):
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def name_of(tokenizer: tokenizers.Tokenizer, token: int) -> str | None:
  """The name of an id, which may be any number; None if it has none."""
  return tokenizer.id_to_token(token) if 0 <= token < 2**32 else None


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
  """For single calls into `tokenizers`, whose errors have no class.

  The package raises a plain Exception for everything. A panic of its Rust code
  is a BaseException that cannot be imported.
  """
  try:
    yield
  except BaseException as error:
    panicked = type(error).__name__ == "PanicException"
    if isinstance(error, Exception) or panicked:
      raise UserError(f"{what}: {error}.") from error
    raise


def _find_end_of_text(
  tokenizer: tokenizers.Tokenizer, path: Path, wanted: str | int | None
) -> tuple[str, int]:
  if isinstance(wanted, int):
    wanted = name_of(tokenizer, wanted) or f"of id {wanted}"
  for name in END_OF_TEXT_NAMES if wanted is None else (wanted,):
    token = tokenizer.token_to_id(name)
    if token is not None:
      return name, token
  if wanted is not None:
    raise UserError(f"{path} has no token {wanted} to end a text with.")
  raise UserError(
    f"{path} has none of the usual end-of-text tokens "
    f"({', '.join(END_OF_TEXT_NAMES)}); name it with --end-of-text."
  )


def _as_special(content: Any, name: str) -> Any:
  """Marks the end-of-text special, so that it can be kept out of text."""
  added = [
    {**token, "special": True} if token.get("content") == name else token
    for token in content.get("added_tokens") or []
  ]
  return {**content, "added_tokens": added}


def _filled(content: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in content.items() if value}


def _byte_chars() -> list[str]:
  """The character with which byte-level tokenizers write each byte (GPT-2)."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(b if b in shown else next(others)) for b in range(256)]
