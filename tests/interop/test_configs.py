"""Configurations of other implementations, read and written."""

import copy
import dataclasses
import itertools

import golden
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_jax.errors import UserError
from xlstm_jax.interop import large, paper
from xlstm_jax.interop.names import NameMap
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.linear import soft_cap
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models import presets
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition

SEVEN_BILLION = {"model_type": "xlstm", "num_heads": 8}
SMALL = {
  "embedding_dim": 64,
  "num_blocks": 2,
  "num_heads": 4,
  "vocab_size": 97,
}
PAPER = {
  "vocab_size": 97,
  "embedding_dim": 64,
  "num_blocks": 4,
  "mlstm_block": {"mlstm": {}},
  "slstm_block": {"slstm": {}, "feedforward": {}},
  "slstm_at": [1],
}


def test_hugging_face_defaults_are_the_7b_model():
  cfg = large.model_config(SEVEN_BILLION)
  seven_billion = presets.large("7B")
  assert cfg.feedforward.hidden(cfg.width) == 10944
  floored = dataclasses.replace(seven_billion.feedforward, rounding="floor")
  assert cfg == dataclasses.replace(
    seven_billion, feedforward=floored, out_norm_bias=False
  )


@pytest.mark.parametrize(
  ("width", "factor", "floor", "ceil"),
  [
    (96, 2.6667, 256, 320),
    (768, 2.667, 2048, 2112),
    (64, 2.6667, 192, 192),
    (128, 2.667, 384, 384),
    (4096, 2.667, 10944, 10944),
  ],
)
def test_the_two_rounding_rules(width, factor, floor, ceil):
  content = SMALL | {"embedding_dim": width, "ffn_proj_factor": factor}
  feedforward = large.model_config(content).feedforward
  assert feedforward.hidden(width) == floor
  up = dataclasses.replace(feedforward, rounding="ceil")
  assert up.hidden(width) == ceil


@given(
  st.integers(1, 5000), st.floats(0.1, 8.0), st.sampled_from([1, 8, 64, 256])
)
def test_an_exported_factor_gives_our_hidden_size(width, factor, round_to):
  ours = FeedForwardConfig(factor, round_to, "ceil", "silu")
  theirs = large.their_factor(ours, width)
  # Their rule, in floats as they compute it.
  hidden = int(((width * theirs + round_to - 1) // round_to) * round_to)
  assert hidden == ours.hidden(width)


def test_options_of_the_two_7b_formats():
  ours = large.model_config(SMALL | {"use_bias": True, "add_out_norm": False})
  assert not ours.out_norm
  assert ours.out_norm_bias
  assert ours.feedforward.factor == 2.6667
  theirs = large.model_config(
    SMALL
    | {
      "model_type": "xlstm",
      "use_bias": True,
      "add_out_norm": False,
      "tie_word_embeddings": True,
    }
  )
  assert theirs.out_norm
  assert not theirs.out_norm_bias
  assert not theirs.tie_embeddings
  assert theirs.feedforward.factor == 2.667
  assert theirs.mlstm_large.bias
  assert theirs.feedforward.bias
  assert theirs.norm.bias
  assert theirs.head_norm.bias


@pytest.mark.parametrize("none", [None, 2**30, 2.0**30, 1e20])
def test_caps_may_be_absent(none):
  content = SMALL | {"gate_soft_cap": none, "output_logit_soft_cap": none}
  cfg = large.model_config(content)
  assert cfg.mlstm_large.gate_cap is None
  assert cfg.logit_cap is None


@pytest.mark.parametrize("name", ["gate_soft_cap", "output_logit_soft_cap"])
@pytest.mark.parametrize("cap", [0.0, -1.0])
def test_caps_that_give_no_number_are_refused(name, cap):
  with pytest.raises(UserError, match=rf"{name} is {cap}; .* above 0"):
    large.model_config(SMALL | {name: cap})


def test_an_exported_model_without_caps_is_one_where_caps_are_literal():
  """Upstream computes `cap * tanh(x / cap)` with the number it is given."""
  cfg = large.model_config(
    SMALL | {"gate_soft_cap": None, "output_logit_soft_cap": None}
  )
  content = large.hugging_face_config(
    cfg, weight_mode="single", dtype="float32"
  )
  rng = np.random.default_rng(0)
  x = rng.choice([-1, 1], 10**5) * 2.0 ** rng.uniform(-60, 18, 10**5)
  x = np.float32(x)
  for name in ("gate_soft_cap", "output_logit_soft_cap"):
    assert type(content[name]) is float
    capped = oracle.soft_cap(x, np.float32(content[name]))
    np.testing.assert_array_equal(capped, x)
    ours = soft_cap(jnp.asarray(x), content[name])
    np.testing.assert_array_equal(ours, x)


@pytest.mark.parametrize(
  ("name", "kernel"),
  [
    ("chunkwise_kernel", "chunkwise--triton_xl_chunk_siging"),
    ("chunkwise_kernel", "parallel--native_siging_autograd"),
    ("sequence_kernel", "native_sequence__native_siging"),
    ("step_kernel", "triton_siging"),
  ],
)
def test_kernels_of_the_sigmoid_gated_cell_are_refused(name, kernel):
  with pytest.raises(UserError, match=f"{name} is '{kernel}'.* sigmoid input"):
    large.model_config(SMALL | {name: kernel})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"vocab_size": "97"}, "vocab_size is '97'; it must be an integer"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_heads": 4.0}, "num_heads is 4.0"),
    ({"use_bias": 1}, "use_bias is 1; it must be true or false"),
    ({"qk_dim_factor": "half"}, "qk_dim_factor is 'half'"),
    ({"weight_mode": "split"}, "weight_mode is 'split'"),
    ({"add_qk_norm": True}, "add_qk_norm is True"),
    ({"add_post_norm": True}, "add_post_norm is True"),
    ({"hidden_size": 32}, "hidden_size as 32 and embedding_dim as 64"),
    ({"num_heads": 0}, "num_heads is 0; it must be an integer, at least 1"),
    ({"num_heads": -4}, "num_heads is -4; it must be an integer, at least 1"),
    (
      {"num_heads": 10**30},
      "num_heads is 10+; it must be .* at most 2147483647",
    ),
    ({"ffn_round_up_to_multiple_of": 0}, "multiple_of is 0; it must be an int"),
    (
      {"ffn_proj_factor": 0},
      "ffn_proj_factor is 0; it must be a number, above 0",
    ),
    ({"ffn_proj_factor": 1e300}, r"factor is 1e\+300; .* at most 1000"),
    (
      {"qk_dim_factor": -0.5},
      "qk_dim_factor is -0.5; it must be a number, above 0",
    ),
    ({"v_dim_factor": 1e300}, r"v_dim_factor is 1e\+300"),
    (
      {"norm_eps": -1e-6},
      "norm_eps is -1e-06; it must be a number, at least 0",
    ),
    ({"eps": -1e-6}, "eps is -1e-06; it must be a number, at least 0"),
    ({"eps": float("nan")}, "eps is nan; it must be a number, at least 0"),
    ({"num_heads": None}, "lacks num_heads"),
    ({"embedding_dim": None}, "lacks hidden_size"),
  ],
)
def test_options_of_7b_configurations_are_checked(changes, message):
  read = large.weight_mode if "weight_mode" in changes else large.model_config
  with pytest.raises(UserError, match=message):
    read(SMALL | changes)


@pytest.mark.parametrize("size", presets.LARGE)
def test_every_named_large_model_exports_as_itself(size):
  cfg = presets.large(size)
  content = large.hugging_face_config(
    cfg, weight_mode="single", dtype="float32"
  )
  again = large.model_config(content)
  assert again.feedforward.hidden(cfg.width) == cfg.feedforward.hidden(
    cfg.width
  )
  same = dataclasses.replace(
    cfg, feedforward=again.feedforward, out_norm_bias=False
  )
  assert again == same


@given(st.data())
def test_hugging_face_configurations_survive_the_round_trip(data):
  draw = data.draw
  content = {
    "model_type": "xlstm",
    "vocab_size": draw(st.integers(1, 10**6)),
    "hidden_size": draw(st.integers(1, 10**4)),
    "num_hidden_layers": draw(st.integers(1, 100)),
    "num_heads": draw(st.integers(1, 64)),
    "qk_dim_factor": draw(st.floats(0.1, 2)),
    "v_dim_factor": draw(st.floats(0.1, 2)),
    "ffn_proj_factor": draw(st.floats(0.5, 8)),
    "ffn_round_up_to_multiple_of": draw(st.sampled_from([1, 32, 64])),
    "gate_soft_cap": draw(st.sampled_from([None, 2.0**30, 15.0, 3])),
    "output_logit_soft_cap": draw(st.sampled_from([None, 2**30, 30.0])),
    "norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
    "eps": draw(st.sampled_from([1e-6, 1e-8])),
    "use_bias": draw(st.booleans()),
  }
  mode = draw(st.sampled_from(["single", "fused"]))
  cfg = large.model_config(content)
  exported = large.hugging_face_config(cfg, weight_mode=mode, dtype="float32")
  assert large.model_config(exported) == cfg
  assert large.weight_mode(exported) == mode


LARGE = presets.large("165M")


@pytest.mark.parametrize(
  ("cfg", "message"),
  [
    (ModelConfig(slstm_at=(1, 3)), r"slstm_at is \(1, 3\).* no sLSTM blocks"),
    (ModelConfig(), "mlstm_block is 'paper'"),
    (
      dataclasses.replace(
        LARGE, mlstm_block="paper", pattern=("mlstm_large", "slstm")
      ),
      r"pattern is \('mlstm_large', 'slstm'\)",
    ),
    (dataclasses.replace(LARGE, out_norm=False), "out_norm is False"),
    (dataclasses.replace(LARGE, post_norm=True), "post_norm is True"),
    (
      dataclasses.replace(LARGE, norm=NormConfig("layer", 1e-6, "direct")),
      "norm is NormConfig.*'layer'",
    ),
    (
      dataclasses.replace(LARGE, head_norm=NormConfig("layer", 1e-5, "direct")),
      "head_norm is .* the eps of the other",
    ),
    (
      dataclasses.replace(LARGE, head_norm=NormConfig("rms", 1e-6, "direct")),
      "head_norm is",
    ),
    (
      dataclasses.replace(
        LARGE,
        mlstm_large=MLSTMLargeConfig(bias=True),
        norm=NormConfig("rms", 1e-6, "direct", bias=True),
        head_norm=NormConfig("layer", 1e-6, "direct", bias=True),
      ),
      "out_norm_bias is True",
    ),
    (
      dataclasses.replace(
        LARGE, mlstm_large=MLSTMLargeConfig(input_gate="sigmoid")
      ),
      "input_gate is 'sigmoid'",
    ),
    (
      dataclasses.replace(LARGE, mlstm_large=MLSTMLargeConfig(normalize=False)),
      "normalize is False",
    ),
    (
      dataclasses.replace(LARGE, mlstm_large=MLSTMLargeConfig(qk_norm=True)),
      "qk_norm is True",
    ),
    (
      dataclasses.replace(LARGE, feedforward=FeedForwardConfig()),
      "activation is 'gelu'",
    ),
    (
      dataclasses.replace(
        LARGE, feedforward=FeedForwardConfig(activation="silu", bias=True)
      ),
      "feedforward.bias is True",
    ),
  ],
)
def test_what_the_format_cannot_express_is_refused(cfg, message):
  with pytest.raises(UserError, match=message):
    large.hugging_face_config(cfg, weight_mode="single", dtype="float32")


@pytest.mark.parametrize("name", golden.model_names("paper"))
def test_paper_goldens_have_the_sizes_they_state(name):
  config = golden.model(name).meta["config"]
  cfg = paper.model_config(config)
  assert cfg.kinds == tuple(
    ("mlstm", "slstm")[int(kind)] for kind in config["_block_map"].split(",")
  )
  if config["mlstm_block"]:
    inner = config["mlstm_block"]["mlstm"]["_inner_embedding_dim"]
    assert cfg.mlstm.inner(cfg.width) == inner


def test_paper_defaults_are_the_repositorys():
  cfg = paper.model_config(PAPER)
  assert cfg == ModelConfig(
    vocab_size=97,
    width=64,
    num_blocks=4,
    slstm_at=(1,),
    feedforward=FeedForwardConfig(dropout=0.0),
  )


@pytest.mark.parametrize("at", ["all", [0, 1, 2, 3]])
def test_slstm_everywhere(at):
  assert paper.model_config(PAPER | {"slstm_at": at}).slstm_at == (0, 1, 2, 3)
  no_mlstm = PAPER | {"mlstm_block": None}
  assert paper.model_config(no_mlstm).slstm_at == (0, 1, 2, 3)


@given(
  st.integers(8, 4096), st.floats(1.0, 4.0), st.sampled_from([1, 8, 32, 64])
)
def test_rounding_down_gives_the_repositorys_size(width, factor, multiple):
  options = {
    "proj_factor": factor,
    "round_proj_up_dim_up": False,
    "round_proj_up_to_multiple_of": multiple,
  }
  content = PAPER | {
    "embedding_dim": width,
    "mlstm_block": {"mlstm": options},
    "slstm_block": {"slstm": {}, "feedforward": options},
  }
  cfg = paper.model_config(content)
  theirs = int(factor * width / multiple) * multiple
  assert cfg.mlstm.inner(width) == theirs
  assert cfg.feedforward.hidden(width) == theirs


@pytest.mark.parametrize(
  ("section", "changes", "message"),
  [
    ("slstm", {"function": "gru"}, r"slstm_block.slstm.function is 'gru'"),
    ("slstm", {"forward_clipval": 3.0}, "forward_clipval is 3.0"),
    ("slstm", {"gradient_recurrent_clipval": 1}, "recurrent_clipval is 1"),
    ("slstm", {"gradient_recurrent_cut": True}, "recurrent_cut is True"),
    (
      "slstm",
      {"num_heads": 0},
      "slstm.num_heads is 0; it must be an integer, at least 1",
    ),
    ("slstm", {"conv1d_kernel_size": -1}, "slstm.conv1d_kernel_size is -1"),
    ("slstm", {"bias_init": 0}, "bias_init is 0; it must be a string"),
    (
      "feedforward",
      {"dropout": 1},
      "feedforward.dropout is 1; it must be a number, below 1",
    ),
    (
      "feedforward",
      {"proj_factor": 0},
      "feedforward.proj_factor is 0; it must be a number, above 0",
    ),
    (
      "feedforward",
      {"round_proj_up_to_multiple_of": 0, "round_proj_up_dim_up": False},
      "round_proj_up_to_multiple_of is 0; it must be an integer, at least 1",
    ),
    ("feedforward", {"act_fn": "tanh"}, "feedforward.act_fn is 'tanh'"),
    ("feedforward", {"ff_type": "ffn"}, "ff_type is 'ffn'"),
    ("feedforward", "gated", "feedforward is 'gated'; it must be an object"),
  ],
)
def test_options_of_slstm_blocks_are_checked(section, changes, message):
  block = PAPER["slstm_block"] | {section: changes}
  with pytest.raises(UserError, match=message):
    paper.model_config(PAPER | {"slstm_block": block})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_heads": 0}, "num_heads is 0; it must be an integer, at least 1"),
    ({"num_heads": -1}, "num_heads is -1"),
    ({"proj_factor": 0.0}, "proj_factor is 0.0; it must be a number, above 0"),
    ({"proj_factor": -2}, "proj_factor is -2; it must be a number"),
    ({"proj_factor": 1e300}, r"proj_factor is 1e\+300"),
    ({"round_proj_up_to_multiple_of": 0}, "multiple_of is 0"),
    ({"conv1d_kernel_size": -4}, "conv1d_kernel_size is -4; it must be an int"),
    ({"qkv_proj_blocksize": -4}, "qkv_proj_blocksize is -4"),
    ({"qkv_proj_blocksize": 0}, "qkv_proj_blocksize is 0"),
  ],
)
def test_options_of_mlstm_blocks_are_checked(changes, message):
  with pytest.raises(UserError, match=f"mlstm_block.mlstm.*{message}"):
    paper.model_config(PAPER | {"mlstm_block": {"mlstm": changes}})


@pytest.mark.parametrize(
  ("name", "ours"),
  [
    ("powerlaw_blockdependent", "power_law"),
    ("small_init", "linspace"),
    ("standard", "uniform"),
    ("zeros", "power_law"),
    ("unheard_of", "power_law"),
  ],
)
def test_any_initialisation_of_slstm_biases_imports(name, ours):
  """Upstream has no check of the name, and imports replace the values."""
  slstm = {"bias_init": name, "recurrent_weight_init": name}
  block = PAPER["slstm_block"] | {"slstm": slstm}
  cfg = paper.model_config(PAPER | {"slstm_block": block})
  assert cfg.slstm.bias_init == ours
  assert cfg.slstm.recurrent_init == (
    "uniform" if name == "standard" else "zeros"
  )


NUMBERS = [0, -1, 2, 10**9, 10**30, 10**400, 0.0, 0.5, -1.0, 1e-300, 1e300]
PAPER_NUMBERS = {
  (): ("vocab_size", "embedding_dim", "num_blocks", "dropout"),
  ("mlstm_block", "mlstm"): (
    "num_heads",
    "proj_factor",
    "round_proj_up_to_multiple_of",
    "conv1d_kernel_size",
    "qkv_proj_blocksize",
  ),
  ("slstm_block", "slstm"): ("num_heads", "conv1d_kernel_size"),
  ("slstm_block", "feedforward"): (
    "proj_factor",
    "round_proj_up_to_multiple_of",
    "dropout",
  ),
}


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("section", PAPER_NUMBERS)
def test_any_number_gives_a_paper_model_or_a_sentence(section, up):
  refused = set()
  for name, number in itertools.product(PAPER_NUMBERS[section], NUMBERS):
    content = copy.deepcopy(PAPER)
    place = content
    for key in section:
      place = place[key]
    place |= {name: number} | ({} if up else {"round_proj_up_dim_up": False})
    refused |= {name} if is_refused(paper, content) else set()
  assert refused == set(PAPER_NUMBERS[section])


@pytest.mark.parametrize(
  "name",
  [
    "vocab_size",
    "embedding_dim",
    "num_blocks",
    "num_heads",
    "qk_dim_factor",
    "v_dim_factor",
    "ffn_proj_factor",
    "ffn_round_up_to_multiple_of",
    "gate_soft_cap",
    "output_logit_soft_cap",
    "norm_eps",
    "eps",
  ],
)
def test_any_number_gives_a_large_model_or_a_sentence(name):
  refusals = [is_refused(large, SMALL | {name: number}) for number in NUMBERS]
  assert any(refusals)
  assert not all(refusals)


def is_refused(form, content) -> bool:
  """Whether no model and no shapes come of a configuration."""
  form_args = {"weight_mode": "single"} if form is large else {}
  try:
    cfg = form.model_config(content)
    abstract = Definition(cfg).abstract()
    NameMap(form.tensor_format(**form_args), cfg, abstract)
  except UserError:
    return True
  return False


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": None}, "lacks vocab_size"),
    ({"slstm_at": [7]}, r"\[7\]"),
    ({"slstm_at": "some"}, "slstm_at is 'some'"),
    ({"slstm_at": [1.5]}, r"slstm_at is \[1.5\]"),
    ({"dropout": "0.1"}, "dropout is '0.1'"),
    ({"dropout": 1.0}, "dropout is 1.0; it must be a number, below 1"),
    ({"dropout": -0.1}, "dropout is -0.1"),
    ({"mlstm_cell_eps": -1.0}, "mlstm_cell_eps is -1.0"),
  ],
)
def test_options_of_paper_models_are_checked(changes, message):
  with pytest.raises(UserError, match=message):
    paper.model_config(PAPER | changes)
