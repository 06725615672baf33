"""Evaluation against a forward pass over every piece of text by itself."""

import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from data.small_datasets import write_dataset
from workdirs import write_run

from xlstm_jax import ngrams, sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.data.shards import open_split
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.evaluate import __main__ as evaluate
from xlstm_jax.evaluate import batches as batching
from xlstm_jax.evaluate import perplexity
from xlstm_jax.evaluate.perplexity import evaluate_split
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.sharding import MeshConfig, make_mesh

HOST = Path(__file__).with_name("evaluating_host.py")
E = 256
SOURCES = ("prose", "code")
UNITS = ("perplexity", "bits/byte")
# Empty, longer than a window, ending where a window ends, not ASCII.
DOCUMENTS = [
  (b"alpha", 0),
  (b"", 1),
  (b"x = [1, 2, 3]\n" * 5, 1),
  ("naïve café, 日本語".encode(), 0),
  (b"def f(x):\n  return x\n", 1),
  (b"z", 0),
  (b"once upon a time there was a text " * 3, 0),
]
# With dropout, which is off unless a key is given: the reference gives none.
MODEL = ModelConfig(
  vocab_size=257,
  dropout=0.5,
  embedding_dropout=True,
  width=16,
  num_blocks=2,
  slstm_at=(1,),
  mlstm=MLSTMConfig(num_heads=2, round_to=8),
  slstm=SLSTMConfig(num_heads=2),
)
DEFINITION = Definition(MODEL, Compute(dtype="float32"))
CONTEXT = 16
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def params():
  """Parameters whose outputs depend on the past and differ widely."""
  drawn = DEFINITION.init(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(1), (257, 16))
  drawn["head"]["weight"] = noise
  return drawn


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data") / "dataset"
  documents = [(b"to fit n-grams on", 0), (b"fit = ngrams", 1)]
  # A shard of 64 entries holds two or three of the documents.
  return write_dataset(
    folder, documents, heldout=DOCUMENTS, sources=SOURCES, shard_entries=64
  )


@pytest.fixture(scope="module")
def split(dataset):
  return open_split(dataset, "heldout")


def score(split, **settings):
  defaults = {"context": CONTEXT, "batch_size": 4, "mesh": ONE_DEVICE}
  return evaluate_split(DEFINITION, params(), split, **{**defaults, **settings})


def pieces(context, documents=DOCUMENTS):
  """(inputs, targets, source) of what is read from an empty state."""
  position, found = 0, []
  for text, source in documents:
    inputs, targets = [E, *text], [*text, E]
    while inputs:
      room = len(inputs)
      if context != "document":
        room = min(room, context - position % context)
      found.append((inputs[:room], targets[:room], source))
      inputs, targets = inputs[room:], targets[room:]
      position += room
  return found


@functools.cache
def piece_nats(context):
  """The loss of every piece: each goes through the model by itself."""
  lm = DEFINITION.bind(params())

  def losses(inputs, targets):
    logits = lm.logits(lm(inputs[None])[0])[0]
    return -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]

  losses = jit(losses)
  nats = []
  for inputs, targets, _ in pieces(context):
    fill = [0] * (128 - len(inputs))
    found = losses(jnp.array(inputs + fill), jnp.array(targets + fill))
    nats.append(np.asarray(found, np.float64)[: len(inputs)].sum())
  return nats


def expected_nats(context):
  nats = np.zeros(len(SOURCES))
  for (_, _, source), loss in zip(
    pieces(context), piece_nats(context), strict=True
  ):
    nats[source] += loss
  return nats


def check(result, context):
  for at, name in enumerate(SOURCES):
    texts = [text for text, source in DOCUMENTS if source == at]
    found = result.sources[name]
    assert found.tokens == sum(len(text) + 1 for text in texts)
    assert found.bytes == sum(map(len, texts))
    assert found.nats == pytest.approx(expected_nats(context)[at], rel=2e-6)
  total = result.total
  assert total.tokens == sum(len(text) + 1 for text, _ in DOCUMENTS)
  assert total.nats == sum(s.nats for s in result.sources.values())


@pytest.mark.parametrize("context", [CONTEXT, "document"])
def test_every_target_counts_once_from_the_right_past(split, context):
  check(score(split, context=context, piece=CONTEXT), context)


def test_the_contexts_differ(split):
  """Otherwise the test above could not tell them apart."""
  window, document = expected_nats(CONTEXT), expected_nats("document")
  assert (abs(window / document - 1) > 1e-3).all()


@pytest.mark.parametrize("context", [CONTEXT, "document"])
def test_the_shape_of_the_batches_changes_nothing(split, context):
  check(score(split, context=context, batch_size=7, piece=33), context)


def test_the_mesh_changes_nothing(split):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  where = sharding.shardings(mesh, DEFINITION.axes(), params())
  result = evaluate_split(
    DEFINITION,
    jax.device_put(params(), where),
    split,
    context="document",
    batch_size=4,
    mesh=mesh,
    piece=CONTEXT,
  )
  check(result, "document")


@pytest.fixture
def fed(monkeypatch):
  """Shapes of the batches that the model reads."""
  shapes, put = [], perplexity._put

  def counting(batch, mesh):
    shapes.append(batch["inputs"].shape)
    return put(batch, mesh)

  monkeypatch.setattr(perplexity, "_put", counting)
  return shapes


def computed(shapes):
  return sum(rows * length for rows, length in shapes)


@pytest.mark.parametrize("context", [10**3, 10**8, 10**30])
def test_a_window_is_no_longer_than_the_split(split, fed, context):
  check(score(split, context=context), "document")
  assert computed(fed) < split.tokens + 64


@pytest.mark.parametrize("batch_size", [1, 3])
def test_long_windows_are_scored_in_pieces(split, fed, batch_size):
  check(score(split, context=72, batch_size=batch_size, piece=16), 72)
  assert len(fed) > 1
  assert {rows * length for rows, length in fed} <= {batch_size * 16}


def test_few_documents_fill_few_lanes(split, fed):
  check(score(split, context="document", batch_size=64, piece=16), "document")
  # Each of two lanes is as long as the longest document, and rounded up.
  assert computed(fed) <= 4 / 3 * split.tokens + 2 * 64


def test_long_windows_have_their_limit_too(split):
  """Two of four windows: the first and the third."""
  nats = position = 0
  for (inputs, _, _), loss in zip(pieces(72), piece_nats(72), strict=True):
    nats += loss * (position // 72 in (0, 2))
    position += len(inputs)
  found = score(split, context=72, max_tokens=150, piece=16, batch_size=3)
  assert found.total.tokens == 144
  assert found.total.nats == pytest.approx(nats, rel=2e-6)


def test_no_row_of_windows_is_empty_for_long(split, fed):
  windows = split.window_count(CONTEXT)
  check(score(split, batch_size=windows - 1), CONTEXT)
  assert fed == [(-(-windows // 2), CONTEXT)] * 2


# Sizes of documents.
SIZES = {
  "one token": [0],
  "equal": [30] * 50,
  "one long": [3, 20, 3000, *range(40)],
  "long ones": [700, 5, 5, 800, 900, 1, 1, 600],
  "many": [(37 * n) % 100 for n in range(300)],
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("context", ["document", 640])
def test_lanes_hold_every_span_once_and_little_else(
  tmp_path, name, shards, context
):
  rng = np.random.default_rng(0)
  texts = [
    rng.integers(0, 256, size, np.uint8).tobytes() for size in SIZES[name]
  ]
  documents = [(text, at % 2) for at, text in enumerate(texts)]
  split = open_split(
    write_dataset(tmp_path / "data", documents, shard_entries=512), "train"
  )
  mesh = make_mesh(MeshConfig(data=shards), jax.devices()[:shards])
  stops = np.cumsum(split.document_lengths().astype(np.int64) + 1)
  sources = split.document_sources()
  if context != "document":
    sources = None
    stops = np.append(np.arange(context, split.tokens, context), split.tokens)
  sizes = np.diff(stops, prepend=0)
  batches = list(
    batching.lanes(split, stops - sizes, stops, sources, 16, 64, mesh)
  )
  found = []
  for row in range(len(batches[0]["inputs"])):
    lane = {
      key: np.concatenate([batch[key][row] for batch in batches])
      for key in batches[0]
    }
    for segment in range(1, lane["segments"].max(initial=0) + 1):
      of = lane["segments"] == segment
      found.append([lane[key][of].tolist() for key in KEYS])
  expected = [
    [list(inputs), list(targets), [source] * len(inputs)]
    for inputs, targets, source in pieces(context, documents)
  ]
  assert sorted(found) == sorted(expected)
  shapes = [batch["inputs"].shape for batch in batches]
  assert all(rows * length <= 16 * 64 for rows, length in shapes)
  most = 4 / 3 * split.tokens
  if shards > 1:
    # Every share has a lane, whatever it then waits for.
    most = max(most, split.tokens + shards * sizes.max())
  assert computed(shapes) <= most + 16 * 64


KEYS = ("inputs", "targets", "sources")


@pytest.mark.slow
def test_two_processes_agree_with_one(dataset, split):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  hosts = [
    subprocess.Popen(
      [sys.executable, HOST, str(rank), str(port), str(dataset)],
      env={
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
      },
      stdout=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  outputs = [host.communicate(timeout=600)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0]
  fresh = DEFINITION.init(jax.random.key(0))
  expected = [
    evaluate_split(
      DEFINITION,
      fresh,
      split,
      context=context,
      batch_size=4,
      mesh=ONE_DEVICE,
      piece=CONTEXT,
    ).total.nats
    for context in (CONTEXT, "document")
  ]
  for output in outputs:
    lines = [line for line in output.splitlines() if line.startswith("nats ")]
    found = [float(line.split()[1]) for line in lines]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(split):
  flat = {**params(), "head": {"weight": jnp.zeros((257, 16))}}
  total = evaluate_split(
    DEFINITION, flat, split, context=CONTEXT, batch_size=4, mesh=ONE_DEVICE
  ).total
  size = sum(len(text) for text, _ in DOCUMENTS)
  targets = size + len(DOCUMENTS)
  assert total.loss == pytest.approx(math.log(257), rel=1e-6)
  assert total.perplexity == pytest.approx(257, rel=1e-5)
  bits = targets * math.log2(257) / size
  assert total.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_a_folder_stands_for_its_held_out_split(dataset, split):
  assert score(dataset) == score(split)


def test_a_limit_takes_the_same_windows_from_everywhere(split):
  count = split.window_count(CONTEXT)
  taken = {n * count // 5 for n in range(5)}
  nats = position = 0
  for (inputs, _, _), loss in zip(
    pieces(CONTEXT), piece_nats(CONTEXT), strict=True
  ):
    nats += loss * (position // CONTEXT in taken)
    position += len(inputs)
  result = score(split, max_tokens=5 * CONTEXT + 3)
  assert result.total.tokens == 5 * CONTEXT
  assert result.total.nats == pytest.approx(nats, rel=2e-6)
  assert result.total.bits_per_byte is None
  assert score(split, max_tokens=5 * CONTEXT) == result


def test_a_limit_beyond_the_split_scores_all_of_it(split):
  assert score(split, max_tokens=10**6).total.nats == score(split).total.nats


def test_a_second_evaluation_compiles_nothing(split):
  score(split)
  score(split, max_tokens=50)
  before = perplexity._losses._cache_size()
  score(split, max_tokens=50)
  score(split)
  assert perplexity._losses._cache_size() == before


def test_what_the_mesh_cannot_divide_is_refused(split):
  with pytest.raises(UserError, match="3 rows"):
    score(split, batch_size=3, mesh=make_mesh(MeshConfig(data=8)))
  mesh = make_mesh(MeshConfig(data=1, sequence=8))
  with pytest.raises(UserError, match="12 tokens"):
    score(split, context=12, mesh=mesh)


def test_tokens_that_the_model_lacks_are_refused(split):
  small = Definition(ModelConfig(vocab_size=256), DEFINITION.compute)
  with pytest.raises(UserError, match="257 token ids, the model only 256"):
    evaluate_split(small, {}, split, context=16, batch_size=4, mesh=ONE_DEVICE)


def test_what_json_lacks_is_null(split):
  worst = perplexity.Result({"prose": perplexity.Score(math.nan, 3, 2)})
  entry = evaluate._as_json(split, worst, {})["sources"]["prose"]
  assert entry["nats"] is entry["perplexity"] is entry["bits_per_byte"] is None


def test_whole_documents_cannot_be_limited(split):
  with pytest.raises(UserError, match="'document'"):
    score(split, context="document", max_tokens=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
  """A workdir whose best step is not its latest."""
  workdir = tmp_path_factory.mktemp("run")
  cfg = RunConfig(
    model=MODEL,
    compute=DEFINITION.compute,
    data=DataConfig(paths=(str(dataset),), context=CONTEXT),
    compilation_cache=None,
  )
  return workdir, write_run(workdir, cfg, steps={10: 1.0, 20: 2.0})


def command(*arguments):
  small = [*map(str, arguments), "--batch-size=8"]
  return exit_code(lambda: evaluate.main(small))


def test_the_command_prints_and_writes_what_was_measured(
  run, dataset, split, tmp_path, capsys
):
  workdir, saved = run
  file = tmp_path / "new" / "scores.json"
  status = command(f"--workdir={workdir}", "--ngrams", f"--json={file}")
  assert status == 0
  report = json.loads(file.read_text())
  assert (report["step"], report["context"]) == (20, CONTEXT)
  entry = report["data"][str(dataset)]
  result = evaluate_split(
    DEFINITION,
    saved[20],
    split,
    context=CONTEXT,
    batch_size=4,
    mesh=ONE_DEVICE,
  )
  lines = capsys.readouterr().out.splitlines()
  for name, expected in [*result.sources.items(), ("total", result.total)]:
    found = entry["total"] if name == "total" else entry["sources"][name]
    assert found["nats"] == pytest.approx(expected.nats, rel=2e-6)
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    perplexity = math.exp(expected.nats / expected.tokens)
    assert found["perplexity"] == pytest.approx(perplexity, rel=2e-6)
    cells = line.split()
    assert cells[1:] == [
      f"{expected.bytes:,}",
      f"{expected.tokens:,}",
      f"{found['perplexity']:.4f}",
      f"{found['bits_per_byte']:.4f}",
      f"{found['perplexity_of']['unigram']:.4f}",
      f"{found['bits_per_byte_of']['unigram']:.4f}",
      f"{found['perplexity_of']['bigram']:.4f}",
      f"{found['bits_per_byte_of']['bigram']:.4f}",
    ]
  names, units = lines[lines.index(f"heldout of {dataset}") + 1 :][:2]
  assert headings(names, units) == [
    *("source", "bytes", "targets", "perplexity", "bits/byte"),
    *("unigram perplexity", "unigram bits/byte"),
    *("bigram perplexity", "bigram bits/byte"),
  ]
  assert max(map(len, lines)) <= 100
  assert entry["total"]["documents"] == len(DOCUMENTS)


def headings(names, units):
  """What stands in both lines of a column, which ends where its unit does."""
  ends = [match.end() for match in re.finditer(r"\S+", units)]
  return [
    f"{names[start:end].strip()} {units[start:end].strip()}".strip()
    for start, end in zip([0, *ends], ends, strict=False)
  ]


def test_without_baselines_the_table_has_one_line_of_heads(split):
  result = score(split)
  head, first, *_ = evaluate.table(result, {}).splitlines()
  assert head.split() == ["source", "bytes", "targets", *UNITS]
  assert first.split()[0] in SOURCES


def test_the_baselines_score_the_same_targets(run, dataset, tmp_path):
  file = tmp_path / "scores.json"
  command(f"--workdir={run[0]}", "--ngrams", f"--json={file}")
  counted = ngrams.fit(
    [tokens for _, tokens in open_split(dataset, "train").chunks()], 257
  )
  entry = json.loads(file.read_text())["data"][str(dataset)]
  for at, name in enumerate(SOURCES):
    nats = size = 0
    for text, source in DOCUMENTS:
      if source == at:
        pairs = zip([E, *text], [*text, E], strict=True)
        nats -= sum(counted.bigram_ZZ[a, b] for a, b in pairs)
        size += len(text)
    found = entry["sources"][name]
    bits = found["bits_per_byte_of"]["bigram"]
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-12)
    perplexity = math.exp(nats / found["targets"])
    assert found["perplexity_of"]["bigram"] == pytest.approx(perplexity)


def test_the_best_step_is_the_one_of_least_loss(run, tmp_path):
  scores = {}
  for step in ("best", "10", "20"):
    file = tmp_path / f"{step}.json"
    command(f"--workdir={run[0]}", f"--step={step}", f"--json={file}")
    scores[step] = json.loads(file.read_text())
  assert scores["best"] == scores["10"]
  assert scores["10"]["data"] != scores["20"]["data"]


def test_every_dataset_has_its_table(run, dataset, tmp_path, capsys):
  other = write_dataset(
    tmp_path / "other",
    [(b"train", 0)],
    heldout=[(b"held out", 0)],
    sources=("letters",),
  )
  command(f"--workdir={run[0]}", f"--data={dataset}", f"--data={other}")
  out = capsys.readouterr().out
  assert f"heldout of {dataset}\n" in out
  assert f"heldout of {other}\n" in out
  assert "\nletters " in out


def refused(capsys, *arguments):
  """The one line that the command prints."""
  assert command(*arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path, capsys):
  assert "no config.json" in refused(capsys, f"--workdir={tmp_path}")
  config_file = (run[0] / "config.json").read_text()
  (tmp_path / "config.json").write_text(config_file)
  assert "no checkpoint yet" in refused(capsys, f"--workdir={tmp_path}")


def test_a_run_without_data_needs_some(tmp_path, dataset, capsys):
  cfg = RunConfig(model=MODEL, compute=DEFINITION.compute)
  write_run(tmp_path, cfg, steps={1: 0.0})
  arguments = (f"--workdir={tmp_path}", "--context=16")
  assert "give --data" in refused(capsys, *arguments)
  line = refused(capsys, *arguments, f"--data={dataset}", "--ngrams")
  assert "no training data" in line


def test_a_step_that_does_not_exist_is_refused(run, capsys):
  assert "step 15" in refused(capsys, f"--workdir={run[0]}", "--step=15")
  assert "'first'" in refused(capsys, f"--workdir={run[0]}", "--step=first")


def test_data_of_another_tokenizer_is_refused(run, dataset, tmp_path, capsys):
  workdir = tmp_path / "run"
  cfg = RunConfig(
    model=MODEL,
    compute=DEFINITION.compute,
    data=DataConfig(paths=(str(dataset),)),
  )
  write_run(workdir, cfg, steps={1: 0.0}, tokenizer_hash="f" * 64)
  line = refused(capsys, f"--workdir={workdir}")
  assert "another tokenizer" in line
  assert "ffffffffffff" in line


def test_an_empty_held_out_split_is_refused(run, tmp_path, capsys):
  empty = write_dataset(tmp_path / "empty", [(b"text", 0)])
  line = refused(capsys, f"--workdir={run[0]}", f"--data={empty}")
  assert "heldout" in line
  assert str(empty) in line


def test_a_split_of_one_token_has_its_score(run, fed, tmp_path, capsys):
  """The end of an empty document, which has no bytes."""
  data = write_dataset(tmp_path / "data", [(b"text", 0)], heldout=[(b"", 0)])
  file = tmp_path / "scores.json"
  workdir, saved = run
  arguments = (f"--data={data}", "--context=2048", f"--json={file}")
  assert command(f"--workdir={workdir}", *arguments) == 0
  assert computed(fed) <= 64 * jax.device_count()
  lm = DEFINITION.bind(saved[20])
  logits = lm.logits(lm(jnp.array([[E]]))[0])[0, 0]
  nats = -jax.nn.log_softmax(logits)[E]
  total = json.loads(file.read_text())["data"][str(data)]["total"]
  assert total["nats"] == pytest.approx(float(nats), rel=2e-6)
  assert (total["targets"], total["bytes"]) == (1, 0)
  assert total["bits_per_byte"] is None
  assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"


def test_memory_that_runs_out_is_told(run, monkeypatch, capsys):
  def on_the_device(*_, **__):
    return jax.block_until_ready(jit(lambda: jnp.ones(2**60, jnp.int8))())

  def on_the_host(*_, **__):
    return np.ones(2**60, np.int8)

  for failure in (on_the_device, on_the_host):
    monkeypatch.setattr(perplexity, "_losses", failure)
    line = refused(capsys, f"--workdir={run[0]}", "--context=document")
    assert "Memory ran out with --context=document" in line
    assert "--batch-size=8; a smaller --batch-size" in line


def test_other_faults_of_the_device_keep_their_traceback(run, monkeypatch):
  def fail(*_, **__):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")

  monkeypatch.setattr(perplexity, "_losses", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    command(f"--workdir={run[0]}")


def test_an_altered_shard_is_refused(run, tmp_path, capsys):
  data = write_dataset(tmp_path / "data", [(b"a", 0)], heldout=[(b"text", 0)])
  file = data / "heldout-00000.tokens"
  content = bytearray(file.read_bytes())
  content[4] ^= 1
  file.write_bytes(content)
  line = refused(capsys, f"--workdir={run[0]}", f"--data={data}")
  assert str(file) in line


def test_help_reads_well(capsys):
  with pytest.raises(SystemExit) as end:
    evaluate.main(["--help"])
  assert end.value.code == 0
  text = capsys.readouterr().out
  for part in ("--workdir DIR", "--ngrams", "--json FILE", "examples:"):
    assert part in text
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
  "argument", ["--context=0", "--context=all", "--context=-1", "--split=x"]
)
def test_arguments_that_make_no_sense_are_refused(run, argument, capsys):
  with pytest.raises(SystemExit) as stopped:
    command(f"--workdir={run[0]}", argument)
  assert stopped.value.code == 2
  assert argument.split("=")[1] in capsys.readouterr().err
