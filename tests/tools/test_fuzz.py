"""Damaged files of every kind are read or refused, and a fault is seen."""

import os
import re
import runpy
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from xlstm_jax.data import documents
from xlstm_jax.errors import UserError
from xlstm_jax.interop import tensor_files

SCRIPT = Path(__file__).with_name("fuzz.py")


@pytest.fixture(scope="module")
def script():
  return runpy.run_path(str(SCRIPT))


def command(*options):
  """The rows that the command prints, of a process that has no other work."""
  done = subprocess.run(
    [sys.executable, SCRIPT, *options],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
  row = re.compile(r"^(.+?) +(\d+) parsed +(\d+) refused$", re.MULTILINE)
  rows = row.findall(done.stdout)
  return {name: (int(parsed), int(refused)) for name, parsed, refused in rows}


def test_every_parser_reads_or_refuses_what_is_damaged(script):
  counts = command("--inputs=3000")
  assert counts.keys() == script["TARGETS"].keys()
  # Neither is all refused at the door, nor is nothing damaged.
  assert sum(parsed for parsed, _ in counts.values()) > 300
  assert sum(refused for _, refused in counts.values()) > 1000


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused():
  counts = command("--inputs=20000", "--seed=1")
  assert sum(map(sum, counts.values())) > 19_000


def _recursive(folder):
  return _recursive(folder)


def _long_message(folder):
  raise UserError("a" * 10_000)


def _busy(folder):
  try:
    while True:
      pass
  except (Exception, TimeoutError):  # As a parser may.
    return folder


def _large(folder):
  # Written to, as memory that is not does not count.
  return os.urandom(2**20) * 900


def _fine(folder):
  return folder


def _refusing(folder):
  raise UserError("No.")


@pytest.mark.parametrize(
  ("parse", "outcome"),
  [
    (_fine, "parsed"),
    (_refusing, "refused"),
    (_recursive, "RecursionError"),
    (_long_message, "a message of 10000 characters"),
    (_busy, "longer than 2 s"),
    (_large, "MiB of memory"),
  ],
)
def test_what_goes_wrong_is_found(script, tmp_path, parse, outcome):
  assert outcome in script["attempt"](parse, tmp_path, seconds=2)


def test_an_earlier_peak_hides_nothing(script, tmp_path):
  for _ in range(2):
    assert "MiB" in script["attempt"](_large, tmp_path)
  assert script["attempt"](_fine, tmp_path) == "parsed"


def test_a_hang_that_python_cannot_interrupt_ends_the_process(tmp_path):
  """A sum in C without end, which looks at no signals."""
  program = f"""
import itertools, runpy
attempt = runpy.run_path({str(SCRIPT)!r})["attempt"]
def endless(folder):
  return sum(itertools.repeat(0))
attempt(endless, None, seconds=1, wall_seconds=3)
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 1
  assert "Timeout (0:00:03)!" in done.stderr
  assert "in endless" in done.stderr


# What mutations hardly find.


def read_all(path, limit):
  inputs = documents.find([str(path)]).files
  problems = []
  for piece in documents.read(
    inputs, documents.Place(), piece_bytes=2**20, max_document_bytes=limit
  ):
    problems += documents.parse(piece, max_document_bytes=limit)[1]
  return problems


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_bomb_of_one_line_is_dropped_in_pieces(script, tmp_path, kind):
  """A GiB of text in a few KiB (gzip: a MiB) is never held as a whole."""
  path = tmp_path / f"bomb.jsonl.{kind}"
  if kind == "zst":
    path.write_bytes(zstandard.ZstdCompressor().compress(b"a" * 2**20) * 1024)
  else:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = b"a" * 2**24
    parts = [packer.compress(piece) for _ in range(64)]
    path.write_bytes(b"".join([*parts, packer.flush()]))
  found = []
  limit = 2**22
  outcome = script["attempt"](
    lambda folder: found.extend(read_all(path, limit)), tmp_path
  )
  assert outcome == "parsed"
  assert [p.reason for p in found] == [f"longer than {limit} bytes"]


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 99_000_000])
def test_a_header_larger_than_its_file_is_not_read(tmp_path, length):
  path = tmp_path / "model.safetensors"
  path.write_bytes(struct.pack("<Q", length) + b"{}")
  with pytest.raises(UserError, match="header's length"):
    tensor_files.open_file(path)
