"""Training on 8 simulated devices is training on one: every axis, and mixed.

In float64, where one device and eight differ by rounding alone, loss and
parameters agree to 1e-9: whatever a mesh did wrong would be larger. In float32
and bfloat16 the truth is the float64 run on one device; a mesh may lose no
more of it than sums in another order cost one device, within the factor that
the bound of the kernels allows.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from xlstm_jax import sharding
from xlstm_jax.cells.bound import excess
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.optim import OptimConfig
from xlstm_jax.plan.collectives import Collective, collectives
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import state as states
from xlstm_jax.train import step as steps

B, T, D, H, Z = 16, 32, 32, 8, 64
BLOCKS = 3
MODELS = {
  "paper": ModelConfig(
    vocab_size=Z,
    width=D,
    num_blocks=BLOCKS,
    mlstm=MLSTMConfig(num_heads=H, round_to=8),
  ),
  "large": ModelConfig(
    vocab_size=Z,
    width=D,
    num_blocks=BLOCKS,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=H, v_factor=2.0),
    logit_cap=30.0,
  ),
  "mixed": ModelConfig(
    vocab_size=Z,
    width=D,
    num_blocks=4,
    slstm_at=(1, 3),
    mlstm=MLSTMConfig(num_heads=H, round_to=8),
    slstm=SLSTMConfig(num_heads=H, recurrent_init="uniform"),
    tie_embeddings=True,
  ),
}
ONE = MeshConfig(data=1)


def config(
  model: str,
  mesh: MeshConfig = ONE,
  *,
  dtype: str = "float64",
  accumulation: int = 1,
  remat: str = "none",
) -> RunConfig:
  param_dtype = "float64" if dtype == "float64" else "float32"
  return RunConfig(
    model=MODELS[model],
    data=DataConfig(context=T),
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=2),
    mesh=mesh,
    compute=Compute(dtype, param_dtype, remat=remat),
    batch_size=B,
    accumulation=accumulation,
    steps=10,
    loss_chunk=16,
  )


def batch(seed: int) -> dict[str, np.ndarray]:
  """Rows of several documents, with padding of very different lengths."""
  rng = np.random.default_rng(seed)
  segments_BT = 1 + np.cumsum(rng.random((B, T)) < 0.1, axis=1, dtype=np.int32)
  for row, length in enumerate((32, 1, 0, 9, 31, 4, 17, 25)):
    segments_BT[row, length:] = 0
  tokens = rng.integers(0, Z, (2, B, T), dtype=np.int32)
  return {"inputs": tokens[0], "targets": tokens[1], "segments": segments_BT}


@dataclasses.dataclass(frozen=True)
class Trained:
  """What three steps left, in float64, and the program that did them."""

  losses: np.ndarray
  params: dict[str, np.ndarray]
  collectives: list[Collective]


@functools.cache
def initial(model: ModelConfig) -> dict:
  """Parameters to begin with, the same in every precision."""
  return jax.jit(Definition(model).init)(jax.random.key(0))


@functools.cache
def trained(cfg: RunConfig) -> Trained:
  """Three steps on as many devices as the mesh has."""
  definition = Definition(cfg.model, cfg.compute)
  sizes = dataclasses.astuple(cfg.mesh)
  with jax.enable_x64(cfg.compute.param_dtype == "float64"):
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[: math.prod(sizes)])
    params = jax.tree.map(
      lambda x: np.asarray(x, cfg.compute.param_dtype), initial(cfg.model)
    )
    places = states.shardings(definition, mesh)
    state = jax.device_put(states.start(params), places)
    with jax.set_mesh(mesh):
      step = (
        steps.compiled(definition, cfg, mesh)
        .lower(
          states.abstract(definition, mesh), steps.abstract_batch(cfg, mesh)
        )
        .compile(
          compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
          }
        )
      )
      losses = []
      for seed in range(3):
        on_mesh = jax.device_put(batch(seed), sharding.batch_sharding(mesh))
        state, metrics = step(state, on_mesh)
        losses.append(float(metrics["loss"]))
  leaves, _ = jax.tree.flatten_with_path(state.params)
  return Trained(
    np.array(losses),
    {jax.tree_util.keystr(p): np.asarray(x, np.float64) for p, x in leaves},
    collectives(step.as_text()),
  )


def assert_same(cfg: RunConfig) -> None:
  """Loss and every parameter in float64; 1e-13 is what rounding did."""
  one = trained(plain(cfg))
  eight = trained(cfg)
  np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-13)
  for name, value in one.params.items():
    np.testing.assert_allclose(
      eight.params[name], value, rtol=0, atol=1e-11, err_msg=name
    )


def plain(cfg: RunConfig, dtype: str = "float64") -> RunConfig:
  """The same training on one device, without any trick."""
  model = next(name for name, model in MODELS.items() if model == cfg.model)
  return config(model, dtype=dtype)


def assert_near(cfg: RunConfig) -> None:
  """Loss and every parameter in less than float64."""
  truth = trained(plain(cfg))
  one = trained(plain(cfg, cfg.compute.dtype))
  eight = trained(cfg)
  assert excess(eight.losses, one.losses, truth.losses) <= 1
  for name, value in truth.params.items():
    share = excess(eight.params[name], one.params[name], value)
    assert share <= 1, (name, share)


def check_collectives(cfg: RunConfig, found: list[Collective]) -> None:
  """Gathered are weights, the small gates and ids: never a cell's tokens."""
  mesh = cfg.mesh
  rows = B // cfg.accumulation // (mesh.data * mesh.fsdp)
  gates = (rows, T // mesh.sequence, 2, H)
  weights = whole_weights(Definition(cfg.model, cfg.compute), mesh)
  gathered = weights | {dims(gates)}
  for collective in found:
    if collective.kind == "all-gather":
      for dtype, shape in collective.arrays:
        assert dtype == "s32" or dims(shape) in gathered, collective
  if mesh.fsdp == 1:
    kinds = {c.kind for c in found if c.kind not in ("all-reduce",)}
    allowed = {"collective-permute"} if mesh.sequence > 1 else set()
    if mesh.tensor > 1:
      allowed.add("all-gather")
    integers = [c for c in found if {a[0] for a in c.arrays} == {"s32"}]
    assert kinds - allowed <= {c.kind for c in integers}
  if mesh.sequence > 1 and cfg.compute.remat == "none":
    permuted = [c for c in found if c.kind == "collective-permute"]
    floats = sum(c.times for c in permuted if c.arrays[0][0] != "s32")
    assert floats == cfg.accumulation * BLOCKS * 2 * messages(cfg)


def messages(cfg: RunConfig) -> int:
  """Arrays that a block passes on along the sequence, forward."""
  devices = cfg.mesh.sequence
  exchanges = 1 + math.ceil(math.log2(devices - 1)) if devices > 2 else 1
  # An update is its decay, C, n and m; the convolution passes its inputs.
  return 4 * exchanges + (cfg.model.mlstm_block == "paper")


def whole_weights(definition: Definition, mesh: MeshConfig) -> set:
  """The sizes of all weights as a device that gathers them over fsdp has."""

  def sizes(names, x):
    split = [
      size // mesh.tensor
      if "tensor" in sharding.PARAMETERS.get(name, ())
      and not size % mesh.tensor
      else size
      for name, size in zip(names, x.shape, strict=True)
    ]
    return {dims(split), dims(split[1:])}

  found = jax.tree.map(
    sizes,
    definition.axes(),
    definition.abstract(),
    is_leaf=lambda node: isinstance(node, tuple),
  )
  return set().union(
    *jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, set))
  )


def dims(shape) -> tuple[int, ...]:
  """Sizes in any order, as compilers transpose and reshape by 1."""
  return tuple(sorted(size for size in shape if size > 1))


@pytest.mark.parametrize(
  ("model", "axes", "more"),
  [
    ("paper", (1, 2, 2, 2), {"accumulation": 2, "remat": "block"}),
    *(
      pytest.param(model, axes, more, marks=pytest.mark.slow)
      for model, axes, more in [
        ("paper", (8, 1, 1, 1), {}),
        ("paper", (1, 8, 1, 1), {"remat": "matmuls"}),
        ("paper", (1, 1, 8, 1), {}),
        ("paper", (1, 1, 1, 8), {"accumulation": 4}),
        ("large", (1, 1, 4, 2), {}),
        ("large", (2, 2, 1, 2), {"accumulation": 2, "remat": "block"}),
        ("mixed", (2, 2, 2, 1), {"accumulation": 2, "remat": "block"}),
      ]
    ),
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(model, axes, more):
  cfg = config(model, MeshConfig(*axes), **more)
  assert_same(cfg)
  if model != "mixed":
    check_collectives(cfg, trained(cfg).collectives)


@pytest.mark.parametrize(
  ("dtype", "model", "axes", "more"),
  [
    pytest.param(dtype, model, axes, more, marks=pytest.mark.slow)
    for dtype in ("float32", "bfloat16")
    for model, axes, more in [
      ("paper", (2, 1, 2, 2), {"accumulation": 2}),
      ("large", (1, 4, 1, 2), {"remat": "block"}),
    ]
  ],
  ids=str,
)
def test_a_mesh_loses_no_more_than_one_device(dtype, model, axes, more):
  assert_near(config(model, MeshConfig(*axes), dtype=dtype, **more))
