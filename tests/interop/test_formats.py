"""A checkpoint format is one file: a toy that lives here exports and imports.

`FORMAT`, `import_folder` and `export_folder` are what a file in `interop/`
holds.
"""

import pathlib

import jax
import numpy as np
import pytest
from workdirs import write_run

from xlstm_jax import config
from xlstm_jax.config import RunConfig
from xlstm_jax.errors import UserError
from xlstm_jax.interop import tensor_files, workdir
from xlstm_jax.interop.names import Format, NameMap, tensor
from xlstm_jax.interop.options import Options, Size
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition

FORMAT = Format(
  model=(
    tensor("table", "Z D -> ZD", "embedding.weight"),
    tensor("last_norm", "D -> D", "norm.scale"),
    tensor("logits", "D Z -> ZD", "head.weight"),
  ),
  blocks={
    "slstm": (
      tensor("norm", "D -> D", "norm.scale"),
      tensor("conv", "D W -> WD", "mixer.conv.weight"),
      tensor("conv_bias", "D -> D", "mixer.conv.bias"),
      tensor("gates", "GH K V -> GHKV", "mixer.gates.weight"),
      tensor("recurrent", "G H K V -> GHKV", "mixer.recurrent"),
      tensor("bias", "GHV -> GHV", "mixer.bias"),
      tensor("head_norm", "HV -> HV", "mixer.head_norm.scale"),
    )
  },
  block_prefix="layers.{}.",
)


def model_config(content) -> ModelConfig:
  options = Options(content)
  return ModelConfig(
    vocab_size=options.get("tokens", Size),
    width=options.get("channels", Size),
    num_blocks=1,
    slstm_at=(0,),
    slstm=SLSTMConfig(num_heads=2, feedforward=False),
  )


def import_folder(source: pathlib.Path, target: pathlib.Path) -> None:
  cfg = model_config(tensor_files.read_json(source / "toy.json"))
  stored = tensor_files.open_folder(source)
  workdir.create(target, source, cfg, FORMAT, stored)


def export_folder(source: pathlib.Path, target: pathlib.Path) -> None:
  workdir.require_empty(target)
  run = config.load(source)
  names = NameMap(FORMAT, run.model, Definition(run.model).abstract())
  params = workdir.restore(source, run, None)
  target.mkdir(parents=True, exist_ok=True)
  tensor_files.write_file(
    target / tensor_files.SINGLE,
    names.specs(tensor_files.DTYPES["F32"]),
    lambda name: names.value(params, name),
  )
  content = {"tokens": run.model.vocab_size, "channels": run.model.width}
  tensor_files.write_json(target / "toy.json", content)


def test_a_model_comes_back_from_it(tmp_path):
  cfg = RunConfig(model=model_config({"tokens": 257, "channels": 8}))
  run, folder, back = (tmp_path / name for name in ("run", "toy", "back"))
  (saved,) = write_run(run, cfg, steps={1: 0.5}).values()
  export_folder(run, folder)
  stored = tensor_files.open_folder(folder)
  assert stored["logits"].spec.shape == (8, 257)
  assert stored["layers.0.gates"].spec.shape == (4 * 2, 4, 4)
  import_folder(folder, back)
  assert config.load(back).model == cfg.model
  jax.tree.map(
    np.testing.assert_array_equal,
    workdir.restore(back, config.load(back), None),
    saved,
  )


def test_a_folder_of_another_model_is_refused(tmp_path):
  cfg = RunConfig(model=model_config({"tokens": 257, "channels": 8}))
  run, folder = tmp_path / "run", tmp_path / "toy"
  write_run(run, cfg, steps={1: 0.5})
  export_folder(run, folder)
  content = {"tokens": 257, "channels": 12}
  tensor_files.write_json(folder / "toy.json", content)
  with pytest.raises(UserError, match=r"has shape .* makes it"):
    import_folder(folder, tmp_path / "back")
