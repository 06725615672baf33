"""What transformers and lm-eval read of our exports is what we compute.

`make test-interop` lets the real ones, of versions 4 and 5, read the folders
that exported.py writes, and records what they found.
"""

import functools
import json
import pathlib
import tempfile

import exported
import jax
import numpy as np
import pytest
from compiled import jit
from data.small_datasets import write_dataset

from xlstm_jax.evaluate.perplexity import evaluate_split
from xlstm_jax.generate.sampling import Sampling
from xlstm_jax.generate.stream import generate
from xlstm_jax.interop import hf, large
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.language_model import Definition
from xlstm_jax.sharding import MeshConfig, make_mesh

RECORDS = {
  version: json.loads(
    pathlib.Path(__file__).with_name(f"transformers-{version}.json").read_text()
  )
  for version in (4, 5)
}
CLASSES = {4: "PreTrainedTokenizerFast", 5: "TokenizersBackend"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  """The folder of a fresh export, and what it said."""
  folder = tmp_path_factory.mktemp("exports")
  return folder, exported.make(folder)


@pytest.fixture(params=RECORDS)
def version(request):
  return request.param


@pytest.fixture
def record(version):
  return RECORDS[version]


def test_the_records_are_of_this_export(exports, record):
  """If not, see what changed, and let `make test-interop` read it."""
  folder, _ = exports
  assert exported.digests(folder) == record["files"]


def test_the_records_are_of_both_versions():
  versions = [r["versions"]["transformers"] for r in RECORDS.values()]
  assert versions[0].startswith("4.57.")
  assert versions[1].startswith("5.")


@pytest.mark.parametrize("name", exported.TOKENIZERS)
def test_tokenizers_give_the_same_ids_and_texts(version, record, name):
  theirs, ours = record["tokenizers"][name], exported.TOKENIZERS[name]
  assert theirs["class"] == CLASSES[version]
  assert theirs["size"] == ours.vocab_size
  ids = {id for _, id in theirs["special"].values()}
  assert ids == {ours.end_of_text}
  # `generate` refuses token_type_ids.
  assert theirs["names_of_inputs"] == ["attention_mask", "input_ids"]
  assert theirs["special_on_request"] == ours.end_of_text
  for text, ids, decoded in zip(
    record["texts"], theirs["ids"], theirs["decoded"], strict=True
  ):
    if name == "unigram" and "</s>" in text:
      # A model that has the name among its pieces; here it is cut in two.
      assert ours.end_of_text in ids
      assert ours.end_of_text not in ours.encode(text)
    else:
      assert ids == ours.encode(text).tolist()
      assert decoded == ours.decode(ids)


@functools.cache
def model(name):
  """Tokenizer, definition and parameters of an export."""
  tokenizer, cfg = exported.MODELS[name]
  definition = Definition(cfg, Compute(dtype="float32"))
  params = jax.tree.map(jax.numpy.asarray, exported.parameters(name))
  return exported.TOKENIZERS[tokenizer], definition, params


@functools.cache
def last_logits(name, texts):
  """After each text, which follows an end of text; of the first tokens."""
  tokenizer, definition, params = model(name)
  rows = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
  lengths = np.array([len(row) for row in rows])
  padded = np.zeros((len(rows), max(lengths)), np.int32)
  for at, row in enumerate(rows):
    padded[at, : len(row)] = row
  lm = definition.bind(params)
  logits = jit(lambda tokens: lm.logits(lm(tokens)[0]))(padded)
  return np.asarray(logits)[np.arange(len(rows)), lengths - 1, :12]


@functools.cache
def drawn(name, prompt, count):
  tokenizer, definition, params = model(name)
  (tokens,) = generate(
    definition,
    params,
    [tokenizer.encode(prompt).tolist()],
    max_tokens=count,
    end_of_text=tokenizer.end_of_text,
    vocab_size=definition.cfg.vocab_size,
    sampling=Sampling(temperature=0),
  )
  return tokens


@functools.cache
def nats(name, documents):
  """As evaluate counts them."""
  tokenizer, definition, params = model(name)
  with tempfile.TemporaryDirectory() as folder:
    dataset = write_dataset(
      pathlib.Path(folder),
      [],
      heldout=[(text.encode(), 0) for text in documents],
      tokenizer=tokenizer,
    )
    result = evaluate_split(
      definition,
      params,
      dataset,
      context="document",
      batch_size=4,
      mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
      piece=64,
    )
  return result.total.nats


@pytest.mark.parametrize("name", exported.MODELS)
def test_models_give_the_same_logits(record, name):
  theirs = record["models"][name]
  assert theirs["class"] == "xLSTMForCausalLM"
  assert theirs["ids"] == [model(name)[0].end_of_text] * 3
  ours = last_logits(name, tuple(record["texts"]))
  np.testing.assert_allclose(ours, theirs["last_logits"], atol=1e-4)
  assert theirs["without_cache"] is True
  assert theirs["padded_right"] == [True] * len(ours)


@pytest.mark.parametrize("name", exported.MODELS)
def test_models_draw_the_same_tokens(record, name):
  theirs = record["models"][name]["drawn"]
  assert drawn(name, record["texts"][0], len(theirs)) == theirs


def test_lm_eval_scores_as_evaluate_does(record):
  """But for the ends of texts, which evaluate counts as well."""
  theirs = record["models"]["wide"]
  total = -sum(theirs["lm_eval"]) - sum(theirs["ends"])
  ours = nats("wide", tuple(record["documents"]))
  assert ours == pytest.approx(total, abs=1e-3)


def test_what_transformers_does_wrong_is_told(exports, record):
  folder, told = exports
  # The cache, where its sizes are not the layers'.
  assert record["models"]["wide"]["with_cache"] is True
  assert "wrong shape" in record["models"]["narrow"]["with_cache"]
  assert large.cache_fault(exported.MODELS["wide"][1]) is None
  assert not any("use_cache" in sentence for sentence in told["wide"])
  (sentence,) = (one for one in told["narrow"] if "use_cache=False" in one)
  assert "16 channels of q and k and 32 of v, the cache 32 and 32" in sentence
  for path in (hf.CONFIG, hf.GENERATION):
    settings = json.loads((folder / "narrow" / path).read_text())
    assert settings["use_cache"] is False
  # Padding on the left.
  longest = max(range(4), key=lambda at: len(record["texts"][at]))
  padded = record["models"]["wide"]["padded_left"]
  assert padded == [at == longest for at in range(4)]
  for sentences in told.values():
    assert "ignores attention_mask" in sentences[-1]
