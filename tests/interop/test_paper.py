"""State dicts of the paper's repository, through the command."""

import json
import pathlib

import golden
import jax
import numpy as np
import pytest
import safetensors.numpy

from xlstm_jax import config, errors
from xlstm_jax.errors import UserError
from xlstm_jax.interop import paper, workdir


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
