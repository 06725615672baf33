"""The command: what it makes, what it refuses, and that no kill changes it."""

import bz2
import contextlib
import fcntl
import gzip
import itertools
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from xlstm_jax.data import format as files
from xlstm_jax.data import journal, shards, tokenizer, writer
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.prepare import preparation, workers

SOURCES = ("web", "code", "books")
BYTE = "--tokenizer=byte"


def make_texts(count: int, *, seed: int = 0, length: int = 400) -> list[str]:
  rng = random.Random(seed)
  words = ["the", "state", "größe", "世界", "x = 1\n", '"quoted"', "🙂", "\t"]
  return [
    f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, length // 4)))
    for i in range(count)
  ]


def as_lines(texts: Sequence[str]) -> bytes:
  lines = [
    json.dumps(
      {"text": text, "meta": {"redpajama_set_name": SOURCES[i % 3]}},
      ensure_ascii=i % 2 == 0,
    )
    for i, text in enumerate(texts)
  ]
  return "".join(f"{line}\n" for line in lines).encode()


def run(*arguments: Any) -> int:
  return prepare.main([str(argument) for argument in arguments])


def run_default(corpus: Path, output: Path, *more: str) -> int:
  return run(
    f"--input={corpus}",
    f"--output={output}",
    BYTE,
    "--heldout-fraction=0.2",
    "--workers=1",
    *more,
  )


def content(directory: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in directory.iterdir()}


def read_documents(directory: Path, split: str) -> list[tuple[str, str]]:
  data = shards.open_split(directory, split)
  tokens = tokenizer.load(directory)
  documents = [data.document(i) for i in range(data.documents)]
  return [
    (tokens.decode(d.tokens[1:-1]), data.sources[d.source]) for d in documents
  ]


@pytest.fixture
def texts() -> list[str]:
  return make_texts(300)


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
  path = tmp_path / "corpus.jsonl"
  path.write_bytes(as_lines(texts))
  return path


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
  """Commits after every few documents, into many shards."""
  monkeypatch.setattr(workers, "TASK_BYTES", 4000)
  monkeypatch.setattr(preparation, "_COMMIT_SECONDS", 0.0)
  monkeypatch.setattr(preparation, "_MIB", 40)


def test_every_document_comes_back_with_its_source(
  corpus: Path, texts: list[str], tmp_path: Path
):
  assert run_default(corpus, tmp_path / "out") == 0
  expected = Counter((text, SOURCES[i % 3]) for i, text in enumerate(texts))
  found = read_documents(tmp_path / "out", "train")
  heldout = read_documents(tmp_path / "out", "heldout")
  assert Counter(found + heldout) == expected
  assert 30 < len(heldout) < 90
  # Within a split the order is that of the input.
  order = {text: i for i, text in enumerate(texts)}
  for part in (found, heldout):
    numbers = [order[text] for text, _ in part]
    assert numbers == sorted(numbers)


def test_counts_in_the_manifest_are_those_of_the_text(
  corpus: Path, texts: list[str], tmp_path: Path
):
  run_default(corpus, tmp_path / "out")
  manifest = files.read_manifest(tmp_path / "out")
  total = manifest.splits["train"].total + manifest.splits["heldout"].total
  size = sum(len(text.encode()) for text in texts)
  assert total == files.Counts(len(texts), size + len(texts), size)


@pytest.mark.parametrize(
  ("name", "compress"),
  [
    ("c.jsonl.gz", gzip.compress),
    ("c.jsonl.zst", zstandard.ZstdCompressor().compress),
    ("c.jsonl.xz", lzma.compress),
    ("c.jsonl.bz2", bz2.compress),
    ("c.json", bytes),
    ("c.json.gz", gzip.compress),
    ("part-00000.zst", zstandard.ZstdCompressor().compress),
    # Unpacked on its way, and not renamed; packed, and not renamed.
    ("unpacked.jsonl.gz", bytes),
    ("renamed.jsonl", gzip.compress),
  ],
)
def test_compression_changes_nothing(
  corpus: Path,
  tmp_path: Path,
  name: str,
  compress: Callable[[bytes], bytes],
):
  (tmp_path / name).write_bytes(compress(corpus.read_bytes()))
  run_default(corpus, tmp_path / "plain")
  run_default(tmp_path / name, tmp_path / "packed")
  left, right = content(tmp_path / "plain"), content(tmp_path / "packed")
  del left[files.PROGRESS], right[files.PROGRESS]
  assert left == right


@pytest.mark.usefixtures("small_steps")
def test_workers_change_nothing(corpus: Path, tmp_path: Path):
  run_default(corpus, tmp_path / "one")
  run_default(corpus, tmp_path / "three", "--workers=3")
  one = content(tmp_path / "one")
  assert len([name for name in one if name.endswith(".tokens")]) > 4
  assert one == content(tmp_path / "three")


def test_the_split_is_stable_under_order_and_layout(
  corpus: Path, texts: list[str], tmp_path: Path
):
  run_default(corpus, tmp_path / "a")
  lines = as_lines(texts).splitlines(keepends=True)
  random.Random(1).shuffle(lines)
  folder = tmp_path / "folder"
  folder.mkdir()
  for i in range(3):
    (folder / f"{i}.jsonl").write_bytes(b"".join(lines[i::3]))
  run_default(folder, tmp_path / "b")
  for split in files.SPLITS:
    left = read_documents(tmp_path / "a", split)
    assert Counter(left) == Counter(read_documents(tmp_path / "b", split))


@pytest.mark.parametrize(
  ("fraction", "split"), [("0", "train"), ("1", "heldout")]
)
def test_all_may_go_into_one_split(
  corpus: Path, texts: list[str], tmp_path: Path, fraction: str, split: str
):
  output = tmp_path / "out"
  run(f"--input={corpus}", f"--output={output}", BYTE,
      f"--heldout-fraction={fraction}", "--workers=1")  # fmt: skip
  assert len(read_documents(output, split)) == len(texts)
  other = "heldout" if split == "train" else "train"
  with pytest.raises(UserError, match="is empty"):
    shards.open_split(output, other)


def test_plain_text_folders_get_the_source_they_are_given(tmp_path: Path):
  for name in ("code/a.py", "code/sub/b.py", "prose/c.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"text of {name}")
  (tmp_path / "code/empty.py").touch()
  run(f"--input=code={tmp_path}/code", f"--input={tmp_path}/prose", BYTE,
      f"--output={tmp_path}/out", "--heldout-fraction=0",
      "--max-bad-lines=0")  # fmt: skip
  assert read_documents(tmp_path / "out", "train") == [
    ("text of code/a.py", "code"),
    ("text of code/sub/b.py", "code"),
    ("text of prose/c.txt", "default"),
  ]
  origin = files.read_manifest(tmp_path / "out").origin
  assert (origin["skipped"], origin["empty_files"]) == (0, 1)


def test_a_tokenizer_file_is_copied(
  corpus: Path, texts: list[str], tmp_path: Path
):
  trained = tokenizer.train(texts, 400)
  (tmp_path / "saved").mkdir()
  trained.save(tmp_path / "saved")
  output = tmp_path / "out"
  run(f"--input={corpus}", f"--output={output}", "--workers=2",
      f"--tokenizer={tmp_path}/saved/tokenizer.json")  # fmt: skip
  assert tokenizer.load(output).spec == trained.spec
  assert files.read_manifest(output).tokenizer == trained.spec
  found = [text for text, _ in read_documents(output, "train")]
  assert set(found) <= set(texts)
  assert len(found) > 250


def test_a_trained_tokenizer_sees_no_heldout_text(
  texts: list[str], tmp_path: Path
):
  from xlstm_jax.data import encoding

  # Words that stand in held-out documents only.
  marked = [
    f"{text} {'zyxwvut ' * 40}"
    if encoding.split_of(text.encode(), 0.3) == "heldout"
    else text
    for text in texts
  ]
  kept = [
    text
    for text, before in zip(marked, texts, strict=True)
    if text == before or encoding.split_of(text.encode(), 0.3) == "heldout"
  ]
  assert any("zyxwvut" in text for text in kept)
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(as_lines(kept))
  output = tmp_path / "out"
  run(f"--input={corpus}", f"--output={output}", "--train-tokenizer=500",
      "--heldout-fraction=0.3", "--workers=1")  # fmt: skip
  vocabulary = json.loads((output / "tokenizer.json").read_text())["model"][
    "vocab"
  ]
  assert not any("zyx" in token for token in vocabulary)
  heldout = [text for text, _ in read_documents(output, "heldout")]
  assert any("zyx" in text for text in heldout)


def test_documents_cannot_end_themselves(tmp_path: Path):
  text = f"before {tokenizer.TRAINED_END_OF_TEXT} after"
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(as_lines([text] * 3))
  output = tmp_path / "out"
  run(f"--input={corpus}", f"--output={output}", "--train-tokenizer=300",
      "--heldout-fraction=0", "--workers=1")  # fmt: skip
  assert [t for t, _ in read_documents(output, "train")] == [text] * 3


# What is recognised, and what is refused.


def test_a_finished_preparation_says_so(
  corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
  output = tmp_path / "out"
  run_default(corpus, output)
  before = content(output)
  capsys.readouterr()
  assert run_default(corpus, output) == 0
  assert "already prepared" in capsys.readouterr().out
  assert content(output) == before


def test_a_finished_preparation_that_was_damaged_is_not_fine(
  corpus: Path, tmp_path: Path
):
  output = tmp_path / "out"
  run_default(corpus, output)
  os.truncate(output / "train-00000.tokens", 10)
  with pytest.raises(UserError, match="truncated"):
    run_default(corpus, output)


def test_inputs_copied_anew_are_recognised(corpus: Path, tmp_path: Path):
  output = tmp_path / "out"
  run_default(corpus, output)
  os.utime(corpus, (1, 1))
  assert run_default(corpus, output) == 0


def test_changed_inputs_are_refused(corpus: Path, tmp_path: Path):
  output = tmp_path / "out"
  run_default(corpus, output)
  data = corpus.read_bytes()
  corpus.write_bytes(data[:-10] + b"?" + data[-9:])
  os.utime(corpus, (1, 1))
  with pytest.raises(UserError, match="begun with other inputs"):
    run_default(corpus, output)
  corpus.write_bytes(data + data)
  with pytest.raises(UserError, match="begun with other inputs"):
    run_default(corpus, output)


@pytest.mark.parametrize(
  ("option", "message"),
  [
    (
      "--heldout-fraction=0.3",
      "begun with --heldout-fraction=0.2, not with --heldout-fraction=0.3;",
    ),
    ("--shard-size=7", "--shard-size=512, not with --shard-size=7;"),
    (
      "--max-document-size=7",
      "--max-document-size=256, not with --max-document-size=7;",
    ),
  ],
)
def test_other_settings_are_refused(
  corpus: Path, tmp_path: Path, option: str, message: str
):
  run_default(corpus, tmp_path / "out")
  with pytest.raises(UserError, match=message):
    run_default(corpus, tmp_path / "out", option)


def test_another_tokenizer_is_refused(
  corpus: Path, texts: list[str], tmp_path: Path
):
  output = tmp_path / "out"
  run_default(corpus, output)
  before = content(output)
  (tmp_path / "saved").mkdir()
  other = tokenizer.train(texts, 300)
  other.save(tmp_path / "saved")
  byte = f"{BYTE} ({tokenizer.ByteTokenizer.hash[:12]})"
  for option, named in {
    f"--tokenizer={tmp_path}/saved": (
      f"--tokenizer=tokenizer.json ({other.hash[:12]})"
    ),
    "--train-tokenizer=300": "--train-tokenizer=300 --train-tokenizer-size=64",
  }.items():
    with pytest.raises(UserError) as error:
      run(f"--input={corpus}", f"--output={output}", option,
          "--heldout-fraction=0.2")  # fmt: skip
    assert f"begun with {byte}, not with {named}; use" in str(error.value)
  assert content(output) == before


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--train-tokenizer-size=9", BYTE], "=9 is for --train-tokenizer=N, but"),
    (["--end-of-text=</s>", BYTE], "=</s> is for a .*, but --tokenizer=byte"),
    (
      ["--end-of-text=</s>", "--train-tokenizer=300"],
      "but --train-tokenizer=300 has an end of text of its own",
    ),
    (
      ["--end-of-text=</s>", "--tokenizer={saved}"],
      "but --tokenizer=.* has an end of text of its own",
    ),
  ],
)
def test_options_that_nothing_heeds_are_refused(
  corpus: Path, tmp_path: Path, options: list[str], message: str
):
  (tmp_path / "saved").mkdir()
  tokenizer.ByteTokenizer().save(tmp_path / "saved")
  given = [option.format(saved=tmp_path / "saved") for option in options]
  with pytest.raises(UserError, match=message):
    run(f"--input={corpus}", f"--output={tmp_path}/out", *given)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["C.JSONL", "c.ndjson", "c.JsonL.GZ"])
def test_names_of_lines_are_known_in_any_case(
  tmp_path: Path, texts: list[str], name: str
):
  data = as_lines(texts)
  packed = gzip.compress(data) if name.endswith("GZ") else data
  (tmp_path / name).write_bytes(packed)
  run_default(tmp_path / name, tmp_path / "out")
  totals = files.read_manifest(tmp_path / "out").splits.values()
  assert sum(split.total.documents for split in totals) == len(texts)


def test_what_a_file_holds_decides_in_a_folder_as_alone(
  tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
):
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "a.json").write_bytes(as_lines(texts[:9]))
  (folder / "b.json.gz").write_bytes(gzip.compress(as_lines(texts[9:20])))
  (folder / "c.txt.xz").write_bytes(lzma.compress(b"a text"))
  (folder / "d.txt.bz2").write_bytes(bz2.compress(b""))
  problems = {
    "e.json": (b'[{"text": "a"}]', "one JSON array"),
    "f.parquet": (b"PAR1\x15\x80PAR1", "a Parquet file: turn it into"),
    "g.txt.gz": (gzip.compress(b"caf\xe9"), "not UTF-8"),
    "h.txt.gz": (gzip.compress(b"a text" * 99)[:-9], "is truncated or damaged"),
  }
  for name, (data, _) in problems.items():
    (folder / name).write_bytes(data)
  assert run_default(folder, tmp_path / "out", "--max-bad-lines=4") == 0
  errors = capsys.readouterr().err
  found = [t for s in files.SPLITS for t, _ in read_all(tmp_path / "out", s)]
  assert sorted(found) == sorted([*texts[:20], "a text"])
  assert files.read_manifest(tmp_path / "out").origin["empty_files"] == 1
  listed = {e["file"]: e["reason"] for e in skipped(tmp_path / "out")}
  assert list(listed) == list(problems)
  for name, (_, reason) in problems.items():
    assert listed[name].startswith(reason)
    assert f"skipping {folder}/{name}: {reason}" in errors
    with pytest.raises(UserError, match="hold no documents"):
      run_default(folder / name, tmp_path / f"out-{name}")


def read_all(directory: Path, split: str) -> list[tuple[str, str]]:
  """`read_documents` of a split that may be empty."""
  if not files.read_manifest(directory).splits[split].shards:
    return []
  return read_documents(directory, split)


def test_a_redirected_file_is_read_by_what_it_holds(
  corpus: Path, tmp_path: Path
):
  arguments = ["--input=/dev/stdin", f"--output={tmp_path}/out", BYTE]
  with corpus.open() as file:
    subprocess.run(
      [sys.executable, "-m", "xlstm_jax.prepare", *arguments, "--workers=1",
       "--heldout-fraction=0.2"],
      stdin=file, capture_output=True, check=True,
    )  # fmt: skip
  run_default(corpus, tmp_path / "named")
  left, right = content(tmp_path / "out"), content(tmp_path / "named")
  del left[files.PROGRESS], right[files.PROGRESS]
  assert left == right


@pytest.mark.parametrize(
  "name",
  [
    "a b/ü 世界",
    "[a]*?{b}",
    "back\\slash",
    "caf\udce9",
    "new\nline",
    "x/../y/",
  ],
)
def test_folders_may_have_any_name(tmp_path: Path, name: str):
  source = tmp_path / "in" / name
  source.mkdir(parents=True)
  (source / "good\udce9.txt").write_bytes(b"a good text")
  output = tmp_path / "out" / name
  arguments = [
    f"--input={source}/", f"--output={output}", BYTE, "--heldout-fraction=0",
    "--workers=1",
  ]  # fmt: skip
  for _ in range(2):
    assert exit_code(lambda: prepare.main(arguments)) == 0
  assert read_documents(output, "train") == [("a good text", "default")]


def test_a_name_that_is_not_utf8_is_listed_escaped(tmp_path: Path):
  folder, output = tmp_path / "in", tmp_path / "out\udce9"
  folder.mkdir()
  (folder / "good.txt").write_text("a good text")
  (folder / "caf\udce9.txt").write_bytes(b"caf\xe9")
  command = [
    sys.executable, "-m", "xlstm_jax.prepare", f"--input={folder}",
    f"--output={output}", BYTE, "--heldout-fraction=0", "--workers=1",
  ]  # fmt: skip
  for said in ("is ready", "is already prepared"):
    result = subprocess.run(
      command, capture_output=True, text=True, check=True,
      env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert f"{tmp_path}/out\\udce9 {said}" in result.stdout
  assert [entry["file"] for entry in skipped(output)] == ["caf\udce9.txt"]
  assert "caf\\udce9.txt" in (output / "skipped.jsonl").read_text()


def test_what_holds_no_text_counts_towards_no_limit(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
  folder = tmp_path / "in"
  folder.mkdir()
  for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.json", "e.ndjson"):
    (folder / name).touch()
  (folder / "f.jsonl.gz").write_bytes(gzip.compress(b""))
  (folder / "g.jsonl").write_bytes(b"\xef\xbb\xbf\n" + b"\n \r\n" * 75)
  (folder / "h.jsonl").write_bytes(
    as_lines(["a"]) + b'\n{"text": ""}\n' + as_lines(["b"])
  )
  assert run(f"--input={folder}", f"--output={tmp_path}/out", BYTE,
             "--heldout-fraction=0", "--workers=1",
             "--max-bad-lines=0") == 0  # fmt: skip
  assert [t for t, _ in read_documents(tmp_path / "out", "train")] == ["a", "b"]
  origin = files.read_manifest(tmp_path / "out").origin
  assert origin["skipped"] == 0
  assert origin["empty_files"] == 6
  assert origin["empty_lines"] == 153
  out, err = capsys.readouterr()
  assert "skipping" not in err
  assert "cannot be read, 6 empty files and 153 lines without text\n" in out


def of_older_version(output: Path) -> None:
  """Makes the journal that the first rules, which had no number, left."""
  path = output / files.PROGRESS
  data = json.loads(path.read_bytes())
  for name in ("version", "hash", "rules", "empty_lines"):
    del data[name]
  data |= {"version": 1, "hash": journal._digest(data)}
  path.write_text(json.dumps(data))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", ["c.jsonl", "c.json"])
def test_what_an_older_version_began_is_continued_or_refused(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], name: str
):
  corpus, output = tmp_path / name, tmp_path / "out"
  corpus.write_bytes(as_lines(texts))
  with monkeypatch.context() as patch:
    append = preparation.Preparation._append
    calls = iter(range(5))

    def interrupted(*arguments: Any) -> None:
      if next(calls, None) is None:
        raise KeyboardInterrupt
      append(*arguments)

    patch.setattr(preparation.Preparation, "_append", interrupted)
    assert run_default(corpus, output) == 130
  assert 0 < sum(c.documents for c in totals(output)) < len(texts)
  of_older_version(output)
  if name == "c.json":
    with pytest.raises(UserError, match=r"older version, which read .*c\.json"):
      run_default(corpus, output)
    return
  assert run_default(corpus, output) == 0
  run_default(corpus, tmp_path / "whole")
  assert content(output) == content(tmp_path / "whole")


def totals(output: Path) -> Iterable[files.Counts]:
  kept = journal.load(output)
  assert kept
  return kept.totals.values()


def test_what_an_older_version_finished_is_accepted(
  corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
  output = tmp_path / "out"
  named = tmp_path / "c.json"
  shutil.copy(corpus, named)
  run_default(named, output)
  of_older_version(output)
  assert run_default(named, output) == 0
  assert "already prepared" in capsys.readouterr().out
  os.utime(named, (1, 1))
  with pytest.raises(UserError, match="begun by an older version"):
    run_default(named, output)


def test_a_folder_that_holds_something_else_is_refused(
  corpus: Path, tmp_path: Path
):
  output = tmp_path / "out"
  output.mkdir()
  (output / "thesis.tex").write_text("dear")
  with pytest.raises(UserError, match=r"holds something else \(thesis\.tex\)"):
    run_default(corpus, output)
  assert content(output) == {"thesis.tex": b"dear"}


def test_an_output_that_is_a_file_is_refused(corpus: Path, tmp_path: Path):
  with pytest.raises(UserError, match="Cannot write to"):
    run_default(corpus, corpus)


def test_an_output_inside_an_input_is_refused(tmp_path: Path, corpus: Path):
  with pytest.raises(UserError, match="read its own output"):
    run_default(corpus.parent, tmp_path / "out")


def test_two_preparations_cannot_share_a_folder(corpus: Path, tmp_path: Path):
  output = tmp_path / "out"
  output.mkdir()
  descriptor = os.open(output, os.O_RDONLY)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  try:
    with pytest.raises(UserError, match="Another process is preparing"):
      run_default(corpus, output)
  finally:
    os.close(descriptor)


def test_a_tokenizer_is_not_kept_for_other_text(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  """Stopped behind the training, the text replaced by one of equal size."""
  corpus = tmp_path / "c.jsonl"
  arguments = (f"--input={corpus}", "--train-tokenizer=300", "--workers=1")
  corpus.write_bytes(as_lines(["abcabc abcabc"] * 30))

  def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(preparation.Preparation, "_encode_all", interrupted)
    assert run(*arguments, f"--output={tmp_path}/out") == 130
  before = tokenizer.load(tmp_path / "out")
  corpus.write_bytes(as_lines(["xyzxyz xyzxyz"] * 30))
  os.utime(corpus, (1, 1))
  assert run(*arguments, f"--output={tmp_path}/out") == 0
  assert run(*arguments, f"--output={tmp_path}/fresh") == 0
  assert tokenizer.load(tmp_path / "out").hash != before.hash
  assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"{}\n"])
def test_input_without_documents_is_an_error(tmp_path: Path, data: bytes):
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(data)
  output = tmp_path / "out"
  with pytest.raises(UserError, match="hold no documents"):
    run_default(corpus, output)
  with pytest.raises(UserError, match="interrupted"):
    files.read_manifest(output)
  # With the input mended, the same folder will do.
  corpus.write_bytes(as_lines(["text"] * 9))
  assert run_default(corpus, output, "--shard-size=9") == 0


def test_bad_lines_are_reported_and_counted(
  tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
):
  lines = as_lines(texts).splitlines()
  lines[4:4] = [b"", b'{"text"', b"\xff\xff"]
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(b"\n".join(lines))
  assert run_default(corpus, tmp_path / "out") == 0
  errors = capsys.readouterr().err
  assert f"{corpus}:5" not in errors
  assert f"skipping {corpus}:6: not JSON: " in errors
  assert f"skipping {corpus}:7: not UTF-8: invalid start byte\n" in errors
  assert "not shown" not in errors
  assert files.read_manifest(tmp_path / "out").origin["skipped"] == 2
  listed = skipped(tmp_path / "out")
  assert [entry["line"] for entry in listed] == [6, 7]
  assert {entry["file"] for entry in listed} == {"c.jsonl"}
  assert listed[1]["reason"] == "not UTF-8: invalid start byte"


def skipped(directory: Path) -> list[dict[str, Any]]:
  lines = (directory / "skipped.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_all_bad_lines_are_listed_though_few_are_shown(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(as_lines(["text"] * 9) + b"{\n" * 150)
  output = tmp_path / "out"
  with pytest.raises(UserError, match=r"101 lines .*skipped\.jsonl lists them"):
    run_default(corpus, output)
  assert [entry["line"] for entry in skipped(output)] == [*range(10, 111)]
  capsys.readouterr()
  assert run_default(corpus, output, "--max-bad-lines=150") == 0
  out, err = capsys.readouterr()
  assert err.count("skipping ") == 20
  listing = output / "skipped.jsonl"
  assert f"further ones are not shown; {listing} lists them all\n" in err
  assert "skipped 150 lines or files that cannot be read (listed in" in out
  assert [entry["line"] for entry in skipped(output)] == [*range(10, 160)]


@pytest.mark.usefixtures("small_steps")
def test_too_many_bad_lines_are_refused_and_a_higher_number_continues(
  tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
):
  lines = as_lines(texts).splitlines()
  for i in range(100, 200, 20):
    lines[i] = b"{"
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(b"\n".join(lines))
  with pytest.raises(
    UserError, match=r"3 lines .*c\.jsonl:141: not JSON.*--max-bad-lines=2"
  ):
    run_default(corpus, tmp_path / "out", "--max-bad-lines=2")
  assert [e["line"] for e in skipped(tmp_path / "out")] == [101, 121, 141]
  capsys.readouterr()
  assert run_default(corpus, tmp_path / "out", "--max-bad-lines=5") == 0
  errors = capsys.readouterr().err
  assert "continuing behind" in errors
  assert "c.jsonl:101" not in errors
  run_default(corpus, tmp_path / "whole")
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_truncated_archive_is_an_error_that_names_it(
  corpus: Path, tmp_path: Path
):
  path = tmp_path / "c.jsonl.gz"
  path.write_bytes(gzip.compress(corpus.read_bytes())[:-20])
  with pytest.raises(UserError, match=r"c\.jsonl\.gz is truncated"):
    run_default(path, tmp_path / "out")


def test_too_many_sources_are_refused(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(files, "MAX_SOURCES", 2)
  corpus = tmp_path / "c.jsonl"
  corpus.write_bytes(as_lines(["a", "b", "c"]))
  with pytest.raises(UserError, match="more than 2 sources"):
    run_default(corpus, tmp_path / "out")


# Interruptions.


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("calls", [1, 2, 5, 17, 40])
def test_a_full_disk_leaves_what_is_committed(
  corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
):
  run_default(corpus, tmp_path / "whole")
  output = tmp_path / "out"
  left = iter(range(calls))
  fsync = os.fsync

  def full(descriptor: int) -> None:
    if next(left, None) is None:
      raise OSError(28, "No space left on device")
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(UserError, match=r"No space left on device.* is kept"):
    run_default(corpus, output)
  monkeypatch.setattr(os, "fsync", fsync)
  kept = journal.load(output)
  if kept:
    documents = sum(c.documents for c in kept.totals.values())
    assert documents > 0 or calls < 17
  assert run_default(corpus, output) == 0
  assert content(output) == content(tmp_path / "whole")


# With TO_BE_KILLED every commit takes a while and the last one never ends, so
# that a kill finds the process alive and most likely writing, on any machine.
DRIVER = """
import os, resource, signal, sys, time
from xlstm_jax import errors
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.prepare import preparation, workers
workers.TASK_BYTES = 4000
preparation._COMMIT_SECONDS = 0.0
preparation._MIB = 100
if "TO_BE_KILLED" in os.environ:
  fsync = os.fsync
  os.fsync = lambda descriptor: (time.sleep(0.002), fsync(descriptor))
  preparation.files.write_manifest = lambda *_: signal.pause()
limit = int(sys.argv[1])
if limit:
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
if __name__ == "__main__":
  sys.exit(errors.exit_code(lambda: prepare.main(sys.argv[2:])))
"""


@pytest.fixture
def driver(tmp_path: Path) -> Path:
  path = tmp_path / "driver.py"
  path.write_text(DRIVER)
  return path


def command(
  driver: Path, corpus: Path, output: Path, *more: str, limit: int = 0
) -> list[str]:
  return [
    sys.executable,
    str(driver),
    str(limit),
    f"--input={corpus}",
    f"--output={output}",
    BYTE,
    "--heldout-fraction=0.2",
    *more,
  ]


def test_a_write_that_the_system_refuses_is_a_sentence(
  driver: Path, corpus: Path, tmp_path: Path
):
  """A real failing write (of a file over its limit), and going on from it."""
  arguments = (
    driver,
    corpus,
    tmp_path / "out",
    "--workers=1",
  )
  result = subprocess.run(
    command(*arguments, limit=30_000), capture_output=True, text=True
  )
  assert result.returncode == 2
  assert "Traceback" not in result.stderr
  assert f"error: Cannot write to {tmp_path}/out: File too large" in (
    result.stderr
  )
  before = journal.load(tmp_path / "out")
  assert before
  assert sum(c.documents for c in before.totals.values()) > 0
  result = subprocess.run(
    command(*arguments), capture_output=True, text=True, check=True
  )
  assert "continuing behind" in result.stderr
  whole = (driver, corpus, tmp_path / "whole", "--workers=1")
  subprocess.run(command(*whole), capture_output=True, check=True)
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def process_group_is_gone(group: int) -> bool:
  try:
    os.killpg(group, 0)
  except ProcessLookupError:
    return True
  return False


def kill_while_writing(
  arguments: list[str], output: Path, rng: random.Random
) -> None:
  """Kills the command at a random moment after it committed something.

  Only the first process is killed: its workers must end by themselves.
  """
  before = committed(output)
  process = subprocess.Popen(
    arguments,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    start_new_session=True,
    env={**os.environ, "TO_BE_KILLED": "1"},
  )
  with process:
    # Starting takes most of the time: wait for the writing to begin.
    while committed(output) == before:
      if process.poll() is not None:
        raise AssertionError(process.communicate()[1].decode())
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))
    process.kill()
    _, errors = process.communicate()
  assert process.returncode == -signal.SIGKILL, errors.decode()
  deadline = time.monotonic() + 900
  while not process_group_is_gone(process.pid):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def committed(output: Path) -> tuple[int, int] | None:
  """Identifies the last commit that counts documents; None before it."""
  kept = journal.load(output) if output.exists() else None
  if not kept or not kept.place.offset:
    return None
  status = (output / files.PROGRESS).stat()
  return status.st_ino, status.st_mtime_ns


def check_kills(
  driver: Path, tmp_path: Path, *, kills: int, workers: int, documents: int
) -> None:
  corpus = tmp_path / "c.jsonl.zst"
  texts = make_texts(documents, length=1000)
  corpus.write_bytes(zstandard.ZstdCompressor().compress(as_lines(texts)))
  whole = command(driver, corpus, tmp_path / "whole", "--workers=1")
  subprocess.run(whole, capture_output=True, check=True)
  output = tmp_path / "out"
  arguments = command(driver, corpus, output, f"--workers={workers}")
  rng = random.Random(workers)
  places = []
  for _ in range(kills):
    kill_while_writing(arguments, output, rng)
    kept = journal.load(output)
    assert kept
    places.append(kept.place)
  # No kill costs what was committed.
  assert places == sorted(places)
  subprocess.run(arguments, capture_output=True, check=True)
  assert content(output) == content(tmp_path / "whole")


@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 2)])
def test_killed_and_continued_is_as_never_stopped(
  driver: Path, tmp_path: Path, workers: int, kills: int
):
  check_kills(driver, tmp_path, kills=kills, workers=workers, documents=900)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, 20), (2, 6)])
def test_killed_often_and_continued_is_as_never_stopped(
  driver: Path, tmp_path: Path, workers: int, kills: int
):
  check_kills(driver, tmp_path, kills=kills, workers=workers, documents=5000)


def mixed_folder(corpus: Path) -> None:
  """Texts and JSON lines in every packing, and what is no document."""
  corpus.mkdir()
  pack = [bytes, gzip.compress, lzma.compress, bz2.compress]
  pack.append(zstandard.ZstdCompressor().compress)
  texts = make_texts(90)
  for i in range(30):
    text = texts[i].encode()
    (corpus / f"{i:02d}.txt").write_bytes(pack[i % 5](text))
  for i in range(30, 35):
    lines = as_lines(texts[i::5])
    (corpus / f"{i}.json").write_bytes(pack[i % 5](lines))
  (corpus / "10.parquet").write_bytes(b"PAR1\x15\x80PAR1")
  (corpus / "11.txt.gz").write_bytes(gzip.compress(b"x")[:-1])
  (corpus / "12.txt").touch()
  # Longer than `small_steps` allows, of which little is known beforehand.
  (corpus / "13.txt.xz").write_bytes(lzma.compress(b"x" * 20_000))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("mixed", [False, True])
def test_stopping_between_any_two_commits_changes_nothing(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool
):
  """The state on disk after every step of the preparation goes on."""
  corpus = tmp_path / "c.jsonl"
  if mixed:
    mixed_folder(corpus)
  else:
    corpus.write_bytes(as_lines(make_texts(60)))
  run_default(corpus, tmp_path / "whole")
  snapshots: list[Path] = []
  output = tmp_path / "out"

  def recording(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*arguments: Any, **options: Any) -> Any:
      result = function(*arguments, **options)
      copy = tmp_path / "snapshots" / str(len(snapshots))
      shutil.copytree(output, copy)
      snapshots.append(copy)
      return result

    return record

  with monkeypatch.context() as patch:
    for owner, name in (
      (os, "fsync"),
      (os, "replace"),
      (writer.SplitWriter, "append"),
      (writer._OpenShard, "create"),
      (writer._OpenShard, "finish"),
    ):
      patch.setattr(owner, name, recording(getattr(owner, name)))
    run_default(corpus, output)
  assert len(snapshots) > 50
  expected = content(tmp_path / "whole")
  for snapshot in snapshots[:: len(snapshots) // 25]:
    assert run_default(corpus, snapshot) == 0
    assert content(snapshot) == expected


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_commits_and_stops(
  corpus: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  number: signal.Signals,
  workers: int,
):
  output = tmp_path / "out"
  monkeypatch.setattr(preparation, "_COMMIT_SECONDS", 1e9)
  append = writer.SplitWriter.append
  calls = iter(range(7))

  def interrupted(*arguments: Any) -> None:
    append(*arguments)
    if next(calls, None) is None:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(writer.SplitWriter, "append", interrupted)
    more = f"--workers={workers}"
    assert run_default(corpus, output, more) == 128 + number
  assert f"stopped by {number.name}" in capsys.readouterr().err
  kept = journal.load(output)
  assert kept
  assert sum(c.documents for c in kept.totals.values()) > 0
  assert run_default(corpus, output) == 0
  run_default(corpus, tmp_path / "whole")
  assert content(output) == content(tmp_path / "whole")


@pytest.mark.usefixtures("small_steps")
def test_a_worker_that_dies_is_an_error_and_loses_nothing(
  corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  append = writer.SplitWriter.append
  calls = itertools.count(1)

  def killing(*arguments: Any) -> None:
    append(*arguments)
    # Once: later, those that are being reaped come and go.
    if next(calls) == 4:
      for pid in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)

  with monkeypatch.context() as patch:
    patch.setattr(writer.SplitWriter, "append", killing)
    with pytest.raises(UserError, match="A worker process died"):
      run_default(corpus, tmp_path / "out", "--workers=2")
  assert run_default(corpus, tmp_path / "out") == 0
  run_default(corpus, tmp_path / "whole")
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def children(pid: int) -> list[int]:
  """The worker processes, not the resource tracker of multiprocessing."""
  found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
  return [
    int(child)
    for child in found
    if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
  ]


# The command line.


@pytest.mark.parametrize(
  "arguments",
  [
    [],
    ["--input=x", "--output=y"],
    ["--input=x", "--output=y", BYTE, "--train-tokenizer=300"],
    ["--input=x", "--output=y", "--train-tokenizer=256"],
    ["--input=x", "--output=y", BYTE, "--heldout-fraction=1.5"],
    ["--input=x", "--output=y", BYTE, "--heldout-fraction=nan"],
    ["--input=x", "--output=y", BYTE, "--max-bad-lines=-1"],
    ["--input=x", "--output=y", BYTE, "--workers=0"],
    ["--input=x", "--output=y", BYTE, "--shard=3"],
  ],
)
def test_wrong_arguments_are_refused(
  arguments: list[str], capsys: pytest.CaptureFixture[str]
):
  with pytest.raises(SystemExit) as caught:
    prepare.main(arguments)
  assert caught.value.code == 2
  assert "error: " in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
  with pytest.raises(SystemExit) as caught:
    prepare.main(["--help"])
  assert caught.value.code == 0
  text = capsys.readouterr().out
  assert "--max-bad-lines" in text
  assert all(len(line) <= 80 for line in text.splitlines())


def test_a_tokenizer_that_is_not_there_is_refused_before_any_work(
  corpus: Path, tmp_path: Path
):
  with pytest.raises(UserError, match="There is no tokenizer at"):
    run(f"--input={corpus}", f"--output={tmp_path}/a/b", "--tokenizer=none")
  assert not (tmp_path / "a").exists()


def test_a_user_error_is_one_line_and_status_2(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
  arguments = [f"--input={tmp_path}/x", f"--output={tmp_path}/y", BYTE]
  assert exit_code(lambda: prepare.main(arguments)) == 2
  error = capsys.readouterr().err
  assert error == f"error: There is no file or folder {tmp_path}/x.\n"


def test_preparing_needs_no_accelerator_library():
  """Workers start in a fraction of the second that importing jax takes."""
  script = "import sys, xlstm_jax.prepare.__main__; print('jax' in sys.modules)"
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert result.stdout == "False\n"


def test_batches_read_what_was_prepared(
  corpus: Path, texts: list[str], tmp_path: Path
):
  from xlstm_jax.data.pipeline import DataConfig, batches

  run_default(corpus, tmp_path / "out")
  cfg = DataConfig(paths=(str(tmp_path / "out"),), context=64, shuffle=False)
  split = shards.open_split(tmp_path / "out", "train")
  rows = batches(cfg, batch_size=1, position=0)
  joined = np.concatenate(
    [next(rows)["targets"][0] for _ in range(split.window_count(64))]
  )
  stream = joined[: split.tokens]
  found = bytes(int(t) for t in stream if t != 256).decode()
  assert found == "".join(
    t for t, _ in read_documents(tmp_path / "out", "train")
  )
