"""Writes the standard library's source files as JSON lines.

Every machine with Python has this corpus.

    python scripts/stdlib_corpus.py --output=corpus.jsonl

Each file is a document, without `site-packages`, in the form of SlimPajama:
{"text": ..., "meta": {"redpajama_set_name": SOURCE, "path": ...}}. A top-level
package with over 1 % of the bytes is a source, all others are "other".
"""

import argparse
import collections
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xlstm_jax import paths

_EXCLUDED = ("site-packages", "dist-packages", "__pycache__")
_OWN_SOURCE = 0.01


class SourceFile(NamedTuple):
  path: str
  text: str
  size: int

  @property
  def package(self) -> str:
    """The top-level package, "" for a module outside of all."""
    first, separator, _ = self.path.partition("/")
    return first if separator else ""


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description="Writes the running Python's standard library as JSON lines."
  )
  parser.add_argument(
    "--output",
    type=paths.argument(paths.new_file),
    required=True,
    metavar="FILE.jsonl",
  )
  output = Path(parser.parse_args(arguments).output)
  root = Path(sysconfig.get_path("stdlib"))
  found, empty, undecodable = read_files(root)
  data = "".join(map(as_line, with_sources(found))).encode()
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_name(f".{output.name}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, output)
  print(
    f"{output}: {len(found)} files, {sum(f.size for f in found):,} bytes from "
    f"{root}; left out {len(empty)} empty files and {len(undecodable)} that "
    f"are not UTF-8{': ' if undecodable else ''}{', '.join(undecodable)}"
  )
  return 0


def read_files(root: Path) -> tuple[list[SourceFile], list[str], list[str]]:
  """The .py files below `root`, and the paths of empty and undecodable ones."""
  found, empty, undecodable = [], [], []
  for path in sorted(root.rglob("*.py")):
    relative = path.relative_to(root)
    if set(relative.parts) & set(_EXCLUDED):
      continue
    data = path.read_bytes()
    try:
      text = data.decode()
    except UnicodeDecodeError:
      undecodable.append(relative.as_posix())
      continue
    if text:
      found.append(SourceFile(relative.as_posix(), text, len(data)))
    else:
      empty.append(relative.as_posix())
  return found, empty, undecodable


def with_sources(found: Sequence[SourceFile]) -> list[tuple[SourceFile, str]]:
  """Every file with its source: its package if that is large, else other."""
  sizes: collections.Counter[str] = collections.Counter()
  for one in found:
    sizes[one.package] += one.size
  del sizes[""]
  total = sum(one.size for one in found)
  large = {name for name in sizes if sizes[name] > _OWN_SOURCE * total}
  return [
    (one, one.package if one.package in large else "other") for one in found
  ]


def as_line(item: tuple[SourceFile, str]) -> str:
  one, source = item
  meta = {"redpajama_set_name": source, "path": one.path}
  value = {"text": one.text, "meta": meta}
  return json.dumps(value, ensure_ascii=False) + "\n"


if __name__ == "__main__":
  sys.exit(main())
