"""Manifests from outside: what is malformed is refused, naming the place."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_datasets import MakeDataset

from xlstm_jax.data import layout
from xlstm_jax.errors import UserError

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def directory(make_dataset: MakeDataset) -> Path:
  return make_dataset([(b"abc", 0), (b"d" * 200, 1), (b"e", 1)])


def rewrite(directory: Path, edit: Edit) -> None:
  """Alters a manifest and gives it the hash of what it then says."""
  path = directory / layout.MANIFEST
  content = json.loads(path.read_text())
  del content["hash"]
  edit(content)
  content["hash"] = layout._digest(content)
  path.write_text(json.dumps(content))


def test_a_manifest_round_trips(directory: Path, tmp_path: Path):
  manifest = layout.read_manifest(directory)
  layout.write_manifest(tmp_path, manifest)
  assert layout.read_manifest(tmp_path) == manifest
  stored = json.loads((directory / layout.MANIFEST).read_text())["hash"]
  assert manifest.hash == stored


def test_every_character_of_a_manifest_is_checked(directory: Path):
  path = directory / layout.MANIFEST
  text = path.read_text()
  good = layout.read_manifest(directory)
  for i, character in enumerate(text):
    other = "1" if character != "1" else "2"
    path.write_text(text[:i] + other + text[i + 1 :])
    if character in " \n":
      continue
    with pytest.raises(UserError, match=r"manifest\.json"):
      layout.read_manifest(directory)
  path.write_text(text)
  assert layout.read_manifest(directory) == good


def shard(edit: Callable[[dict[str, Any]], Any]) -> Edit:
  return lambda content: edit(content["splits"]["train"]["shards"][0])


HOSTILE: dict[str, tuple[Edit, str]] = {
  "format": (lambda c: c.update(format="x"), "not a manifest"),
  "version": (lambda c: c.update(version=2), "format version 2"),
  "version type": (lambda c: c.update(version="1"), "format version '1'"),
  "tokenizer": (lambda c: c.update(tokenizer=None), "must be an object"),
  "vocabulary": (
    lambda c: c["tokenizer"].update(vocab_size=0),
    r"\$\.tokenizer\.vocab_size is 0; it must be",
  ),
  "absurd vocabulary": (
    lambda c: c["tokenizer"].update(vocab_size=2**31),
    "vocab_size is 2147483648",
  ),
  "boolean": (
    lambda c: c["tokenizer"].update(vocab_size=True),
    "vocab_size is True; it must be an integer",
  ),
  "end of text": (
    lambda c: c["tokenizer"].update(end_of_text=257),
    "end_of_text must be below 257",
  ),
  "sources": (
    lambda c: c.update(sources={}),
    r"\$.sources is \{\}; it must be a list",
  ),
  "source type": (
    lambda c: c.update(sources=[1, "b"]),
    r"\$.sources\[0\] is 1",
  ),
  "source twice": (
    lambda c: c.update(sources=["a", "a"]),
    "each name once",
  ),
  "source length": (
    lambda c: c.update(sources=["a" * 10**6, "b"]),
    "a string of length <= 200",
  ),
  "source order": (lambda c: c.update(sources=["b", "a"]), "in order"),
  "split missing": (lambda c: c["splits"].pop("heldout"), "train and heldout"),
  "split name": (
    lambda c: c["splits"].update({"../x": c["splits"].pop("heldout")}),
    "train and heldout",
  ),
  "shards": (
    lambda c: c["splits"]["train"].update(shards=3),
    r"splits\['train'\]\.shards is 3; it must be a list",
  ),
  "shard missing": (lambda c: c["splits"]["train"]["shards"].pop(), "sum"),
  "path": (shard(lambda s: s.update(name="../../etc/passwd")), "name is"),
  "absolute path": (shard(lambda s: s.update(name="/etc/passwd")), "name is"),
  "path behind": (shard(lambda s: s.update(name="train-00000/../x")), "name"),
  "line behind": (shard(lambda s: s.update(name="train-00000\n")), "name is"),
  "other split": (shard(lambda s: s.update(name="heldout-00000")), "in order"),
  "other number": (shard(lambda s: s.update(name="train-00009")), "in order"),
  "negative": (shard(lambda s: s.update(tokens=-1)), r"shards\[0\].tokens is"),
  "absurd": (shard(lambda s: s.update(tokens=2**62)), r"shards\[0\].tokens is"),
  "float": (
    shard(lambda s: s.update(tokens=4.0)),
    "tokens is 4.0; it must be an int",
  ),
  "infinite": (shard(lambda s: s.update(tokens=float("inf"))), "an integer"),
  "too many documents": (
    shard(lambda s: s.update(documents=10**6)),
    "at least as",
  ),
  "no documents": (shard(lambda s: s.update(documents=0)), "documents is 0"),
  "checksum": (shard(lambda s: s.update(index_crc32=2**32)), "index_crc32"),
  "sums": (
    lambda c: c["splits"]["train"].update(bytes=1),
    "the sum over its sources",
  ),
  "sums over shards": (shard(lambda s: s.update(documents=3)), "the sum over"),
  "origin": (
    lambda c: c.update(origin=[]),
    r"\$.origin is \[\]; it must be an object",
  ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_with_a_right_hash_is_refused(
  directory: Path, name: str
):
  edit, message = HOSTILE[name]
  rewrite(directory, edit)
  with pytest.raises(UserError, match=message):
    layout.read_manifest(directory)


@pytest.mark.parametrize(
  "content",
  [b"", b"\xff", b"[]", b"null", b"3", b"{}", b"[" * 10**5, b'{"format": {}}'],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes):
  (tmp_path / layout.MANIFEST).write_bytes(content)
  with pytest.raises(UserError, match=r"manifest\.json"):
    layout.read_manifest(tmp_path)


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=9), inner, max_size=3)
  ),
  max_leaves=6,
)


@settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(value=json_values, data=st.data())
def test_any_value_anywhere_is_refused_or_means_the_same(
  directory: Path, value: Any, data: st.DataObject
):
  path = directory / layout.MANIFEST
  text = path.read_text()
  good = layout.read_manifest(directory)

  def edit(content: dict[str, Any]) -> None:
    place: Any = content
    while True:
      keys = list(place) if isinstance(place, dict) else range(len(place))
      key = data.draw(st.sampled_from(keys))
      deeper = isinstance(place[key], dict | list) and place[key]
      if not deeper or data.draw(st.booleans()):
        place[key] = value
        return
      place = place[key]

  try:
    rewrite(directory, edit)
    changed = layout.read_manifest(directory)
  except UserError:
    pass
  else:
    # Only names, checksums and the free-form origin can differ unnoticed.
    assert changed.splits["train"].total == good.splits["train"].total
    assert len(changed.sources) == len(good.sources)
  finally:
    path.write_text(text)


def test_a_manifest_that_is_no_file_does_not_hang(tmp_path: Path):
  os.mkfifo(tmp_path / layout.MANIFEST)
  with pytest.raises(UserError, match="not a regular file"):
    layout.read_manifest(tmp_path)


def test_a_huge_manifest_is_not_read(
  directory: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(layout, "MAX_MANIFEST_BYTES", 100)
  with pytest.raises(UserError, match="at most 100 are expected"):
    layout.read_manifest(directory)


@pytest.mark.parametrize(
  ("vocab_size", "dtype"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4")]
)
def test_tokens_take_the_least_width(vocab_size: int, dtype: str):
  assert layout.token_dtype(vocab_size) == np.dtype(dtype)
