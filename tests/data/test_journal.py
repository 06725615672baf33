"""The journal of a preparation: exact, or refused."""

import json
from pathlib import Path

import pytest

from xlstm_jax.data import journal, layout, writer
from xlstm_jax.data.readers.reader import Place
from xlstm_jax.errors import UserError


def example() -> journal.Journal:
  return journal.Journal(
    settings={"tokenizer": "byte", "heldout-fraction": 0.1},
    listing="l",
    sizes="s",
    tokenizer="t",
    place=Place(1, 2, 3, 4),
    sources=["a"],
    splits={
      name: writer.SplitState(
        shards=[layout.Shard(f"{name}-00000", 1, 2, 3)],
        open_entries=5,
        open_documents=1,
        counts=[layout.Counts(1, 2, 3)],
      )
      for name in layout.SPLITS
    },
    skipped=1,
    empty_files=2,
  )


def test_a_journal_round_trips(tmp_path: Path):
  example().save(tmp_path)
  assert journal.load(tmp_path) == example()


def test_a_journal_of_the_first_rules_continues_more_than_once(
  tmp_path: Path,
):
  example().save(tmp_path)
  path = tmp_path / layout.PROGRESS
  content = json.loads(path.read_text())
  for name in ("version", "hash", "rules", "empty_lines"):
    del content[name]
  content |= {"version": 1, "hash": journal._digest(content)}
  path.write_text(json.dumps(content))
  for _ in range(2):
    kept = journal.load(tmp_path)
    assert kept
    assert (kept.rules, kept.empty_lines) == (1, 0)
    kept.save(tmp_path)


def test_there_may_be_none(tmp_path: Path):
  assert journal.load(tmp_path) is None


def test_every_digit_of_a_journal_is_checked(tmp_path: Path):
  example().save(tmp_path)
  path = tmp_path / layout.PROGRESS
  text = path.read_text()
  digits = [i for i, character in enumerate(text) if character.isdigit()]
  for i in digits:
    path.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
    with pytest.raises(UserError, match=r"prepare\.json"):
      journal.load(tmp_path)


@pytest.mark.parametrize(
  "content", [b"", b"[]", b"{}", b'{"version": 1}', b"\xff", b"[" * 10**5]
)
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes):
  (tmp_path / layout.PROGRESS).write_bytes(content)
  with pytest.raises(UserError, match=r"prepare\.json"):
    journal.load(tmp_path)


def test_a_journal_that_lacks_something_is_refused(tmp_path: Path):
  text = f'{{"version": 1, "hash": "{journal._digest({})}"}}'
  (tmp_path / layout.PROGRESS).write_text(text)
  with pytest.raises(UserError, match="lacks settings"):
    journal.load(tmp_path)
