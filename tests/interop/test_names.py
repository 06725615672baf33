"""The name maps: exact both ways, onto any mesh, in little memory."""

import dataclasses
import tracemalloc

import golden
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from xlstm_jax import sharding
from xlstm_jax.errors import UserError
from xlstm_jax.interop import large, paper, tensor_files
from xlstm_jax.interop.names import NameMap
from xlstm_jax.interop.tensor_files import Spec
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition

SMALL = ModelConfig(
  vocab_size=32,
  width=16,
  num_blocks=3,
  mlstm_block="large",
  mlstm_large=MLSTMLargeConfig(num_heads=4),
)


# 23 MB in float32, the largest tensor 2.1 MB.
MIDDLING = ModelConfig(
  vocab_size=2048,
  width=256,
  num_blocks=8,
  mlstm_block="large",
  mlstm_large=MLSTMLargeConfig(num_heads=4),
)


def numbered(names: NameMap, dtype=np.float32) -> dict[str, np.ndarray]:
  """Tensors whose every value is another number."""
  tensors, start = {}, 0
  for name in names.pieces:
    shape = names.shape(name)
    size = int(np.prod(shape))
    tensors[name] = np.arange(start, start + size, dtype=dtype).reshape(shape)
    start += size
  return tensors


def stored(tensors, tmp_path):
  """The tensors in a file."""
  path = tmp_path / "model.safetensors"
  specs = {name: Spec(x.shape, x.dtype) for name, x in tensors.items()}
  tensor_files.write_file(path, specs, tensors.__getitem__)
  return tensor_files.open_file(path)


def name_map(cfg, form) -> NameMap:
  return NameMap(form, cfg, Definition(cfg).abstract())


@pytest.mark.parametrize("name", golden.cases())
def test_goldens_survive_import_and_export_bit_by_bit(name):
  _, names, params = golden.converted(name, "float32")
  for key, value in golden.model(name).weights.items():
    np.testing.assert_array_equal(names.value(params, key), value)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_every_value_has_its_own_place(weight_mode):
  """A layout that drops, repeats or confuses values is no bijection."""
  names = name_map(SMALL, large.tensor_format(weight_mode=weight_mode))
  tensors = numbered(names)
  params = names.load(tensors.__getitem__)
  values = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
  np.testing.assert_array_equal(np.sort(values), np.arange(values.size))
  for key, value in tensors.items():
    np.testing.assert_array_equal(names.value(params, key), value)


def test_fused_weights_are_the_single_ones_stacked():
  single, fused = (
    name_map(SMALL, large.tensor_format(weight_mode=mode))
    for mode in ("single", "fused")
  )
  tensors = numbered(single)
  params = single.load(tensors.__getitem__)
  block = "backbone.blocks.1."

  def stacked(*names):
    return np.concatenate([tensors[block + name] for name in names])

  for name, parts in {
    "mlstm_layer.qkv_opreact.weight": [
      "mlstm_layer.q.weight",
      "mlstm_layer.k.weight",
      "mlstm_layer.v.weight",
      "mlstm_layer.ogate_preact.weight",
    ],
    "mlstm_layer.ifgate_preact.weight": [
      "mlstm_layer.igate_preact.weight",
      "mlstm_layer.fgate_preact.weight",
    ],
    "mlstm_layer.ifgate_preact.bias": [
      "mlstm_layer.igate_preact.bias",
      "mlstm_layer.fgate_preact.bias",
    ],
    "ffn.proj_up_gate_z.weight": [
      "ffn.proj_up_gate.weight",
      "ffn.proj_up.weight",
    ],
  }.items():
    np.testing.assert_array_equal(
      fused.value(params, block + name), stacked(*parts)
    )


@pytest.mark.parametrize(
  "name",
  golden.cases(
    having=lambda case: (case.folder / "weights_fused.safetensors").exists()
  ),
)
def test_fused_goldens_are_the_single_ones(name):
  definition, _, params = golden.converted(name, "float32")
  form = large.tensor_format(embedding="embedding.weight", weight_mode="fused")
  names = NameMap(form, definition.cfg, definition.abstract())
  path = golden.folder_of(name) / "weights_fused.safetensors"
  fused = names.load(load_file(path).__getitem__)
  jax.tree.map(np.testing.assert_array_equal, fused, params)


def test_both_slstm_layouts_give_the_same_parameters():
  cfg = ModelConfig(vocab_size=8, width=16, num_blocks=2, slstm_at=(0, 1))
  vanilla = name_map(cfg, paper.tensor_format(slstm_layout="vanilla"))
  cuda = name_map(cfg, paper.tensor_format(slstm_layout="cuda"))
  tensors = numbered(vanilla)
  rearranged = dict(tensors)
  for name, value in tensors.items():
    H, D = cfg.slstm.num_heads, 16 // cfg.slstm.num_heads
    if name.endswith("_recurrent_kernel_"):
      out_in = value.reshape(H, 4, D, D)
      rearranged[name] = out_in.transpose(0, 3, 1, 2).reshape(H, D, 4 * D)
    if name.endswith("_bias_"):
      rearranged[name] = value.reshape(4, H, D).transpose(1, 0, 2).ravel()
  jax.tree.map(
    np.testing.assert_array_equal,
    cuda.load(rearranged.__getitem__),
    vanilla.load(tensors.__getitem__),
  )


def canonical_tensors(case: golden.Model) -> dict[str, np.ndarray]:
  """The goldens' own rendering of the sLSTM weights."""
  path = case.folder / "weights.safetensors"
  if not path.exists():
    return {}
  return {
    key.removeprefix("canonical/"): value
    for key, value in load_file(path).items()
    if key.startswith("canonical/")
  }


@pytest.mark.parametrize("name", golden.cases(having=canonical_tensors))
def test_slstm_weights_equal_the_goldens_canonical_rendering(name):
  canonical = canonical_tensors(golden.model(name))
  _, names, params = golden.converted(name, "float32")
  for key, value in canonical.items():
    cell = key.rpartition(".")[0]
    ours = "_bias_" if key.endswith(".bias") else "_recurrent_kernel_"
    (piece,) = names.pieces[f"{cell}.{ours}"]
    leaf = params
    for part in piece.path:
      leaf = leaf[part]
    np.testing.assert_array_equal(leaf[piece.at], value)


@pytest.mark.parametrize(
  "axes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1)]
)
def test_shards_are_placed_as_the_mesh_wants_them(tmp_path, axes):
  definition = Definition(SMALL)
  names = name_map(SMALL, large.tensor_format(weight_mode="single"))
  files = stored(numbered(names), tmp_path)
  mesh = sharding.make_mesh(sharding.MeshConfig(*axes))
  placed = sharding.shardings(mesh, definition.axes(), definition.abstract())
  params = names.load(lambda name: files[name].map(), placed)
  assert jax.tree.map(lambda x: x.sharding, params) == placed
  whole = names.load(lambda name: files[name].map())
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  for key, file in files.items():
    np.testing.assert_array_equal(names.value(params, key), file.map())


def test_import_holds_the_parameters_and_no_more(tmp_path):
  definition = Definition(MIDDLING)
  names = name_map(MIDDLING, large.tensor_format(weight_mode="fused"))
  files = stored(numbered(names), tmp_path)
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 8, 1, 1))
  placed = sharding.shardings(mesh, definition.axes(), definition.abstract())
  largest = max(file.spec.nbytes for file in files.values())
  total = sum(file.spec.nbytes for file in files.values())
  peak = peak_memory(lambda: names.load(lambda name: files[name].map(), placed))
  # CPU devices take the shards over as they are, so that those count here.
  assert total < peak < total + largest / 4


def test_export_holds_one_tensor(tmp_path):
  names = name_map(MIDDLING, large.tensor_format(weight_mode="single"))
  params = names.load(numbered(names).__getitem__)
  specs = names.specs(np.dtype(np.float32))
  peak = peak_memory(
    lambda: tensor_files.write_folder(
      tmp_path,
      specs,
      lambda name: names.value(params, name),
      max_shard_bytes=10**9,
    )
  )
  largest = max(spec.nbytes for spec in specs.values())
  total = sum(spec.nbytes for spec in specs.values())
  assert largest < total / 8
  assert peak < 2 * largest


def peak_memory(run) -> int:
  """The most that NumPy and Python hold at a time while `run` runs."""
  tracemalloc.start()
  try:
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    kept = run()
    peak = tracemalloc.get_traced_memory()[1] - before
  finally:
    tracemalloc.stop()
  del kept
  return peak


def test_missing_and_unknown_tensors_are_named(tmp_path):
  names = name_map(SMALL, large.tensor_format(weight_mode="single"))
  tensors = numbered(names)
  without = {k: v for k, v in tensors.items() if not k.endswith(".q.weight")}
  with pytest.raises(UserError, match=r"lacks backbone.blocks.0.mlstm_layer.q"):
    names.check(stored(without, tmp_path))
  more = tensors | {"backbone.blocks.0.conv.weight": np.zeros(3, np.float32)}
  with pytest.raises(UserError, match=r"holds backbone.blocks.0.conv.weight"):
    names.check(stored(more, tmp_path))
  other = {k: v for k, v in more.items() if k != "lm_head.weight"}
  with pytest.raises(UserError, match=r"lacks .* unknown backbone.blocks.0.c"):
    names.check(stored(other, tmp_path))


def test_misshapen_and_too_precise_tensors_are_named(tmp_path):
  names = name_map(SMALL, large.tensor_format(weight_mode="single"))
  tensors = numbered(names)
  names.check(stored(tensors, tmp_path))
  flipped = tensors | {"lm_head.weight": tensors["lm_head.weight"].T}
  with pytest.raises(
    UserError, match=r"lm_head.weight has shape \[16, 32\]; .*\[32, 16\]"
  ):
    names.check(stored(flipped, tmp_path))
  double = tensors | {"lm_head.weight": np.zeros((32, 16))}
  with pytest.raises(UserError, match=r"lm_head.weight is float64"):
    names.check(stored(double, tmp_path))


def test_tensors_of_nothing_are_named(tmp_path):
  tiny = MLSTMLargeConfig(num_heads=4, qk_factor=1e-9)
  cfg = dataclasses.replace(SMALL, mlstm_large=tiny)
  names = name_map(cfg, large.tensor_format(weight_mode="single"))
  with pytest.raises(UserError, match=r"q.weight has shape \[0, 16\] and hold"):
    names.check(stored(numbered(names), tmp_path))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_tensors_are_widened_exactly(tmp_path, dtype):
  names = name_map(SMALL, large.tensor_format(weight_mode="single"))
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(size=names.shape(name)).astype(tensor_files.DTYPES[dtype])
    for name in names.pieces
  }
  files = stored(tensors, tmp_path)
  names.check(files)
  params = names.load(lambda name: files[name].map())
  for key, value in tensors.items():
    exported = names.value(params, key)
    assert exported.dtype == np.float32
    assert exported.astype(value.dtype).tobytes() == value.tobytes()


@pytest.mark.parametrize(
  ("cfg", "form", "parameter"),
  [
    (
      ModelConfig(vocab_size=8, width=16, num_blocks=2, slstm_at=(1,)),
      large.tensor_format(weight_mode="single"),
      "blocks",
    ),
    (
      ModelConfig(
        vocab_size=8,
        width=16,
        num_blocks=1,
        mlstm_block="large",
        mlstm_large=MLSTMLargeConfig(num_heads=2, qk_norm=True),
      ),
      large.tensor_format(weight_mode="single"),
      "k_norm",
    ),
    (
      ModelConfig(
        vocab_size=8, width=16, num_blocks=1, norm=NormConfig(bias=True)
      ),
      paper.tensor_format(),
      "norm.bias",
    ),
    (
      ModelConfig(
        vocab_size=8,
        width=16,
        num_blocks=1,
        mlstm=MLSTMConfig(round_to=8, qk_norm=True),
      ),
      paper.tensor_format(),
      "k_norm",
    ),
  ],
)
def test_a_parameter_without_a_place_is_named(cfg, form, parameter):
  with pytest.raises(UserError, match=f"no place for .*{parameter}"):
    name_map(cfg, form)
