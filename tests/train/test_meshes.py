"""Training on 8 simulated devices is training on one: every axis, and mixed.

In float64, where one device and eight differ by rounding alone, loss and
parameters agree to 1e-9: whatever a mesh did wrong would be larger. In float32
and bfloat16 the truth is the float64 run on one device; a mesh may lose twice
what one device loses and an ulp in the first parameters changes.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bound import excess

from xlstm_jax import sharding
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

# Sizes that tell arrays apart: none is another, nor its half.
B, T, D, H, Z = 16, 24, 32, 8, 80
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
  "dense": ModelConfig(
    vocab_size=Z,
    width=D,
    num_blocks=BLOCKS,
    mlstm=MLSTMConfig(num_heads=H, round_to=8, qkv_block=0),
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
    # With the usual eps, Adam makes a full step of either sign where rounding
    # alone decides that of a gradient.
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=2, eps=1e-2),
    mesh=mesh,
    compute=Compute(dtype, param_dtype, remat=remat),
    batch_size=B,
    accumulation=accumulation,
    steps=10,
    loss_chunk=12,
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


@functools.lru_cache(maxsize=2)
def program(cfg: RunConfig):
  """The compiled step, and the mesh that it is for; few, for memory maps."""
  definition = Definition(cfg.model, cfg.compute)
  sizes = dataclasses.astuple(cfg.mesh)
  mesh = sharding.make_mesh(cfg.mesh, jax.devices()[: math.prod(sizes)])
  with jax.set_mesh(mesh):
    lowered = steps.compiled(definition, cfg, mesh).lower(
      states.abstract(definition, mesh, cfg.optim),
      steps.abstract_batch(cfg, mesh),
    )
    step = lowered.compile(
      compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
      }
    )
  return step, mesh


@functools.cache
def trained(cfg: RunConfig, moved: float = 0.0) -> Trained:
  """Three steps on as many devices as the mesh has.

  Args:
    cfg: the run.
    moved: by which share of themselves parameters are moved before, up or down.
  """
  rng = np.random.default_rng(7)

  def first(x):
    x = np.asarray(x, cfg.compute.param_dtype)
    return x * (1 + moved * rng.choice([-1, 1], x.shape)).astype(x.dtype)

  with jax.enable_x64(cfg.compute.param_dtype == "float64"):
    step, mesh = program(cfg)
    params = jax.tree.map(first, initial(cfg.model))
    places = states.shardings(
      Definition(cfg.model, cfg.compute), mesh, cfg.optim
    )
    state = jax.device_put(states.start(params, cfg.optim), places)
    with jax.set_mesh(mesh):
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
  ulp = float(jnp.finfo(cfg.compute.dtype).eps)
  moved = trained(plain(cfg), ulp)
  eight = trained(cfg)
  share = excess(eight.losses, one.losses, truth.losses, moved=[moved.losses])
  assert share <= 1
  for name, value in truth.params.items():
    share = excess(
      eight.params[name], one.params[name], value, moved=[moved.params[name]]
    )
    assert share <= 1, (name, share)


def check_collectives(cfg: RunConfig, found: list[Collective]) -> None:
  """What is exchanged, and how often: never the tokens of a cell.

  Ids and masks are small integers, which the compiler may move as it likes.
  """
  mesh, parts = cfg.mesh, cfg.accumulation
  rows = B // parts // (mesh.data * mesh.fsdp)
  tokens = (rows, T // mesh.sequence)
  passes = 2 + (cfg.compute.remat != "none")
  blocks = cfg.model.num_blocks
  definition = Definition(cfg.model, cfg.compute)
  weights = weight_sizes(definition, mesh, ["tensor"])
  shares = weight_sizes(definition, mesh, ["tensor", "fsdp"])
  shares += merged_sizes(definition, mesh)
  times = collections.defaultdict(collections.Counter)
  for one in found:
    for size in {dims(shape) for dtype, shape in one.arrays if dtype != "s32"}:
      times[one.kind][size] += one.times

  # Weights, once in every pass; where heads are split also their gates, what
  # leaves an sLSTM, and what dense maps to keys and values read.
  whole = {dims((*tokens, 2, H)), dims((blocks, *tokens, 2, H))}
  if cfg.model.slstm_at:
    whole |= {dims((*tokens, H, D // H)), dims((*tokens, D))}
  if cfg.model.mlstm.qkv_block == 0:
    whole.add(dims((*tokens, cfg.model.mlstm.inner(D))))
  for size, count in times.pop("all-gather", {}).items():
    if size in weights:
      assert mesh.fsdp * mesh.tensor > 1, size
      assert count <= parts * passes * weights[size], (size, count)
    else:
      assert mesh.tensor > 1, size
      assert size in whole, size
      assert count <= parts * passes * 3 * blocks, (size, count)

  # Looked-up embeddings exchange rows for columns, and so do their gradients.
  exchanged = times.pop("all-to-all", collections.Counter())
  assert exchanged.total() == (2 * parts if mesh.fsdp > 1 else 0)

  # Gradients, losses and norms; where heads are split also what their shares
  # add up to: channels after every projection, forward and backward.
  summed = whole | {
    dims((*tokens, D)),
    dims((rows * mesh.fsdp, tokens[1], D // mesh.fsdp)),  # looked up
    *(dims((rows, n)) for n in (tokens[1], cfg.loss_chunk)),
  }
  over = sum(n > 1 for n in (mesh.data, mesh.fsdp, mesh.sequence))
  for size, count in times.pop("all-reduce").items():
    if not size:
      continue
    if size in weights or size in shares:
      most = max(weights[size], shares[size])
      assert count <= parts * max(over, 1) * most, (size, count)
    else:
      assert mesh.tensor > 1, size
      assert size in summed, size
      assert count <= parts * passes * (2 * blocks + 4), (size, count)

  permuted = times.pop("collective-permute", collections.Counter())
  if mesh.sequence == 1:
    assert not permuted
  elif cfg.compute.remat == "none":
    assert permuted.total() == parts * blocks * 2 * messages(cfg)
  assert not times


def messages(cfg: RunConfig) -> int:
  """Arrays that a block passes on along the sequence, forward."""
  devices = cfg.mesh.sequence
  exchanges = 1 + math.ceil(math.log2(devices - 1)) if devices > 2 else 1
  # An update is its decay, C, n and m; the convolution passes its inputs.
  return 4 * exchanges + (cfg.model.mlstm_block == "paper")


def merged_sizes(
  definition: Definition, mesh: MeshConfig
) -> collections.Counter:
  """How many gradients of small blocks have what sizes, merged in one map."""
  cfg = definition.cfg
  if cfg.mlstm_block != "paper" or not cfg.mlstm.qkv_block:
    return collections.Counter()
  size = cfg.mlstm.qkv_block
  own = cfg.mlstm.inner(cfg.width) // size // mesh.tensor
  merged = max(m for m in range(1, 64 // size + 1) if own % m == 0)
  maps = 3 * cfg.kinds.count("mlstm")
  return collections.Counter(
    {dims((own // merged, merged, size, merged, size)): maps}
  )


def weight_sizes(
  definition: Definition, mesh: MeshConfig, axes: Sequence[str]
) -> collections.Counter:
  """How many weights have what sizes on a device, split over mesh axes only.

  Blocks are counted one by one, and those of a run also as the stack they are.
  """
  found = collections.Counter()

  def count(path, names, x):
    over = [sharding.PARAMETERS.get(name, ()) for name in names]
    parts = [
      math.prod(getattr(mesh, axis) for axis in of_size if axis in axes)
      for of_size in over
    ]
    split = [
      size if size % n else size // n
      for size, n in zip(x.shape, parts, strict=True)
    ]
    if path[0].key == "blocks":
      found[dims(split[1:])] += split[0]
    if path[0].key != "blocks" or split[0] > 1:
      found[dims(split)] += 1

  jax.tree_util.tree_map_with_path(
    count,
    definition.axes(),
    definition.abstract(),
    is_leaf=lambda node: isinstance(node, tuple),
  )
  return found


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
        ("mixed", (1, 8, 1, 1), {}),
        ("dense", (1, 2, 4, 1), {"remat": "matmuls"}),
      ]
    ),
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(model, axes, more):
  cfg = config(model, MeshConfig(*axes), **more)
  assert_same(cfg)
  check_collectives(cfg, trained(cfg).collectives)


@pytest.mark.parametrize(
  ("dtype", "model", "axes", "more"),
  [
    pytest.param(dtype, model, axes, more, marks=pytest.mark.slow)
    for dtype in ("float32", "bfloat16")
    for model, axes, more in [
      ("paper", (2, 1, 2, 2), {"accumulation": 2}),
      ("large", (1, 4, 1, 2), {"remat": "block"}),
      ("mixed", (1, 8, 1, 1), {}),
      ("large", (1, 1, 8, 1), {}),
      ("paper", (1, 1, 1, 8), {}),
    ]
  ],
  ids=str,
)
def test_a_mesh_loses_no_more_than_one_device(dtype, model, axes, more):
  cfg = config(model, MeshConfig(*axes), dtype=dtype, **more)
  assert_near(cfg)
  check_collectives(cfg, trained(cfg).collectives)
