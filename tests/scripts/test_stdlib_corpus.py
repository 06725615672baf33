"""The quickstart's corpus: complete, deterministic, nothing left out unsaid."""

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

from xlstm_jax.data import format as files
from xlstm_jax.prepare import __main__ as prepare

SCRIPT = Path(__file__).parents[2] / "scripts" / "stdlib_corpus.py"
corpus = runpy.run_path(str(SCRIPT))


@pytest.fixture
def library(tmp_path: Path) -> Path:
  root = tmp_path / "lib"
  contents = {
    "abc.py": b"x" * 500,
    "large/__init__.py": b"",
    "large/a.py": b"a" * 5000,
    "large/deep/b.py": "größe".encode(),
    "small/c.py": b"c",
    "small/latin.py": b"# \xe9",
    "site-packages/d.py": b"d",
    "large/__pycache__/e.py": b"e",
    "large/notes.txt": b"f",
  }
  for name, data in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
  return root


def test_every_source_file_is_a_document_or_named(library: Path):
  found, empty, undecodable = corpus["read_files"](library)
  assert [one.path for one in found] == [
    "abc.py",
    "large/a.py",
    "large/deep/b.py",
    "small/c.py",
  ]
  assert empty == ["large/__init__.py"]
  assert undecodable == ["small/latin.py"]


def test_large_packages_are_sources(library: Path):
  found, _, _ = corpus["read_files"](library)
  sources = [source for _, source in corpus["with_sources"](found)]
  assert sources == ["other", "large", "large", "other"]


def test_the_running_python_becomes_a_dataset(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
  path = tmp_path / "corpus.jsonl"
  assert corpus["main"]([f"--output={path}"]) == 0
  assert "not UTF-8" in capsys.readouterr().out
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  first = path.read_bytes()
  corpus["main"]([f"--output={path}"])
  assert path.read_bytes() == first
  sizes: Counter[str] = Counter()
  for line in lines:
    sizes[line["meta"]["redpajama_set_name"]] += len(line["text"].encode())
  total = sum(sizes.values())
  assert total > 5e6
  assert all(n > total / 100 for name, n in sizes.items() if name != "other")
  assert "asyncio" in sizes
  assert not any("site-packages" in line["meta"]["path"] for line in lines)

  arguments = [f"--input={path}", f"--output={tmp_path}/out"]
  arguments += ["--tokenizer=byte", "--workers=1", "--max-bad-lines=0"]
  assert prepare.main(arguments) == 0
  manifest = files.read_manifest(tmp_path / "out")
  counts = manifest.splits["train"].total + manifest.splits["heldout"].total
  assert (counts.documents, counts.bytes) == (len(lines), total)
