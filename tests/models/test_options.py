"""Options in combinations that no golden has, against NumPy's equations."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from compiled import jit

from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers import memory
from xlstm_jax.models.config import ModelConfig, stacks
from xlstm_jax.models.language_model import Definition

FP64 = Compute("float64", "float64", mlstm_backend="recurrent")
NORM = {
  "kind": ("layer", "rms"),
  "eps": (1e-5, 1e-2),
  "scale": ("offset", "direct", "none"),
  "bias": (False, True),
}
MEMORY = {
  "num_heads": (1, 2, 4),
  "gate_cap": (None, 1.5),
  "input_gate": ("exp", "sigmoid"),
  "normalize": (True, False),
  "qk_norm": (False, True),
  "eps": (1e-6, 1e-2),
  "bias": (False, True),
}
# Every field that changes the function, and values of it.
OPTIONS = {
  "": {
    "width": (16, 24),
    "num_blocks": (3,),
    "vocab_size": (11,),
    "mlstm_block": ("paper", "large"),
    "slstm_at": ((), (1,), (0, 2)),
    "pattern": ((),),
    "out_norm": (True, False),
    "out_norm_bias": (True, False),
    "post_norm": (False, True),
    "tie_embeddings": (False, True),
    "logit_cap": (None, 0.7),
  },
  "norm": NORM,
  "head_norm": NORM,
  "mlstm": MEMORY
  | {
    "factor": (2.0, 1.3),
    "round_to": (8,),
    "conv_window": (0, 1, 4),
    "qkv_block": (0, 1, 4),
    "gate_input": ("qkv", "conv", "up"),
    "gate_headwise": (False, True),
  },
  "mlstm_large": MEMORY | {"qk_factor": (0.5, 1.0), "v_factor": (1.0, 0.5)},
  "slstm": {
    "cell": ("slstm", "lstm"),
    "num_heads": (1, 2, 4),
    "conv_window": (0, 1, 4),
    "head_norm_scale": (True, False),
    "feedforward": (True, False),
  },
  "feedforward": {
    "factor": (1.3, 2.67),
    "round_to": (1, 8),
    "rounding": ("ceil", "floor"),
    "activation": (
      *("gelu", "gelu_tanh", "silu", "relu", "squared_relu"),
      *("sigmoid", "selu"),
    ),
    "bias": (False, True),
  },
}
# They decide how parameters start, or what training drops.
WITHOUT_EFFECT = {
  "": {"dropout", "embedding_dropout"},
  "mlstm": {"input_gate_bias"},
  "mlstm_large": {"input_gate_bias"},
  "slstm": {"recurrent_init", "bias_init"},
  "feedforward": {"dropout"},
}
SEEDS = range(24)


def configuration(seed: int) -> ModelConfig:
  """A model whose options are drawn at random."""
  rng = np.random.default_rng(seed)
  cfg = ModelConfig()
  for section, fields in OPTIONS.items():
    drawn = {
      name: values[rng.integers(len(values))] for name, values in fields.items()
    }
    if section:
      part = dataclasses.replace(getattr(cfg, section), **drawn)
      drawn = {section: part}
    cfg = dataclasses.replace(cfg, **drawn)
  return cfg


def blocks(params, cfg: ModelConfig) -> list:
  """The parameters of every block, first to last."""
  found = {}
  for stack in stacks(cfg.kinds):
    places = params["blocks"][str(stack.start)]
    for g in range(stack.repeats):
      for at, kind in enumerate(stack.unit):
        stacked = places[f"{at}_{kind}"]
        index = stack.start + g * len(stack.unit) + at
        found[index] = jax.tree.map(lambda x, g=g: x[g], stacked)
  return [found[index] for index in range(cfg.num_blocks)]


@pytest.mark.parametrize(
  "seed",
  [
    pytest.param(seed, marks=[] if seed < 6 else [pytest.mark.slow])
    for seed in SEEDS
  ],
)
def test_options_in_combination(seed):
  cfg = configuration(seed)
  definition = Definition(cfg, FP64)
  rng = np.random.default_rng(seed)

  def draw(x):
    fan_in = max(4, x.size // x.shape[-1])
    return rng.normal(size=x.shape) / fan_in**0.5

  @jit
  def forward(params, ids_BT):
    lm = definition.bind(params)
    return lm.logits(lm(ids_BT)[0])

  ids_BT = rng.integers(0, cfg.vocab_size, (2, 7), np.int32)
  with jax.enable_x64(True):
    params = jax.tree.map(draw, definition.abstract())
    ours = forward(params, ids_BT)
  theirs = oracle.model_logits(params, blocks(params, cfg), cfg, ids_BT)
  np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", ["normalize", "eps"])
def test_an_option_without_effect_is_noticed(option, monkeypatch):
  """The cell ignores it, whatever the configuration says."""
  default = getattr(ModelConfig().mlstm, option)

  def ignores(seed):
    cfg = configuration(seed)
    mixers = [mixer for _, mixer in cfg.kinds_used.values()]
    return any(getattr(mixer, option, default) != default for mixer in mixers)

  def cell(*args, run=memory.mlstm.mlstm, **options):
    return run(*args, **options | {option: default})

  monkeypatch.setattr(memory.mlstm, "mlstm", cell)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    test_options_in_combination(next(filter(ignores, SEEDS)))


def test_every_value_of_every_option_is_drawn():
  drawn = [configuration(seed) for seed in SEEDS]
  for section, fields in OPTIONS.items():
    parts = [getattr(cfg, section) if section else cfg for cfg in drawn]
    for name, values in fields.items():
      assert {getattr(part, name) for part in parts} == set(values), name
    known = set(fields) | WITHOUT_EFFECT.get(section, set()) | set(OPTIONS)
    named = {field.name for field in dataclasses.fields(parts[0])}
    assert named <= known, named - known
