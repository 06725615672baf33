"""What does not change the model, and how it starts."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit

from xlstm_jax import sharding
from xlstm_jax.interop import large, paper
from xlstm_jax.interop.names import NameMap
from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition

CFG = ModelConfig(
  vocab_size=16,
  width=16,
  num_blocks=4,
  slstm_at=(1, 3),
  mlstm=MLSTMConfig(num_heads=2, round_to=8),
  slstm=SLSTMConfig(num_heads=2),
)
LARGE = ModelConfig(
  vocab_size=16,
  width=16,
  num_blocks=3,
  mlstm_block="large",
  mlstm_large=MLSTMLargeConfig(num_heads=2),
)
CONFIGS = {"paper": CFG, "large": LARGE}
FP64 = Compute("float64", "float64")
TOKENS_BT = np.random.default_rng(0).integers(0, 16, (8, 8), np.int32)
SEGMENTS_BT = np.array(
  [
    [1] * 8,
    [1] * 3 + [2] * 5,
    [1, 2, 2, 2, 3, 3, 0, 0],
    [1] * 7 + [0],
    [0] * 8,
    [1] + [2] * 7,
    [1] * 4 + [2] * 4,
    [1, 2, 3, 4, 5, 6, 7, 8],
  ],
  np.int32,
)


def random_params(definition: Definition):
  rng = np.random.default_rng(1)

  def draw(x):
    fan_in = max(4, x.size // x.shape[-1])
    return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5, x.dtype)

  return jax.tree.map(draw, definition.abstract())


def loss_of(definition: Definition):
  """Loss and gradients of all tokens."""

  def loss(params, tokens_BT, segments_BT):
    lm = definition.bind(params)
    x_BTD, _ = lm(tokens_BT, segments_BT=segments_BT)
    picked = jax.nn.log_softmax(lm.logits(x_BTD))[..., 0]
    return -(picked * (segments_BT > 0)).sum()

  return jax.value_and_grad(loss)


@functools.cache
def plain(name: str = "paper"):
  """Parameters, and their loss and gradients without any device or trick."""
  definition = Definition(CONFIGS[name], dataclasses.replace(FP64, scan=False))
  params = random_params(definition)
  return params, jit(loss_of(definition))(params, TOKENS_BT, SEGMENTS_BT)


def assert_close(ours, theirs, bound: float):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=bound),
    ours,
    theirs,
  )


SCANNED = {"scan": True}
REMAT = {"scan": True, "remat": "block"}
MATMULS = {"scan": True, "remat": "matmuls"}
UNROLLED = {"scan": False, "remat": "block"}


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("paper", SCANNED),
    ("paper", REMAT),
    ("large", REMAT),
    pytest.param("paper", MATMULS, marks=pytest.mark.slow),
    pytest.param("paper", UNROLLED, marks=pytest.mark.slow),
    pytest.param("large", SCANNED, marks=pytest.mark.slow),
    pytest.param("large", MATMULS, marks=pytest.mark.slow),
    pytest.param("large", UNROLLED, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_scan_and_remat_change_nothing(name, changes):
  with jax.enable_x64(True):
    params, expected = plain(name)
    definition = Definition(CONFIGS[name], dataclasses.replace(FP64, **changes))
    ours = jit(loss_of(definition))(params, TOKENS_BT, SEGMENTS_BT)
  assert_close(ours, expected, 1e-11)


def backwards(monkeypatch):
  """The scan runs blocks from the last to the first."""

  def scan(step, first, scanned, *, scan=jax.lax.scan, **options):
    if step.__name__ == "repetition":
      options["reverse"] = True
    return scan(step, first, scanned, **options)

  monkeypatch.setattr(jax.lax, "scan", scan)


def cuts_the_gradient(monkeypatch):
  """What is computed again has no gradient with respect to its input."""

  def checkpoint(step, **_):
    return lambda x, *args: step(jax.lax.stop_gradient(x), *args)

  monkeypatch.setattr(jax, "checkpoint", checkpoint)


@pytest.mark.parametrize(
  ("mutation", "changes"), [(backwards, SCANNED), (cuts_the_gradient, REMAT)]
)
def test_mutations_are_caught(mutation, changes, monkeypatch):
  with jax.enable_x64(True):
    plain("large")  # is kept from before the mutation
  mutation(monkeypatch)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    test_scan_and_remat_change_nothing("large", changes)


@pytest.mark.parametrize(
  "axes",
  [
    (2, 2, 2, 1),
    pytest.param((1, 2, 2, 2), marks=pytest.mark.slow),
    pytest.param((1, 8, 1, 1), marks=pytest.mark.slow),
  ],
)
def test_eight_devices_compute_what_one_does(axes):
  definition = Definition(CFG, FP64)
  mesh = sharding.make_mesh(sharding.MeshConfig(*axes))
  with jax.enable_x64(True):
    params, expected = plain()
    places = sharding.shardings(mesh, definition.axes(), definition.abstract())
    sharded = jax.device_put(params, places)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(sharded))
    batch = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
      ours = jit(loss_of(definition))(
        sharded,
        jax.device_put(TOKENS_BT, batch),
        jax.device_put(SEGMENTS_BT, batch),
      )
  assert_close(jax.tree.map(np.asarray, ours), expected, 1e-11)


def paths(tree) -> set[str]:
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
  }


def test_the_parameter_tree_is_that_of_the_blocks():
  """Checkpoints hold these names: they may not depend on how we compute."""
  trees = [
    Definition(CFG, Compute(scan=scan, remat=remat)).abstract()
    for scan in (True, False)
    for remat in ("none", "matmuls", "block")
  ]
  assert all(tree == trees[0] for tree in trees)
  mlstm = {
    "norm/scale",
    "mixer/up/weight",
    "mixer/conv/weight",
    "mixer/conv/bias",
    "mixer/q/map/weight",
    "mixer/k/map/weight",
    "mixer/v/map/weight",
    "mixer/gates/map/weight",
    "mixer/gates/bias",
    "mixer/head_norm/scale",
    "mixer/skip",
    "mixer/down/weight",
  }
  slstm = {
    "norm/scale",
    "mixer/conv/weight",
    "mixer/conv/bias",
    "mixer/gates/weight",
    "mixer/recurrent",
    "mixer/bias",
    "mixer/head_norm/scale",
    "feedforward_norm/scale",
    "feedforward/up/weight",
    "feedforward/down/weight",
  }
  assert paths(trees[0]) == {
    "embedding/weight",
    "norm/scale",
    "head/weight",
    *(f"blocks/0/0_mlstm/{name}" for name in mlstm),
    *(f"blocks/0/1_slstm/{name}" for name in slstm),
  }


def test_initial_parameters_do_not_depend_on_mesh_or_compute():
  definition = Definition(CFG)
  expected = jax.jit(definition.init)(jax.random.key(0))
  unrolled = Definition(CFG, Compute("float32", scan=False, remat="block"))
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2, 1))
  places = sharding.shardings(mesh, definition.axes(), definition.abstract())
  with jax.set_mesh(mesh):
    ours = jax.jit(unrolled.init, out_shardings=places)(jax.random.key(0))
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(ours))
  jax.tree.map(np.testing.assert_array_equal, ours, expected)
  other = jax.jit(definition.init)(jax.random.key(1))
  assert (other["embedding"]["weight"] != expected["embedding"]["weight"]).any()


def initial_tensors(cfg: ModelConfig, form) -> dict[str, np.ndarray]:
  """Freshly drawn parameters under the reference's names."""
  definition = Definition(cfg)
  names = NameMap(form, cfg, definition.abstract())
  params = jit(definition.init)(jax.random.key(0))
  return {name: names.value(params, name) for name in names.pieces}


def assert_drawn(x: np.ndarray, mean: float, std: float, name: str):
  """Within six standard errors; exact where nothing is drawn."""
  if std == 0 or x.std() == 0:
    assert x.std() == pytest.approx(std, abs=1e-7), name
    assert x.mean() == pytest.approx(mean, abs=1e-6), name
    return
  error = 6 / np.sqrt(x.size)
  assert abs(x.mean() - mean) < error * std, name
  assert abs(x.std() / std - 1) < error, name


@pytest.mark.parametrize("name", golden.cases("paper"))
def test_paper_models_start_as_the_repositorys_do(name):
  """Mean and deviation of every tensor of a fresh upstream model."""
  meta = golden.model(name).meta
  cfg = paper.model_config(meta["config"])
  drawn = initial_tensors(cfg, paper.tensor_format())
  assert drawn.keys() == meta["init_stats"].keys()
  for tensor, (mean, std) in meta["init_stats"].items():
    x = drawn[tensor]
    # Both are draws, so that their errors add up.
    error = 6 * np.sqrt(2 / x.size) * max(std, x.std())
    assert abs(x.mean() - mean) < error + 1e-6, tensor
    assert abs(x.std(ddof=1) - std) < error + 1e-6, tensor


def test_7b_models_start_as_published():
  cfg = ModelConfig(
    vocab_size=512,
    width=256,
    num_blocks=2,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=4),
    norm=NormConfig("rms", 1e-6, "direct"),
    head_norm=NormConfig("layer", 1e-6, "direct"),
  )
  small = (2 / (5 * 256)) ** 0.5
  wang = 2 / (2 * 256**0.5)
  published = {
    "embeddings.weight": (0, small),
    "lm_head.weight": (0, small),
    "layer.q.weight": (0, small),
    "layer.k.weight": (0, small),
    "layer.v.weight": (0, small),
    "proj_up.weight": (0, small),
    "proj_up_gate.weight": (0, small),
    "out_proj.weight": (0, wang),
    "proj_down.weight": (0, wang),
    "ogate_preact.weight": (0, 0),
    "igate_preact.weight": (0, 0),
    "fgate_preact.weight": (0, 0),
    "igate_preact.bias": (-10, 0),
    "norm.weight": (1, 0),
    "norm_mlstm.weight": (1, 0),
    "norm_ffn.weight": (1, 0),
  }
  drawn = initial_tensors(cfg, large.tensor_format(weight_mode="single"))
  for name, x in drawn.items():
    if name.endswith("fgate_preact.bias"):
      np.testing.assert_allclose(x, np.linspace(3, 6, 4), rtol=1e-6)
      continue
    (expected,) = (v for k, v in published.items() if name.endswith(k))
    assert_drawn(x, *expected, name)


def test_slstm_biases_follow_the_power_law_of_depth():
  cfg = dataclasses.replace(
    CFG, slstm=SLSTMConfig(num_heads=2, recurrent_init="uniform")
  )
  drawn = initial_tensors(cfg, paper.tensor_format())
  for index in (1, 3):
    block = f"xlstm_block_stack.blocks.{index}.xlstm.slstm_cell."
    bias_GHD = drawn[block + "_bias_"].reshape(4, 2, 8)
    units = np.arange(8) / 7
    forget = 5 - 12 * units ** (0.3 + 1.3 * index / 3)
    np.testing.assert_allclose(bias_GHD[1], [forget, forget], atol=1e-5)
    assert (bias_GHD[[0, 2, 3]] == 0).all()
    recurrent = drawn[block + "_recurrent_kernel_"]
    assert np.abs(recurrent).max() <= 16**-0.5
    assert_drawn(recurrent, 0, (16 * 3) ** -0.5, block)
