"""Feeds damaged files to every parser of bytes from outside.

python tests/tools/fuzz.py --inputs=100000
python tests/tools/fuzz.py --inputs=1000 --only=manifest --seed=7

Every input is a valid file with a few mutations. A parser may succeed or raise
a UserError, within limits of time and memory; anything else is reported with
the files that caused it. What hangs where Python cannot interrupt it ends the
process with its stack; the input is then the newest folder.

Memory is read from /proc, as only Linux tells the peak of one input.
"""

import argparse
import bz2
import contextlib
import dataclasses
import faulthandler
import gzip
import hashlib
import io
import json
import lzma
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import zstandard
from etils import epath

from xlstm_jax import checksums, config, metrics
from xlstm_jax.checkpoints import EVAL_LOSS, CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import documents, journal, shards, tokenizer
from xlstm_jax.data import format as files
from xlstm_jax.errors import UserError
from xlstm_jax.interop import large, paper, tensor_files, tokenizer_files
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.runtime import accounting
from xlstm_jax.train import rollbacks

# Of the processor, and by the clock where it does not even compute.
SECONDS, WALL_SECONDS = 20, 600
MEMORY_BYTES = 700 * 2**20

EXPERIMENT = """\
from xlstm_jax.config import RunConfig, to_config_dict


def get_config():
  return to_config_dict(RunConfig())
"""
_TEXTS = ["the state of", "größe 世界", "x = 1\n", '"quoted" \\ 🙂', "a" * 50]
# The share of inputs that get past a checksum, to what it protects.
_MENDED = 0.7


@dataclasses.dataclass(frozen=True)
class Target:
  """A parser, and the files it reads.

  Attributes:
    write: writes valid files into an empty folder.
    files: those to mutate.
    parse: reads the folder.
    mend: makes the checksums right again; None where there are none.
    weight: how many of the inputs it gets, relative to the others.
  """

  write: Callable[[Path], object]
  files: tuple[str, ...]
  parse: Callable[[Path], object]
  mend: Callable[[Path], object] | None = None
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Finding:
  """An input that was neither parsed nor refused as it should be."""

  target: str
  folder: Path
  what: str


# Mutations.

_NUMBERS = (
  b"0", b"-1", b"1", b"255", b"65536", b"2147483648", b"4294967296",
  b"9223372036854775808", b"1e308", b"1e999", b"-1e999", b"NaN", b"Infinity",
  b"0.5", b"1" + b"0" * 400, b"1" * 5000,
)  # fmt: skip
_WORDS = (
  b"null", b"true", b"[]", b"{}", b'""', b'"../x"', b'"/etc/passwd"', b'".."',
  b'"\\ud800"', b'"\\u0000"', b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe",
  b"\xef\xbb\xbf", b"\0" * 64, b"\n" * 40, b'"' + b"a" * 5000 + b'"',
)  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
  """`data` with one to four changes."""
  changes = (_flip, _cut, _drop, _repeat, _insert, _number, _word, _integer)
  for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
    data = rng.choice(changes)(data, rng)
  return data


def _place(data: bytes, rng: random.Random) -> int:
  # The beginning of a file is what decides most.
  return rng.randrange(min(len(data), rng.choice((16, 256, 2**20))) + 1)


def _flip(data: bytes, rng: random.Random) -> bytes:
  at = _place(data, rng)
  if at == len(data):
    return data
  return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
  return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random) -> bytes:
  at = _place(data, rng)
  return data[:at] + data[at + rng.randrange(1, 32) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
  at = _place(data, rng)
  piece = data[at : at + rng.randrange(1, 64)]
  return data[:at] + piece * rng.choice((2, 3, 100)) + data[at + len(piece) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
  at = _place(data, rng)
  return data[:at] + rng.randbytes(rng.randrange(1, 16)) + data[at:]


def _number(data: bytes, rng: random.Random) -> bytes:
  """Another number in place of one that is written in digits."""
  return _replaced(rb"-?\d+(\.\d+)?", rng.choice(_NUMBERS), data, rng)


def _word(data: bytes, rng: random.Random) -> bytes:
  """Another JSON value in place of one."""
  value = rng.choice(_WORDS + _NUMBERS)
  return _replaced(rb'"[^"]*"|-?\d+|true|false|null', value, data, rng)


def _replaced(
  pattern: bytes, value: bytes, data: bytes, rng: random.Random
) -> bytes:
  found = list(re.finditer(pattern, data[: 2**16]))
  if not found:
    return data[:8] + value + data[8:]
  match = rng.choice(found)
  return data[: match.start()] + value + data[match.end() :]


def _integer(data: bytes, rng: random.Random) -> bytes:
  """Another binary integer, little-endian as all of ours."""
  width = rng.choice((2, 4, 8))
  value = rng.choice((0, 1, 2**31, 2**60, 2**64 - 1, 100_000_001)) % 256**width
  at = min(_place(data, rng), max(len(data) - width, 0)) // width * width
  return data[:at] + value.to_bytes(width, "little") + data[at + width :]


# The parsers.


def _write_lines(path: Path, compress: Callable[[bytes], bytes]) -> None:
  lines = [
    json.dumps({"text": text * 3, "meta": {"redpajama_set_name": f"s{i % 2}"}})
    for i, text in enumerate(_TEXTS * 4)
  ]
  path.write_bytes(compress("\n".join(lines).encode()))


def _lines(name: str, compress: Callable[[bytes], bytes] = bytes) -> Target:
  def parse(folder: Path) -> None:
    limit = 2**16
    inputs = documents.find([str(folder / name)]).files
    for piece in documents.read(
      inputs, documents.Place(), piece_bytes=500, max_document_bytes=limit
    ):
      documents.parse(piece, max_document_bytes=limit)

  return Target(
    lambda folder: _write_lines(folder / name, compress), (name,), parse
  )


def _write_text(folder: Path) -> None:
  (folder / "text").mkdir()
  for i, text in enumerate(_TEXTS * 4):
    (folder / "text" / f"{i}.txt").write_text(text * 3)


def _prepare(folder: Path, *more: str) -> None:
  arguments = [f"--input={folder / 'text'}", f"--output={folder / 'data'}"]
  hidden = io.StringIO()
  with contextlib.redirect_stderr(hidden), contextlib.redirect_stdout(hidden):
    prepare.main([*arguments, "--heldout-fraction=0.3", "--workers=1", *more])


def _write_data(folder: Path) -> None:
  _write_text(folder)
  _prepare(folder, "--tokenizer=byte")


def _write_interrupted(folder: Path) -> None:
  """A preparation that stopped just before its last commit."""
  _write_data(folder)
  (folder / "data" / "manifest.json").unlink()


def _read_data(folder: Path) -> None:
  for name in ("train", "heldout"):
    split = shards.open_split(folder / "data", name, verify="opening")
    count = min(split.window_count(16), 100)
    split.windows(np.arange(count), 16)
    split.window_sources(np.arange(count), 16)
    for number in range(min(split.documents, 100)):
      split.document(number)


def _mend_manifest(folder: Path) -> None:
  """The checksums of blocks, then those of indices, then the hash."""
  path = folder / "data" / files.MANIFEST
  content = _json_or_none(path)
  if not isinstance(content, dict):
    return
  with contextlib.suppress(KeyError, TypeError, OSError, ValueError):
    for split in content["splits"].values():
      for shard in split["shards"]:
        name = path.with_name(Path(shard["name"]).name)
        shard["index_crc32"] = _mend_index(name)
  content.pop("hash", None)
  content["hash"] = _digest(content, separators=(",", ":"))
  _write_json(path, content)


def _mend_index(name: Path) -> int:
  tokens = name.with_suffix(".tokens").read_bytes()
  size = files.BLOCK_BYTES
  blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
  sums = np.array([zlib.crc32(block) for block in blocks], "<u4").tobytes()
  index = name.with_suffix(".index").read_bytes()
  index = index[: -len(sums)] + sums
  name.with_suffix(".index").write_bytes(index)
  return zlib.crc32(index)


def _mend_journal(folder: Path) -> None:
  path = folder / "data" / "prepare.json"
  content = _json_or_none(path)
  if not isinstance(content, dict):
    return
  content.pop("hash", None)
  hashed = {k: v for k, v in content.items() if k != "version"}
  content["hash"] = _digest(hashed)
  _write_json(path, content)


def _json_or_none(path: Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except (ValueError, RecursionError):
    return None


def _digest(content: Any, **options: Any) -> str:
  try:
    text = json.dumps(content, sort_keys=True, **options)
    return hashlib.sha256(text.encode()).hexdigest()
  except (ValueError, RecursionError):
    return ""


def _write_json(path: Path, content: Any) -> None:
  with contextlib.suppress(ValueError, RecursionError):
    path.write_text(json.dumps(content))


def _read_journal(folder: Path) -> None:
  journal.load(folder / "data")
  _prepare(folder, "--tokenizer=byte")


def _write_tokenizer(folder: Path) -> None:
  tokenizer.train(_TEXTS * 4, 280).save(folder)


def _read_tokenizer(folder: Path) -> None:
  tokens = tokenizer.load(folder)
  ids = tokens.encode("the state of größe")
  tokens.decode(ids)
  tokens.encode_documents([b"a", "世界".encode()])
  list(map(tokens.stream(ids[:3]).feed, ids[3:].tolist()))
  ends = {"eos_token_id": tokens.end_of_text}
  tokenizer_files.outside(tokenizer_files.exported(tokens, {}, ends), ends, 280)


def _read_tokenizer_alone(folder: Path) -> None:
  (folder / tokenizer.SPEC_FILE).unlink(missing_ok=True)
  _read_tokenizer(folder)


def _write_tensors(folder: Path, limit: int) -> None:
  tensors = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros((0, 4), np.float16),
    "c": np.array(7.0),
  }
  specs = {
    name: tensor_files.Spec(x.shape, x.dtype) for name, x in tensors.items()
  }
  tensor_files.write_folder(
    folder, specs, tensors.__getitem__, max_shard_bytes=limit
  )


def _read_tensors(folder: Path) -> None:
  for tensor in tensor_files.open_folder(folder).values():
    tensor.map().sum()


def _mend_header(folder: Path) -> None:
  """The header's length, as if all that changed were in the header."""
  path = folder / tensor_files.SINGLE
  whole = (folder.parent / "valid" / path.name).read_bytes()
  data = path.read_bytes()
  length = int.from_bytes(whole[:8], "little") + len(data) - len(whole)
  path.write_bytes(max(length, 0).to_bytes(8, "little") + data[8:])


def _write_hugging_face(folder: Path) -> None:
  content = {
    "embedding_dim": 128, "num_blocks": 2, "num_heads": 4, "vocab_size": 97,
    "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64, "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0, "norm_eps": 1e-6, "use_bias": False,
    "tie_word_embeddings": False, "weight_mode": "single", "eos_token_id": 2,
    "model_type": "xlstm", "add_out_norm": True,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(content))


def _read_hugging_face(folder: Path) -> None:
  content = tensor_files.read_json(folder / "config.json")
  large.model_config(content).kinds.count("slstm")
  large.weight_mode(content)
  large.end_of_text(content)
  tokenizer_files.outside({}, content, 97)


def _write_paper(folder: Path) -> None:
  content = {
    "embedding_dim": 64, "num_blocks": 4, "vocab_size": 50, "slstm_at": [1],
    "context_length": 32, "add_post_blocks_norm": True, "bias": False,
    "dropout": 0.0, "tie_weights": False, "weight_decay_on_embedding": False,
    "mlstm_block": {"mlstm": {
      "num_heads": 4, "conv1d_kernel_size": 4, "qkv_proj_blocksize": 4,
      "proj_factor": 2.0, "round_proj_up_to_multiple_of": 64}},
    "slstm_block": {
      "slstm": {"num_heads": 4, "conv1d_kernel_size": 4, "backend": "vanilla",
                "bias_init": "powerlaw_blockdependent"},
      "feedforward": {"proj_factor": 1.3, "act_fn": "gelu"}},
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(content))


def _write_checksums(folder: Path) -> None:
  (folder / "params").mkdir()
  for i, text in enumerate(_TEXTS):
    (folder / "params" / str(i)).write_text(text)
  checksums.write(epath.Path(folder), ["params"])


def _write_checkpoints(folder: Path) -> None:
  cfg = CheckpointConfig()
  with contextlib.closing(Checkpoints(folder / "checkpoints", cfg)) as saved:
    for step, loss in ((3, 0.5), (6, 0.25)):
      items = {"params": {"a": jnp.arange(8.0)}, "progress": {"step": step}}
      saved.save(step, items, {EVAL_LOSS: loss})


def _read_checkpoints(folder: Path) -> None:
  cfg = CheckpointConfig()
  with contextlib.closing(Checkpoints(folder / "checkpoints", cfg)) as saved:
    step = saved.latest()
    if step is not None:
      saved.restore(step, {"progress": None})


def _write_records(folder: Path) -> None:
  with contextlib.closing(metrics.Log(folder, step=0)) as log:
    for step in range(1, 6):
      log.write(step, {"loss": 1 / step, "seconds_per_step": 0.1})
    log.write(5, {EVAL_LOSS: 0.5, "goodput": math.nan})


def _read_records(folder: Path) -> None:
  metrics.read(folder)
  metrics.trajectory(folder)
  metrics.Log(folder, step=3, without=EVAL_LOSS).close()


def _write_rollbacks(folder: Path) -> None:
  decided = [
    rollbacks.Rollback(
      found=found, reason="a spike", to=4, first=first, stop=first + 12
    )
    for found, first in ((7, 16), (19, 48))
  ]
  rollbacks.commit(folder, decided)


def _read_rollbacks(folder: Path) -> None:
  rollbacks.following(rollbacks.read(folder), 5, batch_size=4)


def _write_goodput(folder: Path) -> None:
  goodput = accounting.Goodput(folder, metrics.Clock(accounting.START))
  for step in (0, 4, 8):
    goodput.write(step)


def _read_goodput(folder: Path) -> None:
  goodput = accounting.Goodput(folder, metrics.Clock(accounting.START))
  goodput.back_to(4)
  goodput.write(6)
  goodput.record()
  goodput.line()


def _write_override(folder: Path) -> None:
  (folder / "experiment.py").write_text(EXPERIMENT)
  values = {
    "optim.peak_lr": "1e-3", "steps": "10", "data.paths": "('a', 'b')",
    "eval_every": "none", "model.kinds": "mlstm", "checkpoint.keep_every": "5",
    "data.weights": "1.5,2", "compute.dtype": "bfloat16", "profile": "1,2",
    "data.shuffle": "true", "init_from": "x",
  }  # fmt: skip
  rng = random.Random(0)
  chosen = rng.sample(sorted(values.items()), 4)
  lines = [f"--config.{key}={value}" for key, value in chosen]
  (folder / "overrides").write_text("\n".join(lines))


def _read_overrides(folder: Path) -> None:
  data = (folder / "overrides").read_bytes()
  # As the system hands over bytes that are no text, and never a zero.
  text = data.replace(b"\0", b"").decode(errors="surrogateescape")
  config.from_experiment(str(folder / "experiment.py"), text.split("\n"))


TARGETS = {
  "overrides": Target(_write_override, ("overrides",), _read_overrides),
  "run config": Target(
    lambda folder: config.save(folder, RunConfig()),
    (config.CONFIG_FILE,),
    lambda folder: config.load(folder).model.kinds,
  ),
  "lines": _lines("a.jsonl"),
  "lines in gzip": _lines(
    "a.jsonl.gz", lambda data: gzip.compress(data, mtime=0)
  ),
  "lines in zstd": _lines(
    "a.jsonl.zst", lambda data: zstandard.ZstdCompressor().compress(data)
  ),
  "lines in xz": _lines("a.jsonl.xz", lzma.compress),
  "lines in bzip2": _lines("a.jsonl.bz2", bz2.compress),
  "lines without a name": _lines("a"),
  "manifest": Target(
    _write_data, ("data/manifest.json",), _read_data, _mend_manifest
  ),
  "shards": Target(
    _write_data,
    ("data/train-00000.tokens", "data/train-00000.index"),
    _read_data,
    _mend_manifest,
  ),
  "journal": Target(
    _write_interrupted, ("data/prepare.json",), _read_journal, _mend_journal,
    weight=0.3,
  ),
  "saved tokenizer": Target(
    _write_tokenizer,
    (tokenizer.SPEC_FILE, tokenizer.HUGGING_FACE_FILE),
    _read_tokenizer,
    weight=0.5,
  ),
  "tokenizer": Target(
    _write_tokenizer,
    (tokenizer.HUGGING_FACE_FILE,),
    _read_tokenizer_alone,
    weight=0.5,
  ),
  "safetensors": Target(
    lambda folder: _write_tensors(folder, 10**9),
    (tensor_files.SINGLE,),
    _read_tensors,
    _mend_header,
  ),
  "safetensors index": Target(
    lambda folder: _write_tensors(folder, 10),
    (tensor_files.INDEX,),
    _read_tensors,
  ),
  "Hugging Face config": Target(
    _write_hugging_face, ("config.json",), _read_hugging_face
  ),
  "paper config": Target(
    _write_paper,
    ("config.json",),
    lambda folder: paper.model_config(
      tensor_files.read_json(folder / "config.json")
    ).kinds,
  ),
  "checksums": Target(
    _write_checksums,
    (checksums.FILE,),
    lambda folder: checksums.problem(epath.Path(folder)),
  ),
  "checkpoint": Target(
    _write_checkpoints,
    (f"checkpoints/6/{checksums.FILE}",),
    _read_checkpoints,
    weight=0.1,
  ),
  "records": Target(
    _write_records, ("metrics.jsonl",), _read_records, weight=0.5
  ),
  "rollbacks": Target(_write_rollbacks, (rollbacks.FILE,), _read_rollbacks),
  "goodput": Target(_write_goodput, (accounting.FILE,), _read_goodput),
}  # fmt: skip


# The harness.


def fuzz(
  folder: Path, *, inputs: int, seed: int, only: str | None = None
) -> tuple[dict[str, tuple[int, int]], list[Finding]]:
  """Runs the targets; returns (parsed, refused) of each, and the findings.

  The files of a finding stay in a folder of their own under `folder`.
  """
  chosen = {name: t for name, t in TARGETS.items() if only in (None, name)}
  total = sum(target.weight for target in chosen.values())
  counts, findings = {}, []
  for name, target in chosen.items():
    rng = random.Random(f"{seed} {name}")
    parsed = refused = 0
    home = folder / name.replace(" ", "_")
    valid = home / "valid"
    valid.mkdir(parents=True)
    target.write(valid)
    target.parse(shutil.copytree(valid, home / "whole"))
    for number in range(max(1, round(inputs * target.weight / total))):
      broken = home / str(number)
      shutil.copytree(valid, broken)
      for file in rng.sample(target.files, rng.randint(1, len(target.files))):
        path = broken / file
        path.write_bytes(mutated(path.read_bytes(), rng))
      if target.mend and rng.random() < _MENDED:
        target.mend(broken)
      outcome = attempt(target.parse, broken)
      parsed += outcome == "parsed"
      refused += outcome == "refused"
      if outcome in ("parsed", "refused"):
        shutil.rmtree(broken)
      else:
        findings.append(Finding(name, broken, outcome))
    counts[name] = parsed, refused
  return counts, findings


class Late(BaseException):
  """An input took too long; no parser takes it for an error of a file."""


def attempt(
  parse: Callable[[Path], object],
  folder: Path,
  *,
  seconds: float = SECONDS,
  wall_seconds: float = WALL_SECONDS,
) -> str:
  """What becomes of a folder: "parsed", "refused", or what went wrong."""
  # From here on the peak is this input's.
  Path("/proc/self/clear_refs").write_text("5")
  before = _memory("VmRSS")
  try:
    # Nothing here has to survive the machine, and a disk is slow.
    with _time_limits(seconds, wall_seconds), mock.patch("os.fsync"):
      parse(folder)
    outcome = "parsed"
  except UserError as error:
    outcome = "refused"
    text = str(error)
    if not text or len(text) > 5000:
      outcome = f"a message of {len(text)} characters"
  except BaseException as error:  # A parser may raise anything: that is why.
    if isinstance(error, KeyboardInterrupt):
      raise
    outcome = traceback.format_exc()
  grown = _memory("VmHWM") - before
  if grown > MEMORY_BYTES:
    return f"{grown // 2**20} MiB of memory"
  return outcome


@contextlib.contextmanager
def _time_limits(seconds: float, wall_seconds: float) -> Iterator[None]:
  """Raises `Late` within, or ends the process where nothing can be raised."""

  def late(*_: Any) -> None:
    raise Late(f"longer than {seconds} s")

  before = signal.signal(signal.SIGPROF, late)
  faulthandler.dump_traceback_later(
    wall_seconds, exit=True, file=sys.__stderr__ or 2
  )
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGPROF, before)


def _memory(name: str) -> int:
  """A field of this process's status, in bytes."""
  status = Path("/proc/self/status").read_text()
  kib = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
  assert kib
  return int(kib[1]) * 1024


def main() -> int:
  """Runs the command; the exit status is 1 where something was found."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--inputs", type=int, default=10_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", choices=sorted(TARGETS))
  options = parser.parse_args()
  faulthandler.enable()
  folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
  counts, findings = fuzz(
    folder, inputs=options.inputs, seed=options.seed, only=options.only
  )
  for name, (parsed, refused) in counts.items():
    print(f"{name:20} {parsed:7} parsed {refused:7} refused")
  for finding in findings:
    print(f"\n{finding.target}: {finding.folder}\n{finding.what}")
  print(f"{len(findings)} findings")
  if not findings:
    shutil.rmtree(folder)
  return bool(findings)


if __name__ == "__main__":
  sys.exit(main())
