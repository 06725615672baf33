"""Hugging Face folders through the commands: bit by bit, and bad ones."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import exported
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xlstm_jax import config, errors, sharding, trained
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data import tokenizer as tokenizers
from xlstm_jax.errors import UserError
from xlstm_jax.interop import hf, large, tensor_files, workdir
from xlstm_jax.interop.names import NameMap
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition

SOURCE = golden.hugging_face_folder("hf_tiny")
FOLDERS = [
  pytest.param(folder, id=name, marks=pytest.mark.slow if "/" in name else ())
  for name in golden.model_names("hf")
  for folder in sorted(golden.folder_of(name).glob("checkpoint*"))
]


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a folder, as the reference package reads them."""
  found = {}
  for path in folder.glob("*.safetensors"):
    found |= load_file(path)
  assert found
  return found


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype
    assert ours[name].shape == value.shape
    assert ours[name].tobytes() == value.tobytes()


def run(capsys, *argv) -> tuple[int, str]:
  """Exit status and stderr of the command."""
  code = errors.exit_code(lambda: hf.main([str(word) for word in argv]))
  return code, capsys.readouterr().err


@pytest.fixture
def copied(tmp_path) -> pathlib.Path:
  """A checkpoint folder that may be changed."""
  folder = tmp_path / "changed"
  shutil.copytree(SOURCE, folder)
  for path in (folder, *folder.iterdir()):
    path.chmod(0o755)
  return folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_round_trip_is_bit_exact(tmp_path, folder):
  theirs = json.loads((folder / "config.json").read_text())
  sharded = (folder / tensor_files.INDEX).exists()
  hf.import_folder(folder, tmp_path / "workdir")
  hf.export_folder(
    tmp_path / "workdir",
    tmp_path / "out",
    max_shard_bytes=400_000 if sharded else 10**9,
  )
  assert_same(tensors(tmp_path / "out"), tensors(folder))
  assert (tmp_path / "out" / tensor_files.INDEX).exists() == sharded
  ours = json.loads((tmp_path / "out" / "config.json").read_text())
  version = theirs.pop("transformers_version")
  assert ours == theirs | {"torch_dtype": theirs["dtype"]}
  generation = folder / hf.GENERATION
  assert version in generation.read_text()
  assert same_json(tmp_path / "out" / hf.GENERATION, generation)


def same_json(ours: pathlib.Path, theirs: pathlib.Path) -> bool:
  return json.loads(ours.read_text()) == json.loads(theirs.read_text())


def written(folder: pathlib.Path, content: dict, weights: dict) -> pathlib.Path:
  """A checkpoint folder of one file."""
  folder.mkdir()
  save_file(weights, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(content))
  return folder


@pytest.mark.parametrize(
  ("stored", "asked", "exported"),
  [
    ("bfloat16", None, "bfloat16"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32"),
    ("float32", None, "float32"),
    ("float32", "bfloat16", "bfloat16"),
    ("float16", None, "float32"),
    ("mixed", None, "float32"),
  ],
)
def test_an_export_has_the_dtype_of_the_import(
  tmp_path, stored, asked, exported
):
  """Without --dtype; what narrow types hold, wide ones hold as well."""
  weights = {
    name: value.astype(jnp.bfloat16) for name, value in tensors(SOURCE).items()
  }
  if stored == "mixed":
    weights["lm_head.weight"] = np.float32(weights["lm_head.weight"])
  else:
    weights = {k: value.astype(stored) for k, value in weights.items()}
  content = json.loads((SOURCE / "config.json").read_text())
  content["autocast_kernel_dtype"] = "of the import"
  folder = written(tmp_path / "in", content, weights)
  hf.import_folder(folder, tmp_path / "workdir")
  argv = ["export", f"--workdir={tmp_path / 'workdir'}"]
  argv += [f"--output={tmp_path / 'out'}"]
  hf.main(argv + ([] if asked is None else [f"--dtype={asked}"]))
  assert_same(
    tensors(tmp_path / "out"),
    {name: value.astype(exported) for name, value in weights.items()},
  )
  content = json.loads((tmp_path / "out" / "config.json").read_text())
  assert content["dtype"] == content["torch_dtype"] == exported
  assert content["autocast_kernel_dtype"] == (
    "of the import" if stored == exported else exported
  )


LARGE = {
  "vocab_size": 31,
  "embedding_dim": 16,
  "num_blocks": 2,
  "num_heads": 2,
  "ffn_round_up_to_multiple_of": 8,
}


def numbers(content: dict, embedding: str, dtype) -> dict[str, np.ndarray]:
  """Random tensors of the model of a `config.json`."""
  cfg = large.model_config(content)
  form = large.tensor_format(
    embedding=embedding, weight_mode=large.weight_mode(content)
  )
  names = NameMap(form, cfg, Definition(cfg).abstract())
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=names.shape(name)).astype(dtype)
    for name in names.pieces
  }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_folder_survives_two_round_trips(
  tmp_path, bias, weight_mode, dtype, tied
):
  """Upstream ignores the flags of the last norm and the tied embedding."""
  content = LARGE | {
    "model_type": "xlstm",
    "use_bias": bias,
    "weight_mode": weight_mode,
    "add_out_norm": not tied,
    "tie_word_embeddings": tied,
  }
  weights = numbers(content, large.EMBEDDING, dtype)
  assert ("backbone.blocks.1.ffn.proj_down.bias" in weights) == bias
  assert "backbone.out_norm.weight" in weights
  assert "backbone.out_norm.bias" not in weights
  folder = written(tmp_path / "0", content, weights)
  for turn in (1, 2):
    hf.import_folder(folder, tmp_path / f"workdir{turn}")
    folder = tmp_path / f"{turn}"
    hf.export_folder(
      tmp_path / f"workdir{turn}",
      folder,
      weight_mode=weight_mode,
      max_shard_bytes=4000,
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(tensors(folder), weights)


def test_a_folder_of_xlstm_large_imports_through_the_command(tmp_path, capsys):
  content = LARGE | {"use_bias": True, "mode": "train", "chunk_size": 16}
  weights = numbers(content, "embedding.weight", "bfloat16")
  assert "backbone.out_norm.bias" in weights
  folder = written(tmp_path / "in", content, weights)
  target = tmp_path / "workdir"
  code, stderr = run(
    capsys, "import", f"--input={folder}", f"--workdir={target}"
  )
  assert (code, stderr) == (0, "")
  cfg = config.load(target)
  assert cfg.model == large.model_config(content)
  form = large.tensor_format(embedding="embedding.weight", weight_mode="single")
  names = NameMap(form, cfg.model, Definition(cfg.model).abstract())
  params = workdir.restore(target, cfg)
  for name, value in weights.items():
    ours = names.value(params, name)
    np.testing.assert_array_equal(ours, value.astype(np.float32))


def test_an_xlstm_large_model_exports_with_the_defaults_of_hugging_face(
  tmp_path,
):
  """Of how to run it, and of ids: its own configuration means another code."""
  content = LARGE | {"mode": "train", "chunk_size": 16, "eos_token_id": 7}
  weights = numbers(content, "embedding.weight", "float32")
  folder = written(tmp_path / "in", content, weights)
  hf.import_folder(folder, tmp_path / "workdir")
  hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  ours = json.loads((tmp_path / "out" / "config.json").read_text())
  assert ours["mode"] == "inference"
  assert ours["chunk_size"] == 64
  assert ours["chunkwise_kernel"] == "chunkwise--native_autograd"
  assert ours["autocast_kernel_dtype"] == "float32"
  assert ours["eos_token_id"] is None
  assert not (tmp_path / "out" / hf.GENERATION).exists()


def test_a_rounded_tensor_is_no_round_trip(tmp_path, monkeypatch):
  """What turns the tests above red: a single number that is not the same."""

  def value(self, params, name, value=NameMap.value):
    stored = np.array(value(self, params, name))
    if name == "lm_head.weight":
      stored.flat[0] = np.nextafter(stored.flat[0], 0)
    return stored

  monkeypatch.setattr(NameMap, "value", value)
  with pytest.raises(AssertionError):
    test_round_trip_is_bit_exact(tmp_path, SOURCE)


def test_imported_parameters_are_sharded_and_compute_the_goldens(tmp_path):
  hf.import_folder(SOURCE, tmp_path / "workdir")
  cfg = config.load(tmp_path / "workdir")
  params = workdir.restore(tmp_path / "workdir", cfg)
  assert len(params["embedding"]["weight"].sharding.device_set) == 8
  reference, _, expected = golden.converted("hf_tiny", "float32")
  assert cfg.model == reference.cfg
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_fused_export_imports_as_the_same_model(tmp_path):
  hf.import_folder(SOURCE, tmp_path / "workdir")
  hf.export_folder(
    tmp_path / "workdir", tmp_path / "fused", weight_mode="fused"
  )
  names = tensors(tmp_path / "fused")
  assert any(name.endswith("qkv_opreact.weight") for name in names)
  hf.import_folder(tmp_path / "fused", tmp_path / "again")
  cfg = config.load(tmp_path / "again")
  jax.tree.map(
    np.testing.assert_array_equal,
    workdir.restore(tmp_path / "again", cfg),
    workdir.restore(tmp_path / "workdir", cfg),
  )


def test_a_tied_model_exports_its_embedding_twice(tmp_path):
  model = ModelConfig(
    vocab_size=257,
    width=16,
    num_blocks=1,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=2),
    tie_embeddings=True,
    feedforward=golden.converted("hf_tiny", "float32")[0].cfg.feedforward,
    norm=golden.converted("hf_tiny", "float32")[0].cfg.norm,
    head_norm=golden.converted("hf_tiny", "float32")[0].cfg.head_norm,
  )
  make_run(tmp_path / "workdir", model)
  tokenizers.ByteTokenizer().save(tmp_path / "workdir")
  hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  found = tensors(tmp_path / "out")
  np.testing.assert_array_equal(
    found["lm_head.weight"], found["backbone.embeddings.weight"]
  )
  content = json.loads((tmp_path / "out" / "config.json").read_text())
  assert content["tie_word_embeddings"] is False
  assert content["bos_token_id"] == 256
  assert content["eos_token_id"] == 256
  assert content["pad_token_id"] == 256


def make_run(folder: pathlib.Path, model: ModelConfig) -> None:
  """A workdir as training leaves it."""
  config.save(folder, RunConfig(model=model))
  checkpoints = Checkpoints(folder / workdir.CHECKPOINTS, CheckpointConfig())
  params = jax.tree.map(
    lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
    Definition(model).abstract(),
  )
  checkpoints.save(3, {"params": params})
  checkpoints.close()


def test_slstm_models_are_refused_with_the_reason(tmp_path, capsys):
  model = ModelConfig(vocab_size=8, width=16, num_blocks=2, slstm_at=(1,))
  make_run(tmp_path / "workdir", model)
  code, stderr = run(
    capsys,
    "export",
    f"--workdir={tmp_path / 'workdir'}",
    f"--output={tmp_path / 'out'}",
  )
  assert code == 2
  assert "slstm_at is (1,): it has no sLSTM blocks" in stderr
  assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_taken_along(tmp_path, copied):
  tokenizer = tokenizers.train(["some text"], 257)
  tokenizer.save(tmp_path)
  shutil.copy(tmp_path / "tokenizer.json", copied)
  content = json.loads((copied / "config.json").read_text())
  content["eos_token_id"] = [5, 6]
  (copied / "config.json").write_text(json.dumps(content))
  hf.import_folder(copied, tmp_path / "workdir")
  assert tokenizers.load(tmp_path / "workdir").end_of_text == 5
  hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  content = json.loads((tmp_path / "out" / "config.json").read_text())
  assert content["eos_token_id"] == [5, 6]
  assert content["bos_token_id"] == 0
  assert (tmp_path / "out" / hf.GENERATION).exists()
  copy = (tmp_path / "out" / "tokenizer.json").read_bytes()
  assert copy == (tmp_path / "tokenizer.json").read_bytes()


def test_a_byte_model_comes_back_with_its_tokenizer(tmp_path):
  hf.import_folder(SOURCE, tmp_path / "workdir")
  tokenizers.ByteTokenizer().save(tmp_path / "workdir")
  hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  content = json.loads((tmp_path / "out" / "config.json").read_text())
  assert [content[name] for name in large.TOKEN_IDS] == [256] * 3
  generation = json.loads((tmp_path / "out" / hf.GENERATION).read_text())
  assert generation == {
    name: content[name] for name in (*large.TOKEN_IDS, "use_cache")
  }
  hf.import_folder(tmp_path / "out", tmp_path / "again")
  assert tokenizers.load(tmp_path / "again").kind == "byte"


def test_ids_that_a_folder_leaves_to_upstream_are_left_to_it(tmp_path, copied):
  content = json.loads((copied / "config.json").read_text())
  del content["eos_token_id"]
  (copied / "config.json").write_text(json.dumps(content))
  hf.import_folder(copied, tmp_path / "workdir")
  hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  ours = json.loads((tmp_path / "out" / "config.json").read_text())
  assert "eos_token_id" not in ours
  assert ours["pad_token_id"] == 1


@pytest.mark.parametrize("id", [-1, 2**32])
def test_an_end_of_text_that_no_tokenizer_has_is_named(tmp_path, copied, id):
  with_tokenizer(copied, eos_token_id=id)
  with pytest.raises(UserError, match=f"no token of id {id} to end a text"):
    hf.import_folder(copied, tmp_path / "workdir")


def test_an_unusable_tokenizer_is_named(tmp_path, copied):
  (copied / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"tokenizer.json is not a .*tokenizer"):
    hf.import_folder(copied, tmp_path / "workdir")
  assert not (tmp_path / "workdir").exists()


CHAT = {
  "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", '
  '"eos_token": {"content": "<|endoftext|>"}, "padding_side": "left"}',
  "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
  "added_tokens.json": '{"<|endoftext|>": 0}',
  "chat_template.jinja": "{{ messages }}",
  "additional_chat_templates/tool.jinja": "{{ tools }}",
  "vocab.json": "{}",
  "merges.txt": "#version: 0.2\n",
  "tokenizer.model": "\x00model",
}


def with_tokenizer(folder: pathlib.Path, **ids) -> pathlib.Path:
  """Adds a tokenizer of 257 ids to a checkpoint folder; `ids` to its config."""
  (folder / "tokenizer.json").write_bytes(
    tokenizers.train(["some text"], 257).plain_file()
  )
  content = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(content | ids))
  return folder


def exported_again(folder: pathlib.Path, tmp_path: pathlib.Path):
  """The files of a folder that was imported and exported, and what was said."""
  hf.import_folder(folder, tmp_path / "workdir")
  told = hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  return tmp_path / "out", told


def test_an_import_keeps_the_files_of_the_tokenizer(tmp_path, copied):
  with_tokenizer(copied)
  for name, text in CHAT.items():
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text(text)
  (copied / "README.md").write_text("not the tokenizer's")
  out, _ = exported_again(copied, tmp_path)
  for name in (*CHAT, "tokenizer.json"):
    assert (out / name).read_bytes() == (copied / name).read_bytes()
  assert not (out / "README.md").exists()
  # They are of that tokenizer, also where it was only told by its hash.
  tokenizers.train(["some other text"], 257).save(tmp_path / "workdir")
  hf.export_folder(tmp_path / "workdir", tmp_path / "other")
  assert not (tmp_path / "other" / "chat_template.jinja").exists()
  said = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
  assert said["eos_token"] == said["pad_token"] == "<|endoftext|>"
  assert said["padding_side"] == "right"


def test_files_without_a_tokenizer_json_are_kept_too(tmp_path, copied):
  (copied / "tokenizer.model").write_bytes(b"sentencepiece")
  (copied / "tokenizer_config.json").write_text("{")
  out, told = exported_again(copied, tmp_path)
  assert (out / "tokenizer.model").read_bytes() == b"sentencepiece"
  assert (out / "tokenizer_config.json").read_text() == "{"
  assert any("no tokenizer" in sentence for sentence in told)


def test_a_damaged_tokenizer_of_the_import_leaves_no_export(tmp_path, copied):
  """A byte tokenizer does not read it; transformers would."""
  tokenizers.ByteTokenizer().save(copied)
  (copied / "tokenizer.json").write_text("{}")
  hf.import_folder(copied, tmp_path / "workdir")
  with pytest.raises(UserError, match="not a usable"):
    hf.export_folder(tmp_path / "workdir", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_an_import_without_a_tokenizer_config_gets_one(tmp_path, copied):
  """Of the ids that its config.json gives, where the tokenizer has them."""
  with_tokenizer(copied, bos_token_id=5, eos_token_id=[0, 6], pad_token_id=None)
  out, _ = exported_again(copied, tmp_path)
  said = json.loads((out / "tokenizer_config.json").read_text())
  known = tokenizers.build(
    json.loads((out / "tokenizer.json").read_text()), out
  )
  assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert said["bos_token"] == known.id_to_token(5)
  assert said["eos_token"] == "<|endoftext|>"
  assert "pad_token" not in said
  content = json.loads((out / "config.json").read_text())
  assert content["eos_token_id"] == [0, 6]


def test_an_export_imports_with_the_tokenizer_of_the_training_data(tmp_path):
  """Also where transformers has to read another tokenizer.json."""
  exported.make_run(tmp_path / "run", "wide")
  hf.export_folder(tmp_path / "run", tmp_path / "0")
  trained_with = tokenizers.load(tmp_path / "run")
  file = (tmp_path / "0" / "tokenizer.json").read_bytes()
  assert file != (tmp_path / "run" / "tokenizer.json").read_bytes()
  for turn in (1, 2):
    hf.import_folder(tmp_path / f"{turn - 1}", tmp_path / f"workdir{turn}")
    tokenizer = tokenizers.load(tmp_path / f"workdir{turn}")
    assert tokenizer.spec == trained_with.spec
    hf.export_folder(tmp_path / f"workdir{turn}", tmp_path / f"{turn}")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
      ours = (tmp_path / f"{turn}" / name).read_bytes()
      assert ours == (tmp_path / "0" / name).read_bytes()


@pytest.mark.parametrize(
  ("ids", "tokenizer_config", "told"),
  [
    ({"pad_token_id": 300}, {}, "gives pad_token_id as 300, but the model has"),
    ({"eos_token_id": [0, 97]}, {}, "gives eos_token_id as 97, but the model"),
    ({"pad_token_id": -1}, {}, "gives pad_token_id as -1, but the model has"),
    ({}, {}, "The tokenizer has 257 ids, but the model only 97"),
    (
      {},
      {"pad_token": {"content": "[PAD]"}},
      "gives pad_token as '[PAD]', which tokenizer.json does not have",
    ),
  ],
)
def test_ids_that_the_model_does_not_have_are_told(
  tmp_path, copied, ids, tokenizer_config, told
):
  with_tokenizer(copied, **ids)
  if tokenizer_config:
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps(tokenizer_config))
  _, sentences = exported_again(copied, tmp_path)
  assert any(told in sentence for sentence in sentences)


def test_faults_of_transformers_are_told_on_stderr(tmp_path, capsys):
  """The cache of the golden's sizes fits it; its mask is ignored."""
  hf.import_folder(SOURCE, tmp_path / "workdir")
  words = (f"--workdir={tmp_path / 'workdir'}", f"--output={tmp_path / 'out'}")
  code, stderr = run(capsys, "export", *words)
  assert code == 0
  assert all(line.startswith("warning: ") for line in stderr.splitlines())
  assert "ignores attention_mask" in stderr
  assert "use_cache" not in stderr


@pytest.mark.parametrize(
  ("width", "heads", "qk_factor", "fits"),
  [
    (128, 2, 0.5, True),
    (64, 2, 0.5, False),
    (96, 2, 0.5, False),
    (192, 4, 0.5, False),
    (320, 4, 0.4, True),
    # Each of 65 heads has one channel in either.
    (65, 65, 1.0, True),
  ],
)
def test_sizes_that_the_cache_of_transformers_fits(
  width, heads, qk_factor, fits
):
  mixer = MLSTMLargeConfig(num_heads=heads, qk_factor=qk_factor)
  cfg = ModelConfig(vocab_size=8, width=width, num_blocks=1, mlstm_large=mixer)
  assert (large.cache_fault(cfg) is None) == fits


def test_the_other_commands_find_imported_parameters(tmp_path):
  hf.import_folder(SOURCE, tmp_path / "workdir")
  mesh = sharding.make_mesh(sharding.MeshConfig())
  model = trained.load(tmp_path / "workdir", step="latest", mesh=mesh)
  assert model.step == 0
  assert model.tokenizer_hash is None
  cfg = config.load(tmp_path / "workdir")
  jax.tree.map(
    np.testing.assert_array_equal,
    model.params,
    workdir.restore(tmp_path / "workdir", cfg),
  )


@pytest.mark.parametrize("command", ["import", "export"])
def test_folders_in_use_are_left_alone(tmp_path, capsys, command):
  used = tmp_path / "used"
  used.mkdir()
  (used / "precious").write_text("mine")
  words = {
    "import": (f"--input={SOURCE}", f"--workdir={used}"),
    "export": (f"--workdir={tmp_path}", f"--output={used}"),
  }
  code, stderr = run(capsys, command, *words[command])
  assert code == 2
  assert "not empty" in stderr
  assert [path.name for path in used.iterdir()] == ["precious"]


def test_a_refused_import_leaves_no_workdir(tmp_path, copied):
  (copied / "config.json").write_text(
    (copied / "config.json")
    .read_text()
    .replace('"vocab_size": 97', '"vocab_size": 98')
  )
  with pytest.raises(
    UserError, match=r"embeddings.weight has shape \[97, 128\]"
  ):
    hf.import_folder(copied, tmp_path / "workdir")
  assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("config.json", None, "No such file"),
    ("config.json", b"{", "not valid JSON"),
    ("config.json", b"\xff\xfe", "not valid JSON"),
    ("config.json", b'{"model_type": "llama"}', "model_type is 'llama'"),
    ("model.safetensors", b"\x80\x02cos\nsystem\n", "damaged"),
  ],
)
def test_bad_folders_are_named(
  tmp_path, capsys, copied, name, content, message
):
  path = copied / name
  path.unlink(missing_ok=True)
  (copied / tensor_files.INDEX).unlink(missing_ok=True)
  if content is not None:
    path.write_bytes(content)
  code, stderr = run(
    capsys, "import", f"--input={copied}", f"--workdir={tmp_path / 'workdir'}"
  )
  assert code == 2
  assert stderr.startswith("error: ")
  assert message in stderr


@pytest.mark.parametrize(
  ("text", "size"), [("5GB", 5 * 10**9), ("1mb", 10**6), ("12", 12)]
)
def test_sizes(text, size):
  assert hf.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 GB", "GB", "-1", "0", "1TB"])
def test_bad_sizes_are_named(text):
  with pytest.raises(UserError, match="is no size"):
    hf.parse_size(text)


@pytest.mark.slow
def test_the_command_runs_as_documented(tmp_path):
  def command(*words):
    return subprocess.run(
      [sys.executable, "-m", "xlstm_jax.interop.hf", *words],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {"XLA_FLAGS": ""},
    )

  done = command("import", f"--input={SOURCE}", f"--workdir={tmp_path / 'w'}")
  assert done.returncode == 0, done.stderr
  done = command(
    "export", f"--workdir={tmp_path / 'w'}", f"--output={tmp_path / 'out'}"
  )
  assert done.returncode == 0, done.stderr
  assert tensors(tmp_path / "out").keys() == tensors(SOURCE).keys()
  done = command("import", f"--input={tmp_path}", "--workdir=nowhere")
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert "Traceback" not in done.stderr
