"""Options that no golden has, against the NumPy rendering of upstream."""

import dataclasses

import golden
import jax
import numpy as np
import oracle
import pytest
from compiled import jit

from xlstm_jax.interop import large, paper
from xlstm_jax.interop.names import NameMap
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.language_model import Definition

FP64 = Compute(
  dtype="float64", param_dtype="float64", mlstm_backend="recurrent"
)

PAPER = {
  "vocab_size": 11,
  "embedding_dim": 16,
  "num_blocks": 2,
  "slstm_at": [1],
  "mlstm_block": {
    "mlstm": {
      "num_heads": 2,
      "conv1d_kernel_size": 4,
      "qkv_proj_blocksize": 4,
      "proj_factor": 2.0,
      "round_proj_up_to_multiple_of": 8,
    }
  },
  "slstm_block": {
    "slstm": {
      "num_heads": 2,
      "conv1d_kernel_size": 4,
      "function": "slstm",
      "group_norm_weight": True,
    },
    "feedforward": {
      "act_fn": "gelu",
      "proj_factor": 1.3,
      "round_proj_up_to_multiple_of": 8,
    },
  },
  "add_post_blocks_norm": True,
  "tie_weights": False,
  "bias": False,
  "mlstm_cell_eps": 1e-6,
}
PAPER_OPTIONS = {
  "as_is": {},
  "bias": {"bias": True, "slstm_block.feedforward.bias": True},
  "no_convolution": {
    "mlstm_block.mlstm.conv1d_kernel_size": 0,
    "slstm_block.slstm.conv1d_kernel_size": 0,
  },
  "short_convolution": {
    "mlstm_block.mlstm.conv1d_kernel_size": 1,
    "slstm_block.slstm.conv1d_kernel_size": 2,
  },
  "tied": {"tie_weights": True},
  "no_last_norm": {"add_post_blocks_norm": False},
  "wide_blocks": {"mlstm_block.mlstm.qkv_proj_blocksize": 16},
  "blocks_of_one": {"mlstm_block.mlstm.qkv_proj_blocksize": 1},
  "other_heads": {
    "mlstm_block.mlstm.num_heads": 4,
    "slstm_block.slstm.num_heads": 1,
  },
  "rounded_down": {
    "mlstm_block.mlstm.proj_factor": 1.7,
    "mlstm_block.mlstm.round_proj_up_dim_up": False,
    "slstm_block.feedforward.round_proj_up_dim_up": False,
  },
  "lstm": {"slstm_block.slstm.function": "lstm"},
  "no_head_scale": {"slstm_block.slstm.group_norm_weight": False},
  "no_feedforward": {"slstm_block.feedforward": None},
  "eps": {"mlstm_cell_eps": 1e-3},
  "slstm_only": {"mlstm_block": None, "slstm_at": [0, 1]},
  "mlstm_only": {"slstm_block": None, "slstm_at": []},
  "swish": {"slstm_block.feedforward.act_fn": "swish"},
  "relu": {"slstm_block.feedforward.act_fn": "relu"},
  "squared_relu": {"slstm_block.feedforward.act_fn": "relu^2"},
  "sigmoid": {"slstm_block.feedforward.act_fn": "sigmoid"},
  "selu": {"slstm_block.feedforward.act_fn": "selu"},
}

LARGE = {
  "vocab_size": 11,
  "embedding_dim": 24,
  "num_blocks": 2,
  "num_heads": 2,
  "qk_dim_factor": 0.5,
  "v_dim_factor": 1.0,
  "ffn_proj_factor": 2.6667,
  "ffn_round_up_to_multiple_of": 8,
  "gate_soft_cap": 15.0,
  "output_logit_soft_cap": 30.0,
  "norm_eps": 1e-6,
  "eps": 1e-6,
  "use_bias": False,
  "add_out_norm": True,
  "weight_mode": "single",
}
LARGE_OPTIONS = {
  "as_is": {},
  "bias": {"use_bias": True},
  "fused": {"weight_mode": "fused"},
  "fused_bias": {"weight_mode": "fused", "use_bias": True},
  "no_caps": {"gate_soft_cap": None, "output_logit_soft_cap": 2.0**30},
  "low_caps": {"gate_soft_cap": 2.0, "output_logit_soft_cap": 1.5},
  "no_last_norm": {"add_out_norm": False},
  "eps": {"norm_eps": 1e-3, "eps": 1e-3},
  "factors": {"qk_dim_factor": 1.0, "v_dim_factor": 0.5},
  "heads": {"num_heads": 3},
  "feedforward": {"ffn_proj_factor": 1.1, "ffn_round_up_to_multiple_of": 1},
}


QUICK = {
  "bias",
  "no_convolution",
  "tied",
  "rounded_down",
  "lstm",
  "no_head_scale",
  "no_feedforward",
  "slstm_only",
  "fused_bias",
  "no_caps",
  "no_last_norm",
  "factors",
}


def params(options: dict) -> list:
  """The options' names; the quick suite takes some."""
  return [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in options
  ]


def with_options(config: dict, changes: dict) -> dict:
  """A copy of a nested configuration with some values replaced."""
  config = {
    key: with_options(value, {}) if isinstance(value, dict) else value
    for key, value in config.items()
  }
  for path, value in changes.items():
    *sections, name = path.split(".")
    section = config
    for key in sections:
      section = section[key]
    section[name] = value
  return config


def random_weights(names: NameMap, seed: int) -> dict[str, np.ndarray]:
  """Values of an ordinary size for every tensor."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=names.shape(name))
    / max(names.shape(name)[-1], 4) ** 0.5
    for name in names.pieces
  }


def our_logits(cfg, names: NameMap, weights, ids_BT):
  definition = Definition(cfg, FP64)

  @jit
  def forward(params, ids_BT):
    lm = definition.bind(params)
    return lm.logits(lm(ids_BT)[0])

  return forward(names.load(weights.__getitem__), ids_BT)


@pytest.mark.parametrize("option", params(PAPER_OPTIONS))
def test_paper_options(option):
  config = with_options(PAPER, PAPER_OPTIONS[option])
  cfg = paper.model_config(config)
  ids_BT = np.random.default_rng(0).integers(0, 11, (2, 9), np.int32)
  with jax.enable_x64(True):
    abstract = Definition(cfg, FP64).abstract()
    names = NameMap(paper.tensor_format(), cfg, abstract)
    weights = random_weights(names, seed=1)
    ours = our_logits(cfg, names, weights, ids_BT)
  theirs = oracle.paper_logits(weights, config, ids_BT)
  np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("option", params(LARGE_OPTIONS))
def test_large_options(option):
  config = with_options(LARGE, LARGE_OPTIONS[option])
  cfg = large.model_config(config)
  form = large.tensor_format(
    embedding="embedding.weight", weight_mode=large.weight_mode(config)
  )
  ids_BT = np.random.default_rng(0).integers(0, 11, (2, 9), np.int32)
  with jax.enable_x64(True):
    names = NameMap(form, cfg, Definition(cfg, FP64).abstract())
    weights = random_weights(names, seed=1)
    ours = our_logits(cfg, names, weights, ids_BT)
  theirs = oracle.large_logits(weights, config, ids_BT)
  np.testing.assert_allclose(ours, theirs, atol=1e-11)


def test_every_option_changes_the_function():
  """Else a test above could pass without the option being read."""
  paper_plain, *paper_changed = (
    dataclasses.asdict(paper.model_config(with_options(PAPER, changes)))
    for changes in PAPER_OPTIONS.values()
  )
  assert all(cfg != paper_plain for cfg in paper_changed)
  large_plain, *large_changed = (
    (dataclasses.asdict(large.model_config(config)), large.weight_mode(config))
    for config in (
      with_options(LARGE, changes) for changes in LARGE_OPTIONS.values()
    )
  )
  assert all(cfg != large_plain for cfg in large_changed)


@pytest.mark.parametrize(
  "name", golden.cases("paper", "large", "large_docreset")
)
def test_the_oracle_agrees_with_the_goldens(name):
  case = golden.model(name)
  if case.family == "paper":
    run, theirs = oracle.paper_logits, case.io["step_logits_fp64"]
  else:
    run = oracle.large_logits
    theirs = case.io.get("logits_independent_docs_fp64", case.io["logits_fp64"])
  length = 16
  if "document_starts" in case.io:
    length = int(np.flatnonzero(case.io["document_starts"][0])[1])
  ids_BT = case.io["input_ids"][:1, :length]
  ours = run(case.weights, case.meta["config"], ids_BT)
  np.testing.assert_allclose(ours, theirs[:1, :length], atol=1e-9)
