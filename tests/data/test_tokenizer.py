"""Ids and text: round trips, and no text that can end itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from xlstm_jax.data import tokenizer
from xlstm_jax.data.tokenizer import ByteTokenizer, Tokenizer
from xlstm_jax.errors import UserError

TEXTS = ["def f(x):\n  return x\n", "the cat and the hat", "Grüße, 世界 🙂"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
  return tokenizer.train(TEXTS * 3, 300)


@pytest.fixture(params=["byte", "bpe"])
def tokens(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
  return ByteTokenizer() if request.param == "byte" else bpe


def unigram() -> tokenizers.Tokenizer:
  """Knows its end of text as an ordinary piece, the most likely one."""
  pieces = [("<unk>", 0.0), ("</s>", 0.0)]
  pieces += [(c, -3.0) for c in "</s>ab "]
  result = tokenizers.Tokenizer(models.Unigram(pieces, 0))
  result.add_special_tokens(["</s>"])
  return result


def saved(path: Path, value: tokenizers.Tokenizer | dict[str, Any]) -> Path:
  text = value if isinstance(value, dict) else json.loads(value.to_str())
  path.write_text(json.dumps(text))
  return path


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bytes_round_trip(text: str):
  tokens = ByteTokenizer()
  ids = tokens.encode(text)
  assert ids.dtype == np.dtype("<u2")
  assert ids.tolist() == list(text.encode())
  assert tokens.decode(ids) == text


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_trained_bpe_round_trips(text: str, bpe: Tokenizer):
  ids = bpe.encode(text)
  assert (ids != bpe.end_of_text).all()
  assert bpe.decode(ids) == text


@given(st.lists(st.binary(max_size=20), max_size=6))
@settings(max_examples=100, deadline=None)
def test_documents_of_bytes_are_joined_by_their_ends(texts: list[bytes]):
  ids, lengths = ByteTokenizer().encode_documents(texts)
  assert lengths.tolist() == [len(text) for text in texts]
  assert ids.tolist() == [i for text in texts for i in [*text, 256]]


def test_documents_are_encoded_as_alone(tokens: Tokenizer):
  ids, lengths = tokens.encode_documents([text.encode() for text in TEXTS])
  expected = []
  for text, length in zip(TEXTS, lengths, strict=True):
    alone = tokens.encode(text).tolist()
    assert len(alone) == length
    expected += [*alone, tokens.end_of_text]
  assert ids.tolist() == expected
  assert ids.dtype == tokens.dtype


@given(data=st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_streamed_bytes_add_up_to_the_whole(data: bytes):
  stream = ByteTokenizer().stream()
  text = "".join(map(stream.feed, data)) + stream.flush()
  assert text == data.decode(errors="replace")


def test_streaming_never_shows_half_a_character(tokens: Tokenizer):
  stream = tokens.stream()
  text = TEXTS[2]
  shown = [stream.feed(int(token)) for token in tokens.encode(text)]
  assert "\ufffd" not in "".join(shown)
  assert "".join(shown) + stream.flush() == text


# Pieces of words, spaces, bytes and repetitions, as the decoders spell them.
PIECES = [
  "▁the",
  "▁",
  "▁▁",
  "qu",
  "ick",
  "##s",
  "fox</w>",
  ".",
  "n't",
  " ",
  "a",
]
PIECES += ["<0xE4>", "<0xB8>", "<0x96>", "<0x41>", "ä", "\u00b8", "ĸ", "Ġa"]
PIECES += ["<pad>", "|", "é", "▁dog"]
SPACES = decoders.Replace("▁", " ")
DECODERS = {
  "none": None,
  "ByteLevel": decoders.ByteLevel(),
  "Metaspace": decoders.Metaspace(),
  "Metaspace first": decoders.Metaspace(prepend_scheme="first"),
  "Metaspace never": decoders.Metaspace(prepend_scheme="never"),
  "WordPiece": decoders.WordPiece(),
  "WordPiece as it is": decoders.WordPiece(cleanup=False),
  "BPEDecoder": decoders.BPEDecoder(),
  "CTC": decoders.CTC(),
  "Replace": SPACES,
  "Fuse": decoders.Fuse(),
  "ByteFallback": decoders.ByteFallback(),
  "Strip": decoders.Strip(" ", 1, 0),
  "Gemma": decoders.Sequence(
    [SPACES, decoders.ByteFallback(), decoders.Fuse()]
  ),
  "Llama": decoders.Sequence(
    [
      SPACES,
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  ),
  "two spaces stripped": decoders.Sequence(
    [SPACES, decoders.Fuse(), decoders.Strip(" ", 2, 0)]
  ),
  "stripped at the end": decoders.Sequence(
    [SPACES, decoders.Fuse(), decoders.Strip(" ", 0, 1)]
  ),
}


def with_decoder(name: str) -> Tokenizer:
  """Ids of `PIECES`, and the end of text after them."""
  vocab = {piece: i for i, piece in enumerate([*PIECES, "</s>"])}
  value = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
  if (decoder := DECODERS[name]) is not None:
    value.decoder = decoder
  data = value.to_str().encode()
  return tokenizer.HuggingFaceTokenizer(data, Path(name))


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_and_the_stream_behind_it_add_up_to_the_whole(name: str):
  tokens = with_decoder(name)

  @given(ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=9))
  @settings(max_examples=150, deadline=None, derandomize=True)
  def holds(ids: list[int]):
    whole = tokens.decode(ids)
    if "\ufffd" in whole:
      return
    for cut in range(len(ids) + 1):
      prompt = tokens.decode(ids[:cut])
      if not prompt.endswith("\ufffd"):
        stream = tokens.stream(ids[:cut])
        shown = "".join(map(stream.feed, ids[cut:])) + stream.flush()
        assert prompt + shown == whole

  holds()


@pytest.mark.parametrize(
  ("name", "prompt", "drawn", "shown"),
  [
    # Each lost its space, or was shown with one too many.
    ("Llama", ["▁the"], ["▁dog"], " dog"),
    ("Metaspace", ["▁the"], ["▁dog", "▁▁", "▁dog"], " dog   dog"),
    ("WordPiece", ["qu"], ["##s", "a"], "s a"),
    ("BPEDecoder", ["fox</w>"], ["qu", "fox</w>"], " qufox"),
    ("CTC", ["a"], ["a", "<pad>", "a"], "a"),
    ("none", ["a"], ["a"], " a"),
    ("two spaces stripped", ["a"], ["▁", "▁", "a"], "  a"),
    # Nothing stands before it.
    ("Llama", [], ["▁the", "▁dog"], "the dog"),
    # Bytes that are no character, after one that is.
    ("Gemma", ["<0xE4>", "<0xB8>", "<0x96>"], ["<0xB8>", "a"], "\ufffda"),
  ],
)
def test_text_behind_a_prompt(
  name: str, prompt: list[str], drawn: list[str], shown: str
):
  stream = with_decoder(name).stream(map(PIECES.index, prompt))
  text = "".join(map(stream.feed, map(PIECES.index, drawn))) + stream.flush()
  assert text == shown


@pytest.mark.parametrize(
  ("name", "drawn", "shown"),
  [
    ("Metaspace", ["▁dog"], " dog"),
    ("WordPiece", ["qu", "##s"], " qus"),
    ("ByteLevel", ["Ġa"], " a"),
    ("none", ["qu"], " qu"),
  ],
)
def test_text_behind_one_that_is_not_given(
  name: str, drawn: list[str], shown: str
):
  stream = with_decoder(name).stream()
  text = "".join(map(stream.feed, map(PIECES.index, drawn))) + stream.flush()
  assert text == shown


def test_the_stream_decodes_few_ids_at_a_time(monkeypatch: pytest.MonkeyPatch):
  """Also of ids whose text would be stripped if they stood alone."""
  tokens = with_decoder("Metaspace")
  stream = tokens.stream([0])
  longest = 0

  def decode(ids, decode=tokens.decode):
    nonlocal longest
    longest = max(longest, len(ids))
    return decode(ids)

  monkeypatch.setattr(tokens, "decode", decode)
  text = "".join(stream.feed(PIECES.index("▁▁")) for _ in range(50))
  assert text == " " * 100
  assert longest <= 3


def test_the_end_of_text_has_no_text(tokens: Tokenizer):
  ids = [*tokens.encode("ab"), tokens.end_of_text, *tokens.encode("c")]
  assert tokens.decode(ids) == "abc"
  stream = tokens.stream()
  assert stream.feed(tokens.end_of_text) == ""


def test_half_a_character_is_shown_as_replaced():
  tokens = ByteTokenizer()
  assert tokens.decode([0xE4, 0xB8]) == "\ufffd"
  stream = tokens.stream()
  assert [stream.feed(0xE4), stream.feed(0xB8)] == ["", ""]
  assert stream.flush() == "\ufffd"


def test_a_text_cannot_end_itself(tokens: Tokenizer):
  text = f"a {tokenizer.TRAINED_END_OF_TEXT} b"
  ids = tokens.encode(text)
  assert (ids != tokens.end_of_text).all()
  assert tokens.decode(ids) == text


def test_a_text_cannot_end_itself_where_the_model_knows_the_name(
  tmp_path: Path,
):
  plain = unigram()
  plain.encode_special_tokens = True
  assert 1 in plain.encode("a</s>b").ids
  tokens = tokenizer.load(saved(tmp_path / "t.json", plain))
  ids = tokens.encode("a</s></s>b")
  assert (ids != tokens.end_of_text).all()
  assert tokens.decode(ids).replace(" ", "") == "a</s></s>b"
  ids, lengths = tokens.encode_documents([b"a", b"</s>", b"b"])
  assert (ids == tokens.end_of_text).sum() == 3
  assert (lengths > 0).all()


def test_a_text_cannot_end_itself_through_an_ordinary_added_token(
  tmp_path: Path,
):
  base = tokenizer.train(TEXTS, 260)
  value = json.loads(base._data)
  value["added_tokens"][0]["special"] = False
  tokens = tokenizer.load(saved(tmp_path / "t.json", value))
  text = f"a{tokenizer.TRAINED_END_OF_TEXT}b"
  assert (tokens.encode(text) != tokens.end_of_text).all()


def test_a_text_that_is_the_end_of_text_is_left_out(tmp_path: Path):
  """Where unknown words are the end of text, nothing can tell them apart."""
  model = models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")
  value = tokenizers.Tokenizer(model)
  value.pre_tokenizer = pre_tokenizers.Whitespace()
  tokens = tokenizer.load(saved(tmp_path / "t.json", value))
  ids, lengths = tokens.encode_documents([b"a a", b"a x", b"a"])
  assert lengths.tolist() == [2, -1, 1]
  assert ids.tolist() == [1, 1, 0, 1, 0]
  with pytest.raises(UserError, match="cannot be told from the end"):
    tokens.encode("x")


def test_truncation_padding_and_templates_are_ignored(tmp_path: Path):
  base = tokenizers.Tokenizer.from_str(
    tokenizer.train(TEXTS, 260)._data.decode()
  )
  base.enable_truncation(3)
  base.enable_padding(length=50)
  base.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  tokens = tokenizer.load(saved(tmp_path / "t.json", base))
  assert len(tokens.encode("0123456789")) == 10


def test_training_is_deterministic():
  first, second = (tokenizer.train(TEXTS * 50, 400) for _ in range(2))
  assert first.hash == second.hash
  assert first.vocab_size <= 400
  assert first.end_of_text == 0


@pytest.mark.parametrize("size", [256, 2**20 + 1])
def test_a_vocabulary_out_of_range_is_refused(size: int):
  with pytest.raises(UserError, match=f"not {size}"):
    tokenizer.train(TEXTS, size)


def test_saving_and_loading_keeps_the_identity(
  tokens: Tokenizer, tmp_path: Path
):
  tokens.save(tmp_path)
  loaded = tokenizer.load(tmp_path)
  assert loaded.spec == tokens.spec
  assert loaded.encode(TEXTS[0]).tolist() == tokens.encode(TEXTS[0]).tolist()


def test_the_hash_names_the_content(bpe: Tokenizer):
  other = tokenizer.train([*TEXTS, "zebra zebra"], 300)
  assert len({bpe.hash, other.hash, ByteTokenizer.hash}) == 3


def test_the_end_of_text_can_be_named(tmp_path: Path, bpe: Tokenizer):
  value = json.loads(bpe._data)
  path = saved(tmp_path / "t.json", value)
  named = tokenizer.load(path, end_of_text="!")
  assert named.end_of_text == value["model"]["vocab"]["!"]
  assert named.hash != tokenizer.load(path).hash
  (tmp_path / "saved").mkdir()
  named.save(tmp_path / "saved")
  assert tokenizer.load(tmp_path / "saved").spec == named.spec
  with pytest.raises(UserError, match="no token nowhere"):
    tokenizer.load(path, end_of_text="nowhere")


def test_an_unknown_end_of_text_is_asked_for(tmp_path: Path):
  value = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
  with pytest.raises(UserError, match="--end-of-text"):
    tokenizer.load(saved(tmp_path / "t.json", value))


def test_a_folder_with_a_tokenizer_json_will_do(tmp_path: Path, bpe: Tokenizer):
  (tmp_path / "tokenizer.json").write_bytes(bpe._data)
  assert tokenizer.load(tmp_path).spec == bpe.spec


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{}",
    b'{"model": {}}',
    b'{"added_tokens": 3, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    b'{"model": {"type": "Unigram", "vocab": [], "unk_id": 5}}',
    b'{"model": {"type": "BPE", "vocab": {"</s>": 4294967295}, "merges": []}}',
    b'{"model": {"type": "BPE", "vocab": {"</s>": -1}, "merges": []}}',
    b"[" * 100_000,
  ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    tokenizer.load(path)


def test_a_tokenizer_that_makes_the_library_panic_is_refused(
  tmp_path: Path, bpe: Tokenizer
):
  value = json.loads(bpe._data)
  value["model"]["continuing_subword_prefix"] = "long prefix"
  with pytest.raises(UserError, match="not a usable"):
    tokenizer.load(saved(tmp_path / "tokenizer.json", value))


@settings(
  max_examples=60,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_change_of_a_tokenizer_works_or_is_refused(
  tmp_path: Path, bpe: Tokenizer, data: st.DataObject
):
  text = bytearray(bpe._data)
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.sampled_from(b'0199-{}[]",:anftu\\ '))
  path = tmp_path / "tokenizer.json"
  path.write_bytes(text)
  try:
    tokens = tokenizer.load(path)
    ids, lengths = tokens.encode_documents([t.encode() for t in TEXTS])
  except UserError:
    return
  assert (ids == tokens.end_of_text).sum() == (lengths >= 0).sum()
  assert ids.max() < tokens.vocab_size
  tokens.decode(ids)


def test_a_missing_tokenizer_is_named(tmp_path: Path):
  with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
    tokenizer.load(tmp_path / "nowhere")


def test_an_altered_tokenizer_is_refused(tmp_path: Path, bpe: Tokenizer):
  bpe.save(tmp_path)
  path = tmp_path / "tokenizer.json"
  path.write_bytes(path.read_bytes() + b"\n")
  with pytest.raises(UserError, match="was altered"):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize(
  "spec",
  [
    "[]",
    '{"kind": "byte"}',
    '{"kind": "byte", "hash": "x", "vocab_size": 257, "end_of_text": 256}',
    '{"kind": "byte", "hash": "x", "vocab_size": 257, "end_of_text": 257}',
    '{"kind": "byte", "hash": "x", "vocab_size": true, "end_of_text": 0}',
    '{"kind": "other", "hash": "x", "vocab_size": 2, "end_of_text": 0}',
  ],
)
def test_a_hostile_spec_is_refused(tmp_path: Path, spec: str):
  (tmp_path / tokenizer.SPEC_FILE).write_text(spec)
  with pytest.raises(UserError):
    tokenizer.load(tmp_path)


def test_text_that_is_no_unicode_is_refused(tokens: Tokenizer):
  with pytest.raises(UserError, match="not valid Unicode"):
    tokens.encode("a\ud800")
