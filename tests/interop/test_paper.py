"""State dicts of the paper's repository, through the command."""

import dataclasses
import json
import pathlib

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_oracle_options import PAPER, PAPER_OPTIONS, with_options

from xlstm_jax import config, errors
from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.interop import paper, workdir
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition


def saved(folder: pathlib.Path, weights, content) -> pathlib.Path:
  """The folder that the documented two lines write."""
  folder.mkdir()
  contiguous = {k: np.ascontiguousarray(v) for k, v in weights.items()}
  safetensors.numpy.save_file(contiguous, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(content))
  return folder


def imported(folder: pathlib.Path, target: pathlib.Path):
  """The configuration and parameters of the imported folder."""
  paper.import_folder(folder, target)
  run = config.load(target)
  return run.model, workdir.restore(target, run)


@pytest.mark.parametrize("name", golden.cases("paper"))
def test_goldens_import(tmp_path, name):
  case = golden.model(name)
  folder = saved(tmp_path / "in", case.weights, case.meta["config"])
  cfg, params = imported(folder, tmp_path / "workdir")
  reference, _, expected = golden.converted(name, "float32")
  assert cfg == reference.cfg
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_state_dict_of_the_cuda_backend_imports_as_the_same_model(tmp_path):
  case = golden.model("paper_ms11_eps0")
  _, _, expected = golden.converted("paper_ms11_eps0", "float32")
  weights = dict(case.weights)
  for name, value in case.weights.items():
    H = case.meta["config"]["slstm_block"]["slstm"]["num_heads"]
    if name.endswith("_recurrent_kernel_"):
      D = value.shape[-1]
      in_out = value.reshape(H, 4, D, D).transpose(0, 3, 1, 2)
      weights[name] = in_out.reshape(H, D, 4 * D)
    if name.endswith("_bias_"):
      weights[name] = value.reshape(4, H, -1).transpose(1, 0, 2).ravel()
  folder = saved(tmp_path / "in", weights, case.meta["config"])
  _, params = imported(folder, tmp_path / "workdir")
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def exported(workdir: pathlib.Path, target: pathlib.Path, *options: str):
  """The tensors and the configuration that the command writes."""
  paper.main(["export", f"--workdir={workdir}", f"--output={target}", *options])
  tensors = safetensors.numpy.load_file(target / "model.safetensors")
  return tensors, json.loads((target / "config.json").read_text())


def without_feedforward(case: golden.Model):
  """A golden's tensors and configuration, but for the feed-forwards."""
  weights = {
    name: value for name, value in case.weights.items() if ".ffn" not in name
  }
  assert len(weights) < len(case.weights)
  block = case.meta["config"]["slstm_block"] | {"feedforward": None}
  return weights, case.meta["config"] | {"slstm_block": block}


@pytest.mark.parametrize("feedforward", [True, False])
@pytest.mark.parametrize("layout", ["vanilla", "cuda"])
def test_what_was_imported_is_exported_bit_by_bit(
  tmp_path, feedforward, layout
):
  case = golden.model("paper_ms11_eps0")
  weights, content = case.weights, case.meta["config"]
  if not feedforward:
    weights, content = without_feedforward(case)
  content = content | {"mlstm_cell_eps": 1e-6}
  folder = saved(tmp_path / "in", weights, content)
  cfg, params = imported(folder, tmp_path / "workdir")
  assert cfg.slstm.feedforward == feedforward
  tensors, config = exported(
    tmp_path / "workdir", tmp_path / "out", f"--slstm-backend={layout}"
  )
  assert config["context_length"] == content["context_length"] == 64
  assert config["slstm_block"]["slstm"]["backend"] == layout
  assert tensors.keys() == weights.keys()
  if layout == "vanilla":
    jax.tree.map(np.testing.assert_array_equal, tensors, dict(weights))
  # The other layout is read as the same model.
  again = imported(tmp_path / "out", tmp_path / "again")
  assert again[0] == cfg
  jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_every_option_that_is_imported_is_exported():
  for changes in PAPER_OPTIONS.values():
    content = with_options(PAPER, changes)
    if content["mlstm_cell_eps"] != 1e-6 or (
      content["mlstm_block"]
      and not content["mlstm_block"]["mlstm"]["conv1d_kernel_size"]
    ):
      continue
    cfg = paper.model_config(content)
    written = paper.paper_config(cfg, context=64, slstm_layout="vanilla")
    assert paper.model_config(written) == cfg


@pytest.mark.parametrize("feedforward", [{}, {"rounding": "floor"}])
def test_a_run_exports_with_its_context_and_its_hidden_units(
  tmp_path, feedforward
):
  model = ModelConfig(
    vocab_size=16,
    width=24,
    num_blocks=2,
    slstm_at=(1,),
    mlstm=MLSTMConfig(num_heads=2, qkv_block=0),
    slstm=SLSTMConfig(num_heads=2),
    feedforward=FeedForwardConfig(factor=2.7, round_to=8, **feedforward),
    tie_embeddings=True,
    dropout=0.125,
  )
  run = RunConfig(model=model, data=DataConfig(context=96))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    Definition(model).abstract(),
  )
  saving = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig())
  saving.save(7, {"params": params})
  saving.close()
  config.save(tmp_path / "run", run)
  tensors, content = exported(tmp_path / "run", tmp_path / "out", "--step=7")
  assert content["context_length"] == 96
  assert content["slstm_block"]["feedforward"]["dropout"] == 0.125
  assert "lm_head.weight" not in tensors
  cfg, again = imported(tmp_path / "out", tmp_path / "again")
  hidden = cfg.feedforward.hidden(cfg.width)
  assert hidden == model.feedforward.hidden(model.width)
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mlstm_block": "large"}, "whose mlstm_block is 'large'"),
    (
      {"slstm_at": (), "pattern": ("slstm", "mlstm_large")},
      r"whose pattern is \('slstm', 'mlstm_large'\): it has the paper's blocks",
    ),
    ({"post_norm": True}, "whose post_norm is True"),
    ({"logit_cap": 30.0}, "whose logit_cap is 30.0: it has no caps"),
    ({"norm": NormConfig("rms")}, "whose norm is NormConfig"),
    ({"head_norm": NormConfig(eps=1e-6)}, "whose head_norm is NormConfig"),
    ({"mlstm": MLSTMConfig(conv_window=0)}, "conv_window is 0: its mLSTM"),
    ({"mlstm": MLSTMConfig(gate_input="up")}, "gate_input is 'up'"),
    ({"mlstm": MLSTMConfig(gate_headwise=True)}, "gate_headwise is True"),
    ({"mlstm": MLSTMConfig(gate_cap=15.0)}, "mlstm.gate_cap is 15.0"),
    ({"mlstm": MLSTMConfig(input_gate="sigmoid")}, "input_gate is 'sigmoid'"),
    ({"mlstm": MLSTMConfig(normalize=False)}, "normalize is False"),
    ({"mlstm": MLSTMConfig(qk_norm=True)}, "mlstm.qk_norm is True"),
    ({"mlstm": MLSTMConfig(eps=0.0)}, "mlstm.eps is 0.0: its cell adds 1e-06"),
    (
      {"feedforward": FeedForwardConfig(activation="gelu_tanh")},
      "activation is 'gelu_tanh': its feed-forward has gelu, silu",
    ),
  ],
)
def test_what_the_repository_does_not_have_is_refused(changes, message):
  cfg = dataclasses.replace(ModelConfig(slstm_at=(1,)), **changes)
  with pytest.raises(UserError, match=message):
    paper.paper_config(cfg, context=64, slstm_layout="vanilla")


def test_a_pattern_is_exported_by_the_places_of_its_slstm_blocks():
  cfg = ModelConfig(num_blocks=5, pattern=("mlstm", "slstm"))
  content = paper.paper_config(cfg, context=64, slstm_layout="vanilla")
  assert content["slstm_at"] == [1, 3]


def test_what_a_model_does_not_use_may_be_anything():
  cfg = ModelConfig(
    num_blocks=1,
    slstm_at=(0,),
    mlstm=MLSTMConfig(qk_norm=True),
    slstm=SLSTMConfig(feedforward=False),
    feedforward=FeedForwardConfig(activation="gelu_tanh"),
  )
  content = paper.paper_config(cfg, context=64, slstm_layout="vanilla")
  assert content["mlstm_block"] is None
  assert content["slstm_block"]["feedforward"] is None


@pytest.mark.parametrize("kept", ["both", "head", "embedding"])
def test_tied_models_import_whichever_name_was_saved(tmp_path, kept):
  case = golden.model("paper_ms11_eps0")
  weights = dict(case.weights)
  embedding = weights["token_embedding.weight"]
  weights["lm_head.weight"] = embedding
  if kept == "head":
    del weights["token_embedding.weight"]
  if kept == "embedding":
    del weights["lm_head.weight"]
  content = case.meta["config"] | {"tie_weights": True}
  folder = saved(tmp_path / "in", weights, content)
  cfg, params = imported(folder, tmp_path / "workdir")
  assert cfg.tie_embeddings
  assert "head" not in params
  np.testing.assert_array_equal(params["embedding"]["weight"], embedding)


def test_a_tied_model_with_two_matrices_is_refused(tmp_path):
  case = golden.model("paper_ms11_eps0")
  content = case.meta["config"] | {"tie_weights": True}
  folder = saved(tmp_path / "in", case.weights, content)
  with pytest.raises(UserError, match="are different: set tie_weights"):
    paper.import_folder(folder, tmp_path / "workdir")


def test_bad_folders_are_named(tmp_path, capsys):
  case = golden.model("paper_ms11_eps0")
  content = case.meta["config"] | {"slstm_at": [0]}
  folder = saved(tmp_path / "in", case.weights, content)
  argv = ["import", f"--input={folder}", f"--workdir={tmp_path / 'workdir'}"]
  assert errors.exit_code(lambda: paper.main(argv)) == 2
  stderr = capsys.readouterr().err
  assert stderr.startswith(
    "error: The checkpoint lacks xlstm_block_stack.block"
  )
