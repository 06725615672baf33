"""Measures how fast text becomes token shards, and shards become batches.

    python scripts/bench_data.py --json=bench_data.json

Prints the median and the range of several runs: MB/s of UTF-8 text through the
`prepare` command with the byte tokenizer (from JSON lines to the final sync,
starting its processes included), and tokens/s out of the input pipeline.
The text is generated: Zipf-distributed words in paragraphs, log-normal document
lengths with a mean of 5 kB, a tenth of the documents not in English letters.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xlstm_jax import paths
from xlstm_jax.data import pipeline

_SOURCES = ("RedPajamaC4", "RedPajamaGithub", "RedPajamaWikipedia")
# Context, rows per batch, datasets mixed.
_PIPELINES = ((256, 32, 1), (512, 16, 1), (2048, 8, 1), (2048, 8, 2))


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description="Benchmarks prepare and the input pipeline."
  )
  parser.add_argument("--megabytes", type=int, default=256, help="text size")
  parser.add_argument("--runs", type=int, default=5)
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  parser.add_argument("--threads", type=int, default=2, help="reading threads")
  parser.add_argument(
    "--json",
    type=paths.argument(paths.new_file),
    metavar="FILE",
    help="file for the results",
  )
  options = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as directory:
    results = measure(Path(directory), options)
  print_table(results)
  if options.json:
    machine = {"cores": os.cpu_count(), "cpu": cpu_name()}
    value = {"machine": machine, "results": results}
    Path(options.json).write_text(json.dumps(value, indent=1) + "\n")
  return 0


def measure(
  directory: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
  corpus = directory / "corpus.jsonl"
  text_bytes = write_corpus(corpus, options.megabytes * 10**6)
  output = directory / "dataset"

  def prepare_once() -> float:
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "xlstm_jax.prepare"]
    command += [f"--input={corpus}", f"--output={output}", "--tokenizer=byte"]
    command += [f"--workers={options.workers}"]
    subprocess.run(command, check=True, capture_output=True)
    return text_bytes / 1e6

  results = [
    timed(
      f"prepare, byte tokenizer, {options.workers} workers",
      "MB/s of text",
      prepare_once,
      options.runs,
    )
  ]
  for context, rows, datasets in _PIPELINES:
    cfg = pipeline.DataConfig(
      paths=(str(output),) * datasets, context=context, threads=options.threads
    )
    results.append(
      timed(
        f"pipeline, context {context}, {rows} rows, {datasets} datasets",
        "M tokens/s",
        reader(cfg, rows),
        options.runs,
      )
    )
  return results


def reader(cfg: pipeline.DataConfig, rows: int) -> Callable[[], float]:
  batches = pipeline.batches(cfg, batch_size=rows, position=0)
  count = 40_000_000 // (rows * cfg.context)

  def read() -> float:
    tokens = 0
    for batch in itertools.islice(batches, count):
      tokens += batch["targets"].size
    return tokens / 1e6

  return read


def timed(
  name: str, unit: str, work: Callable[[], float], runs: int
) -> dict[str, Any]:
  """Amount per second over several runs, after one that is not counted."""
  rates = []
  for run in range(runs + 1):
    start = time.perf_counter()
    amount = work()
    if run:
      rates.append(amount / (time.perf_counter() - start))
  return {
    "name": name,
    "unit": unit,
    "median": statistics.median(rates),
    "least": min(rates),
    "most": max(rates),
    "runs": runs,
  }


def write_corpus(path: Path, size: int) -> int:
  """Writes JSON lines with about `size` bytes of text; returns the bytes."""
  rng = random.Random(0)
  latin = make_words(rng, "abcdefghijklmnopqrstuvwxyz")
  other = make_words(rng, "абвгдежзийклмнопрстуфхцчшщыьэюя")
  pool = [
    make_document(rng, other if i % 10 == 0 else latin) for i in range(1000)
  ]
  written = number = 0
  with path.open("w", encoding="utf-8") as file:
    while written < size:
      # Distinct, as the held-out split is chosen by the text.
      text = f"{number} {pool[number % len(pool)]}"
      source = _SOURCES[number % len(_SOURCES)]
      value = {"text": text, "meta": {"redpajama_set_name": source}}
      file.write(json.dumps(value, ensure_ascii=False) + "\n")
      written += len(text.encode())
      number += 1
  return written


def make_words(rng: random.Random, letters: str) -> list[str]:
  return [
    "".join(rng.choices(letters, k=rng.randint(1, 10))) for _ in range(5000)
  ]


def make_document(rng: random.Random, words: Sequence[str]) -> str:
  weights = [1 / (rank + 2) for rank in range(len(words))]
  count = max(1, round(rng.lognormvariate(6.3, 0.9)))
  chosen = rng.choices(words, weights, k=count)
  for i in range(12, count, 13):
    chosen[i] += rng.choice([".\n\n", ".", ",", '."', ":\n\t", ";"])
  return " ".join(chosen)


def cpu_name() -> str:
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor()


def print_table(results: Sequence[dict[str, Any]]) -> None:
  width = max(len(result["name"]) for result in results)
  print(f"{'':{width}}  median   least    most  unit")
  for one in results:
    print(
      f"{one['name']:{width}}  {one['median']:6.1f}  {one['least']:6.1f}  "
      f"{one['most']:6.1f}  {one['unit']}"
    )


if __name__ == "__main__":
  sys.exit(main())
