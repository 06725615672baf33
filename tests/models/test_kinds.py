"""A kind of block is one row: a toy that lives here is built like the others.

`MovingAverage` and its configuration are what a file in `mixers/` holds, and
`toys` adds what `models/kinds.py` would: a field of `Mixers` and a row.
"""

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from data.small_datasets import write_dataset
from flax import nnx
from tools.trajectory import trajectory

from xlstm_jax import config
from xlstm_jax.cells import lstm, mlstm, slstm
from xlstm_jax.cells.documents import documents
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.layers import initializers
from xlstm_jax.layers.compute import Compute
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.initializers import Depth
from xlstm_jax.layers.linear import Linear
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models import counts, kinds
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.kinds import KINDS, Kind, Mixers
from xlstm_jax.models.language_model import Definition
from xlstm_jax.plan import __main__ as page
from xlstm_jax.plan import program
from xlstm_jax.plan.machines import Machine
from xlstm_jax.ranges import ranged
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import loop

PACKAGE = Path(kinds.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class MovingAverageConfig:
  """A moving average of the tokens, per head.

  Attributes:
    num_heads: Heads.
    decay: What is left of the average at the next token.
  """

  num_heads: int = ranged(2, at_least=1)
  decay: float = ranged(0.5, at_least=0, below=1)


class Average(NamedTuple):
  """The average after the last token, and its document."""

  average: Any
  segment_B: Any


class MovingAverage(nnx.Module):
  """The mixer."""

  def __init__(
    self,
    cfg: MovingAverageConfig,
    width: int,
    *,
    depth: Depth,
    head_norm: NormConfig,
    dropout: float,
    compute: Compute,
    rngs: nnx.Rngs,
  ):
    del depth, head_norm, dropout
    self.cfg = cfg
    self.shape = (cfg.num_heads, width // cfg.num_heads)
    self.dtype = compute.param_dtype
    self.values = Linear(
      "BTD,DHV->BTHV",
      (width, *self.shape),
      ("width", "heads", None),
      init=initializers.small(width),
      compute=compute,
      rngs=rngs,
    )

  def empty_state(self, batch: int) -> Average:
    return Average(
      jnp.zeros((batch, *self.shape), self.dtype),
      jnp.zeros(batch, jnp.int32),
    )

  def __call__(self, x_BTD, *, segments_BT=None, state=None, dropout_key=None):
    del dropout_key
    state = state or self.empty_state(len(x_BTD))
    tokens = documents(segments_BT, state.segment_B, x_BTD.shape[1])

    def step(average, token):
      value, real, start = token
      past = jnp.where(start, 0, average)
      new = self.cfg.decay * past + value
      return jnp.where(real, new, average), new

    masks = (tokens.real_BT, tokens.start_BT)
    average, y_TBHV = jax.lax.scan(
      step,
      state.average,
      (
        jnp.moveaxis(self.values(x_BTD).astype(self.dtype), 1, 0),
        *(mask.T[..., None, None] for mask in masks),
      ),
    )
    y_BTD = jnp.moveaxis(y_TBHV, 0, 1).reshape(x_BTD.shape)
    return y_BTD.astype(x_BTD.dtype), Average(average, tokens.last_B)


ROW = Kind(
  mixer=MovingAverage,
  feedforward=lambda cfg: True,
  flops=lambda cfg, width, *, context, chunk: 2.0 * width * width,
  heads="num_heads",
  time_overlap=None,
  cell=None,
)


@dataclasses.dataclass(frozen=True)
class WithToy(ModelConfig):
  """Models when `Mixers` has a field more."""

  average: MovingAverageConfig = MovingAverageConfig()


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  monkeypatch.setitem(KINDS, "average", ROW)


def model(**changes) -> WithToy:
  small: dict[str, Any] = {
    "vocab_size": 257,
    "width": 16,
    "num_blocks": 2,
    "pattern": ("average", "mlstm"),
    "mlstm": MLSTMConfig(num_heads=2, round_to=8),
    "slstm": SLSTMConfig(num_heads=2),
    "feedforward": FeedForwardConfig(round_to=8),
  }
  return WithToy(**small | changes)


def run_config(**changes) -> RunConfig:
  return RunConfig(
    **{
      "model": model(),
      "data": DataConfig(context=16),
      "steps": 2,
      "log_every": 1,
      "compilation_cache": None,
    }
    | changes
  )


def test_it_is_built():
  cfg = model(num_blocks=4)
  assert cfg.kinds == ("average", "mlstm", "average", "mlstm")
  blocks = Definition(cfg).abstract()["blocks"]["0"]
  assert set(blocks) == {"0_average", "1_mlstm"}
  toy = blocks["0_average"]
  assert toy["mixer"]["values"]["weight"].shape == (2, 16, 2, 8)
  assert "feedforward" in toy
  assert "feedforward" not in blocks["1_mlstm"]


def test_it_is_validated():
  mesh = MeshConfig(data=-1, tensor=2)
  config.validate(run_config(mesh=mesh), None, 8)
  for average, message in (
    ({"num_heads": 0}, r"config\.model\.average\.num_heads is 0; .* least 1"),
    ({"decay": 1.0}, r"average\.decay is 1\.0; .* at least 0 and below 1"),
    (
      {"num_heads": 1},
      r"average\.num_heads is 1; mesh\.tensor=2 cannot split that evenly",
    ),
  ):
    cfg = run_config(
      model=model(average=MovingAverageConfig(**average)), mesh=mesh
    )
    with pytest.raises(UserError, match=message):
      config.validate(cfg, None, 8)
  cfg = run_config(mesh=MeshConfig(data=-1, sequence=2))
  with pytest.raises(UserError, match=r"blocks \[0\] are of kind average"):
    config.validate(cfg, None, 8)


def test_it_trains(tmp_path, capsys):
  text = [(b"some text to train on", 0)] * 9
  data = write_dataset(tmp_path / "data", text)
  cfg = run_config(
    model=model(num_blocks=1, pattern=("average",)),
    data=DataConfig(paths=(str(data),), context=16),
  )
  assert loop.train(cfg, tmp_path / "run") == 0
  assert "1 average; width 16" in capsys.readouterr().out
  losses = [r["loss"] for r in trajectory(tmp_path / "run")]
  assert 4 < losses[1] < losses[0] < 7


def test_it_decodes():
  cfg = model(vocab_size=11)
  definition = Definition(cfg, Compute(dtype="float32"))
  params = jit(definition.init)(jax.random.key(0))
  tokens_BT = np.random.default_rng(0).integers(0, 11, (2, 6), np.int32)
  segments_BT = np.array([[1] * 6, [1] * 2 + [2] * 4], np.int32)

  @jit
  def forward(params, tokens_BT, segments_BT, state):
    lm = definition.bind(params)
    x_BTD, state = lm(tokens_BT, segments_BT=segments_BT, state=state)
    return lm.logits(x_BTD), state

  whole_BTZ, _ = forward(params, tokens_BT, segments_BT, None)
  state = definition.bind(params).empty_state(2)
  for t in range(6):
    one = slice(t, t + 1)
    logits_B1Z, state = forward(
      params, tokens_BT[:, one], segments_BT[:, one], state
    )
    np.testing.assert_allclose(logits_B1Z, whole_BTZ[:, one], atol=1e-5)


def test_it_is_counted():
  cfg = model(pattern=("average",), num_blocks=3)
  D, Z, F = 16, 257, cfg.feedforward.hidden(16)
  block = D * D + 3 * D * F + 2 * D
  assert counts.parameters(cfg) == 3 * block + 2 * Z * D + D
  flops = counts.train_flops_per_token(cfg, 16)
  assert flops == 3 * (3 * (2 * D * D + 6 * D * F) + 2 * D * Z)


@pytest.mark.slow
def test_it_is_planned():
  cfg = run_config(mesh=MeshConfig(data=-1))
  found = program.plan(cfg, Machine("here", jax.devices(), 2**30, 2**30))
  assert found.parameters == counts.parameters(cfg.model)
  assert math.isfinite(found.peak_bytes)
  # The toy has no cell with kernels; the mLSTM beside it has.
  assert found.backends == {"mLSTM": "chunkwise"}
  assert "mLSTM        chunkwise" in page.describe(found)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"pattern": ("mlstm", "mean")},
      "names 'mean'; the kinds of blocks are mlstm, mlstm_large, slstm, avera",
    ),
    ({"num_blocks": 1}, "pattern has 2 blocks, but model.num_blocks is 1"),
    ({"slstm_at": (1,)}, "leave model.slstm_at and model.mlstm_block"),
    ({"mlstm_block": "large"}, "leave model.slstm_at and model.mlstm_block"),
  ],
)
def test_patterns_that_are_none_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    model(**changes)


def test_a_pattern_names_the_blocks_that_the_other_keys_can():
  by_places = model(num_blocks=4, pattern=(), slstm_at=(1, 3))
  by_pattern = model(num_blocks=4, pattern=("mlstm", "slstm"))
  assert by_pattern.kinds == by_places.kinds
  assert Definition(by_pattern).abstract() == Definition(by_places).abstract()
  # The pattern need not end with the model.
  cut = model(num_blocks=4, pattern=("mlstm", "mlstm", "slstm"))
  assert cut.kinds[-1] == "mlstm"


def test_every_row_has_its_field():
  fields = {field.name for field in dataclasses.fields(Mixers)}
  assert set(KINDS) - {"average"} == fields


def test_nothing_above_spells_kinds_or_backends():
  """Formats of other projects name the kinds that they hold."""
  backends = {
    name for cell in (mlstm, slstm, lstm) for name in cell.BACKENDS.backends
  }
  assert {"chunkwise", "recurrent", "pallas_gpu"} <= backends
  for path in PACKAGE.rglob("*.py"):
    floor = path.relative_to(PACKAGE).parts[0]
    if floor in ("cells", "mixers", "interop") or path.name == "kinds.py":
      continue
    spelt = {
      node.value
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not spelt & (set(KINDS) | backends), path
