"""Names and configuration of the 7B architecture's public checkpoints.

There are two formats, Hugging Face's `xLSTMForCausalLM` and NX-AI's
`xlstm_large`. They differ in the embedding's name and in the last norm.
"""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any, Literal

from xlstm_jax.errors import UserError, shown
from xlstm_jax.interop.names import ALL, Format, Part, Tensor, tensor
from xlstm_jax.interop.options import NO_CAP, Options
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models.config import ModelConfig

WeightMode = Literal["single", "fused"]
EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
_XLSTM_LARGE_EMBEDDING = "embedding.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# How the reference runs a model: its defaults, with kernels that it has on
# every machine.
_RUNTIME = {
  "chunkwise_kernel": "chunkwise--native_autograd",
  "sequence_kernel": "native_sequence__native",
  "step_kernel": "native",
  "mode": "inference",
  "chunk_size": 64,
  "max_inference_chunksize": 16384,
  "return_last_states": True,
  "inference_state_dtype": "float32",
  "norm_reduction_force_float32": True,
  "use_cache": True,
}
KERNEL_DTYPE = "autocast_kernel_dtype"

_BLOCK = (
  tensor("norm_mlstm.weight", "D -> D", "norm.scale"),
  tensor("norm_mlstm.bias", "D -> D", "norm.bias"),
  tensor(
    "mlstm_layer.multihead_norm.weight", "HV -> HV", "mixer.head_norm.scale"
  ),
  tensor("mlstm_layer.multihead_norm.bias", "HV -> HV", "mixer.head_norm.bias"),
  tensor("mlstm_layer.out_proj.weight", "D HV -> HVD", "mixer.out.weight"),
  tensor("mlstm_layer.out_proj.bias", "D -> D", "mixer.out.bias"),
  tensor("norm_ffn.weight", "D -> D", "feedforward_norm.scale"),
  tensor("norm_ffn.bias", "D -> D", "feedforward_norm.bias"),
  tensor("ffn.proj_down.weight", "D F -> FD", "feedforward.down.weight"),
  tensor("ffn.proj_down.bias", "D -> D", "feedforward.down.bias"),
)

# The tensors that weight_mode "fused" stacks, with the parts of "single".
_JOINT = {
  "mlstm_layer.qkv_opreact.weight": {
    "mlstm_layer.q.weight": Part("HK D -> DHK", "mixer.q.weight"),
    "mlstm_layer.k.weight": Part("HK D -> DHK", "mixer.k.weight"),
    "mlstm_layer.v.weight": Part("HV D -> DHV", "mixer.v.weight"),
    "mlstm_layer.ogate_preact.weight": Part("HV D -> DHV", "mixer.o.weight"),
  },
  "mlstm_layer.qkv_opreact.bias": {
    "mlstm_layer.q.bias": Part("HK -> HK", "mixer.q.bias"),
    "mlstm_layer.k.bias": Part("HK -> HK", "mixer.k.bias"),
    "mlstm_layer.v.bias": Part("HV -> HV", "mixer.v.bias"),
    "mlstm_layer.ogate_preact.bias": Part("HV -> HV", "mixer.o.bias"),
  },
  "mlstm_layer.ifgate_preact.weight": {
    "mlstm_layer.igate_preact.weight": Part(
      "H D -> DH", "mixer.gates.map.weight", (0, ALL, 0)
    ),
    "mlstm_layer.fgate_preact.weight": Part(
      "H D -> DH", "mixer.gates.map.weight", (0, ALL, 1)
    ),
  },
  "mlstm_layer.ifgate_preact.bias": {
    "mlstm_layer.igate_preact.bias": Part("H -> H", "mixer.gates.bias", (0,)),
    "mlstm_layer.fgate_preact.bias": Part("H -> H", "mixer.gates.bias", (1,)),
  },
  "ffn.proj_up_gate_z.weight": {
    "ffn.proj_up_gate.weight": Part(
      "F D -> DF", "feedforward.up.weight", (ALL, 0)
    ),
    "ffn.proj_up.weight": Part("F D -> DF", "feedforward.up.weight", (ALL, 1)),
  },
  "ffn.proj_up_gate_z.bias": {
    "ffn.proj_up_gate.bias": Part("F -> F", "feedforward.up.bias", (0,)),
    "ffn.proj_up.bias": Part("F -> F", "feedforward.up.bias", (1,)),
  },
}


def tensor_format(
  *, embedding: str = EMBEDDING, weight_mode: WeightMode
) -> Format:
  """The tensors of a checkpoint whose embedding has the name `embedding`."""
  joint = [
    Tensor(name, tuple(parts.values())) for name, parts in _JOINT.items()
  ]
  if weight_mode == "single":
    joint = [
      Tensor(name, (part,))
      for parts in _JOINT.values()
      for name, part in parts.items()
    ]
  return Format(
    model=(
      tensor(embedding, "Z D -> ZD", "embedding.weight"),
      tensor("backbone.out_norm.weight", "D -> D", "norm.scale"),
      tensor("backbone.out_norm.bias", "D -> D", "norm.bias"),
      tensor(HEAD, "Z D -> ZD", "head.weight"),
    ),
    blocks={"mlstm_large": _BLOCK + tuple(joint)},
    block_prefix="backbone.blocks.{}.",
  )


def embedding_name(stored: Container[str]) -> str:
  """The embedding's name in a checkpoint, in which the formats differ."""
  if _XLSTM_LARGE_EMBEDDING in stored:
    return _XLSTM_LARGE_EMBEDDING
  return EMBEDDING


def model_config(content: Mapping[str, Any]) -> ModelConfig:
  """The model of a `config.json`, in either format.

  Hugging Face's says `"model_type": "xlstm"`. Its model always norms the last
  block's output, with a weight but no bias, and never ties the embeddings,
  whatever its configuration says.

  Raises:
    UserError: an option is missing, has another type, or asks for something
      that these models do not have.
  """
  options = Options(content)
  hugging_face = options.has("model_type")
  options.choice("model_type", {"xlstm": None}, "xlstm")
  for name in ("add_qk_norm", "add_post_norm"):
    options.refuse(name, "the format's own implementations do not have it")
  _refuse_sigmoid_gates(options)
  bias = options.flag("use_bias", False)
  norm_eps = options.number("norm_eps", 1e-6)
  return ModelConfig(
    vocab_size=options.integer(
      "vocab_size", 50304 if hugging_face else None, minimum=1
    ),
    width=_size(options, "hidden_size", "embedding_dim", 4096, hugging_face),
    num_blocks=_size(
      options, "num_hidden_layers", "num_blocks", 32, hugging_face
    ),
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(
      num_heads=options.integer(
        "num_heads", 8 if hugging_face else None, minimum=1
      ),
      qk_factor=options.factor("qk_dim_factor", 0.5),
      v_factor=options.factor("v_dim_factor", 1.0),
      gate_cap=options.cap("gate_soft_cap", 15.0),
      eps=options.number("eps", 1e-6),
      bias=bias,
    ),
    feedforward=FeedForwardConfig(
      factor=options.factor(
        "ffn_proj_factor", 2.667 if hugging_face else 2.6667
      ),
      round_to=options.integer("ffn_round_up_to_multiple_of", 64, minimum=1),
      rounding="floor",
      activation="silu",
      bias=bias,
    ),
    norm=NormConfig("rms", norm_eps, "direct", bias=bias),
    head_norm=NormConfig("layer", norm_eps, "direct", bias=bias),
    out_norm=hugging_face or options.flag("add_out_norm", True),
    out_norm_bias=not hugging_face,
    logit_cap=options.cap("output_logit_soft_cap", 30.0),
  )


def weight_mode(content: Mapping[str, Any]) -> WeightMode:
  """How the checkpoint of a `config.json` stores joint projections."""
  modes: dict[str, WeightMode] = {"single": "single", "fused": "fused"}
  return Options(content).choice("weight_mode", modes, "single")


def token_ids(content: Mapping[str, Any], name: str) -> list[int]:
  """The ids that a `config.json` gives for a special token, if any."""
  value = content.get(name)
  ids = value if isinstance(value, list) else [value]
  return [id for id in ids if type(id) is int]


def end_of_text(content: Mapping[str, Any]) -> int | None:
  """The id that ends a text, by a `config.json`; the first of several."""
  return next(iter(token_ids(content, "eos_token_id")), None)


def cache_fault(cfg: ModelConfig) -> str | None:
  """What is wrong with transformers' cache for a model; None if nothing is.

  The cache is allocated with the channels of q and k, and of v, rounded up to
  multiples of 64. The layers are not rounded.
  """
  mixer, width = cfg.mlstm_large, cfg.width
  theirs = tuple(
    -(-int(width * factor) // 64) * 64 // mixer.num_heads
    for factor in (mixer.qk_factor, mixer.v_factor)
  )
  ours = mixer.head_channels(width)
  if theirs == ours:
    return None
  return (
    f"the cache does not fit this model: a head has {ours[0]} channels of q "
    f"and k and {ours[1]} of v, the cache {theirs[0]} and {theirs[1]} (of all "
    "heads together a multiple of 64)"
  )


def kept_options(content: Mapping[str, Any]) -> dict[str, Any] | None:
  """The options of a `config.json` apart from the model; None if NX-AI's."""
  if not Options(content).has("model_type"):
    return None
  names = (*_RUNTIME, KERNEL_DTYPE, *TOKEN_IDS)
  return {name: content[name] for name in names if name in content}


def hugging_face_config(
  cfg: ModelConfig,
  *,
  weight_mode: WeightMode,
  dtype: str,
  kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The `config.json` of an exported model.

  Args:
    cfg: the model.
    weight_mode: whether joint projections are one tensor.
    dtype: dtype of the stored tensors.
    kept: the other options, from `kept_options`; None for upstream's defaults
      and no special tokens.

  Raises:
    UserError: `xLSTMForCausalLM` cannot express the model; the message names
      the field and the reason.
  """
  _check_expressible(cfg)
  mixer, feedforward = cfg.mlstm_large, cfg.feedforward
  return {
    **_RUNTIME,
    KERNEL_DTYPE: dtype,
    **(dict.fromkeys(TOKEN_IDS) if kept is None else kept),
    "architectures": ["xLSTMForCausalLM"],
    "model_type": "xlstm",
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.width,
    "embedding_dim": cfg.width,
    "num_hidden_layers": cfg.num_blocks,
    "num_blocks": cfg.num_blocks,
    "num_heads": mixer.num_heads,
    "qk_dim_factor": mixer.qk_factor,
    "v_dim_factor": mixer.v_factor,
    "ffn_proj_factor": their_factor(feedforward, cfg.width),
    "ffn_round_up_to_multiple_of": feedforward.round_to,
    "use_bias": mixer.bias,
    "norm_eps": cfg.norm.eps,
    "eps": mixer.eps,
    "add_out_norm": True,
    "tie_word_embeddings": False,
    "gate_soft_cap": _their_cap(mixer.gate_cap),
    "output_logit_soft_cap": _their_cap(cfg.logit_cap),
    "weight_mode": weight_mode,
    "dtype": dtype,
    "torch_dtype": dtype,
  }


def _refuse_sigmoid_gates(options: Options) -> None:
  """Refuses kernels of another cell, which their names tell."""
  for name, value in options.values.items():
    if "kernel" in name and isinstance(value, str) and "siging" in value:
      raise UserError(
        f"{name[:100]} is {shown(value)}: this kernel computes a cell with a "
        "sigmoid input gate, and imported models have the exponential one. If "
        "the model was trained with that, name another kernel."
      )


def _size(options, name, alias, default, hugging_face) -> int:
  """A size that either of two options may give."""
  given = {
    n: options.integer(n, minimum=1) for n in (name, alias) if options.has(n)
  }
  if len(set(given.values())) > 1:
    raise UserError(
      f"The configuration gives {name} as {given[name]} and {alias} as "
      f"{given[alias]}: they are one and the same size."
    )
  if given:
    return next(iter(given.values()))
  return options.integer(name, default if hugging_face else None, minimum=1)


def their_factor(feedforward: FeedForwardConfig, width: int) -> float:
  """A factor that their rounding turns into our number of hidden units."""
  hidden = feedforward.hidden(width)
  # If float errors spoil the plain ratio, the last one keeps clear of them.
  for factor in (feedforward.factor, hidden / width, (hidden + 0.5) / width):
    theirs = dataclasses.replace(feedforward, factor=factor, rounding="floor")
    if theirs.hidden(width) == hidden:
      return factor
  raise AssertionError(f"{feedforward} at width {width}")


def _their_cap(cap: float | None) -> float:
  return NO_CAP if cap is None else cap


def _check_expressible(cfg: ModelConfig) -> None:
  mixer = cfg.mlstm_large
  bias = mixer.bias
  required = {
    "slstm_at": (cfg.slstm_at, (), "it has no sLSTM blocks"),
    "pattern": (
      cfg.pattern if {*cfg.kinds} != {"mlstm_large"} else (),
      (),
      "its blocks are the 7B model's",
    ),
    "mlstm_block": (
      "large" if cfg.pattern else cfg.mlstm_block,
      "large",
      "its blocks are the 7B model's",
    ),
    "out_norm": (cfg.out_norm, True, "it always norms the last output"),
    "post_norm": (cfg.post_norm, False, "it does not norm branch outputs"),
    "norm": (
      cfg.norm,
      NormConfig("rms", cfg.norm.eps, "direct", bias),
      "its norms are RMSNorm with a direct scale, and a bias where "
      "projections have one",
    ),
    "head_norm": (
      cfg.head_norm,
      NormConfig("layer", cfg.norm.eps, "direct", bias),
      "its head norm is LayerNorm with a direct scale, the eps of the other "
      "norms, and a bias where projections have one",
    ),
    "out_norm_bias": (
      cfg.out_norm_bias and cfg.norm.bias,
      False,
      "its last norm has no bias",
    ),
    "mlstm_large.input_gate": (
      mixer.input_gate,
      "exp",
      "its input gate is exponential",
    ),
    "mlstm_large.normalize": (mixer.normalize, True, "it always normalises"),
    "mlstm_large.qk_norm": (mixer.qk_norm, False, "it does not norm q and k"),
    "feedforward.activation": (
      cfg.feedforward.activation,
      "silu",
      "its feed-forward uses SiLU",
    ),
    "feedforward.bias": (
      cfg.feedforward.bias,
      bias,
      "either all projections have a bias or none has",
    ),
  }
  for field, (value, only, reason) in required.items():
    if value != only:
      raise UserError(
        f"Hugging Face's xLSTMForCausalLM cannot express this model, whose "
        f"{field} is {value!r}: {reason}."
      )
