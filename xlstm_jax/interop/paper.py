"""Imports and exports models of the paper's repository (NX-AI/xlstm).

Nothing is unpickled here. In your own PyTorch environment, with the model in
`model`, save its weights and configuration into a folder:

    safetensors.torch.save_model(model, "DIR/model.safetensors")
    json.dump(dataclasses.asdict(model.config), open("DIR/config.json", "w"))

and then

    python -m xlstm_jax.interop.paper import --input=DIR --workdir=WORKDIR

The way back is

    python -m xlstm_jax.interop.paper export --workdir=WORKDIR --output=DIR

and in PyTorch

    content = json.load(open("DIR/config.json"))
    model = xLSTMLMModel(dacite.from_dict(xLSTMLMModelConfig, content))
    safetensors.torch.load_model(model, "DIR/model.safetensors")
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from xlstm_jax import config, paths
from xlstm_jax.errors import UserError, exit_code, shown
from xlstm_jax.interop import tensor_files, workdir
from xlstm_jax.interop.names import ALL, Format, NameMap, tensor
from xlstm_jax.interop.options import Options
from xlstm_jax.interop.tensor_files import StoredTensor
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import MAX_BLOCKS, ModelConfig
from xlstm_jax.models.language_model import Definition

_CONFIG = "config.json"
# The norm that the repository has everywhere, and the eps of its mLSTM cell.
_NORM = NormConfig("layer", 1e-5, "offset")
_CELL_EPS = 1e-6
# The layouts of the recurrent weights and of the bias in the repository's two
# sLSTM backends. The bias is flat in both.
SLSTMLayout = Literal["vanilla", "cuda"]
_RECURRENT = {"vanilla": "H GE D -> GHDE", "cuda": "H D GE -> GHDE"}
_BIAS = {"vanilla": "GHE -> GHE", "cuda": "HGE -> GHE"}

_CONTEXT = "context_length"
_EMBEDDING, _HEAD = "token_embedding.weight", "lm_head.weight"
_ACTIVATIONS = {
  "gelu": "gelu",
  "swish": "silu",
  "relu": "relu",
  "relu^2": "squared_relu",
  "sigmoid": "sigmoid",
  "selu": "selu",
}
_BIAS_INITS: dict[str, Any] = {
  "powerlaw_blockdependent": "power_law",
  "small_init": "linspace",
  "standard": "uniform",
}
_RECURRENT_INITS: dict[str, Any] = {"zeros": "zeros", "standard": "uniform"}

_CONV = (
  tensor("xlstm.conv1d.conv.weight", "U 1 W -> WU", "mixer.conv.weight"),
  tensor("xlstm.conv1d.conv.bias", "U -> U", "mixer.conv.bias"),
)
_MLSTM = (
  tensor("xlstm_norm.weight", "D -> D", "norm.scale"),
  # First the cell's input, then that of the output gate.
  tensor("xlstm.proj_up.weight", "GU D -> DGU", "mixer.up.weight"),
  tensor("xlstm.proj_up.bias", "GU -> GU", "mixer.up.bias"),
  *_CONV,
  tensor("xlstm.q_proj.weight", "N O I -> NIO", "mixer.q.map.weight"),
  tensor("xlstm.k_proj.weight", "N O I -> NIO", "mixer.k.map.weight"),
  tensor("xlstm.v_proj.weight", "N O I -> NIO", "mixer.v.map.weight"),
  tensor("xlstm.q_proj.bias", "NO -> NO", "mixer.q.map.bias"),
  tensor("xlstm.k_proj.bias", "NO -> NO", "mixer.k.map.bias"),
  tensor("xlstm.v_proj.bias", "NO -> NO", "mixer.v.map.bias"),
  # The gates see q, k and v one after the other, along S.
  tensor(
    "xlstm.mlstm_cell.igate.weight",
    "H SU -> SUH",
    "mixer.gates.map.weight",
    (ALL, ALL, 0),
  ),
  tensor(
    "xlstm.mlstm_cell.fgate.weight",
    "H SU -> SUH",
    "mixer.gates.map.weight",
    (ALL, ALL, 1),
  ),
  tensor("xlstm.mlstm_cell.igate.bias", "H -> H", "mixer.gates.bias", (0,)),
  tensor("xlstm.mlstm_cell.fgate.bias", "H -> H", "mixer.gates.bias", (1,)),
  tensor(
    "xlstm.mlstm_cell.outnorm.weight", "HV -> HV", "mixer.head_norm.scale"
  ),
  tensor("xlstm.learnable_skip", "U -> U", "mixer.skip"),
  tensor("xlstm.proj_down.weight", "D U -> UD", "mixer.down.weight"),
  tensor("xlstm.proj_down.bias", "D -> D", "mixer.down.bias"),
)
_SLSTM = (
  tensor("xlstm_norm.weight", "D -> D", "norm.scale"),
  *_CONV,
  # Upstream swaps the names of the first two: "fgate" feeds the input gate and
  # "igate" the forget gate (NX-AI/xlstm issue 98).
  tensor("xlstm.fgate.weight", "H E D -> HDE", "mixer.gates.weight", (0,)),
  tensor("xlstm.igate.weight", "H E D -> HDE", "mixer.gates.weight", (1,)),
  tensor("xlstm.zgate.weight", "H E D -> HDE", "mixer.gates.weight", (2,)),
  tensor("xlstm.ogate.weight", "H E D -> HDE", "mixer.gates.weight", (3,)),
  tensor("xlstm.group_norm.weight", "HD -> HD", "mixer.head_norm.scale"),
  tensor("ffn_norm.weight", "D -> D", "feedforward_norm.scale"),
  # First the gate half, then the up half.
  tensor("ffn.proj_up.weight", "GF D -> DGF", "feedforward.up.weight"),
  tensor("ffn.proj_up.bias", "GF -> GF", "feedforward.up.bias"),
  tensor("ffn.proj_down.weight", "D F -> FD", "feedforward.down.weight"),
  tensor("ffn.proj_down.bias", "D -> D", "feedforward.down.bias"),
)


def tensor_format(*, slstm_layout: SLSTMLayout = "vanilla") -> Format:
  """The tensors of a state dict."""
  cell = (
    tensor(
      "xlstm.slstm_cell._recurrent_kernel_",
      _RECURRENT[slstm_layout],
      "mixer.recurrent",
    ),
    tensor("xlstm.slstm_cell._bias_", _BIAS[slstm_layout], "mixer.bias"),
  )
  return Format(
    model=(
      tensor(_EMBEDDING, "Z D -> ZD", "embedding.weight"),
      tensor(
        "xlstm_block_stack.post_blocks_norm.weight", "D -> D", "norm.scale"
      ),
      tensor(_HEAD, "Z D -> ZD", "head.weight"),
    ),
    blocks={"mlstm": _MLSTM, "slstm": _SLSTM + cell},
    block_prefix="xlstm_block_stack.blocks.{}.",
  )


def slstm_layout(stored: Mapping[str, StoredTensor]) -> SLSTMLayout:
  """The sLSTM backend that saved the state dict, which its shapes tell."""
  for name, found in stored.items():
    if name.endswith("._recurrent_kernel_"):
      _, rows, columns = (*found.spec.shape, 0, 0, 0)[:3]
      return "cuda" if columns > rows else "vanilla"
  return "vanilla"


def untie(
  stored: Mapping[str, StoredTensor], *, tied: bool
) -> dict[str, StoredTensor]:
  """The tensors, without the copy of the embedding that a tied model saves.

  Raises:
    UserError: the "copy" is a different matrix.
  """
  tensors = dict(stored)
  if not tied or _HEAD not in tensors:
    return tensors
  head = tensors.pop(_HEAD)
  embedding = tensors.setdefault(_EMBEDDING, head)
  if not np.array_equal(embedding.map(), head.map()):
    raise UserError(
      f"The configuration ties the embeddings, but {_HEAD} and {_EMBEDDING} "
      "are different: set tie_weights to false."
    )
  return tensors


def open_checkpoint(
  folder: pathlib.Path,
) -> tuple[ModelConfig, Format, dict[str, StoredTensor]]:
  """The model, the format and the tensors of a folder with a state dict.

  Raises:
    UserError: the folder has no state dict, or its model is not one of ours.
  """
  cfg = model_config(tensor_files.read_json(folder / _CONFIG))
  stored = untie(tensor_files.open_folder(folder), tied=cfg.tie_embeddings)
  return cfg, tensor_format(slstm_layout=slstm_layout(stored)), stored


def import_folder(source: pathlib.Path, target: pathlib.Path) -> ModelConfig:
  """Makes the workdir `target` from the folder `source`.

  Raises:
    UserError: `source` is damaged or has another kind of model, or `target` is
      in use.
  """
  cfg, form, stored = open_checkpoint(source)
  content = tensor_files.read_json(source / _CONFIG)
  context = content.get(_CONTEXT)
  # Upstream's default is -1, for none.
  kept = {_CONTEXT: context} if type(context) is int and context > 0 else {}
  workdir.create(target, source, cfg, form, stored, kept=kept)
  return cfg


def export_folder(
  source: pathlib.Path,
  target: pathlib.Path,
  *,
  step: int | None = None,
  slstm_layout: SLSTMLayout = "vanilla",
) -> None:
  """Writes the model of the workdir `source` as a state dict, in float32.

  Args:
    source: the workdir.
    target: a folder that is empty or missing.
    step: the checkpoint's step; None for the latest.
    slstm_layout: the sLSTM backend that the configuration names and whose
      layout the tensors have.

  Raises:
    UserError: the repository cannot express the model, or `target` is in use.
  """
  workdir.require_empty(target)
  run = config.load(source)
  context = Options(workdir.read_kept(source)).integer(
    _CONTEXT, run.data.context, minimum=1
  )
  content = paper_config(run.model, context=context, slstm_layout=slstm_layout)
  names = NameMap(
    tensor_format(slstm_layout=slstm_layout),
    run.model,
    Definition(run.model).abstract(),
  )
  params = workdir.restore(source, run, step)
  target.mkdir(parents=True, exist_ok=True)
  tensor_files.write_file(
    target / tensor_files.SINGLE,
    names.specs(tensor_files.DTYPES["F32"]),
    lambda name: names.value(params, name),
  )
  tensor_files.write_json(target / _CONFIG, content)


def model_config(content: Mapping[str, Any]) -> ModelConfig:
  """The model of an `xLSTMLMModelConfig`, given as `dataclasses.asdict` does.

  Raises:
    UserError: an option is missing, has another type, or asks for something
      that this project does not have.
  """
  options = Options(content)
  width = options.integer("embedding_dim", minimum=1)
  num_blocks = options.integer("num_blocks", minimum=1)
  slstm_at = _slstm_at(options, num_blocks)
  return ModelConfig(
    vocab_size=options.integer("vocab_size", minimum=1),
    width=width,
    num_blocks=num_blocks,
    slstm_at=slstm_at,
    mlstm=_mlstm(options, width),
    slstm=_slstm(options.sub("slstm_block")) if slstm_at else SLSTMConfig(),
    feedforward=_feedforward(options, width)
    if slstm_at
    else FeedForwardConfig(),
    norm=_NORM,
    head_norm=_NORM,
    out_norm=options.flag("add_post_blocks_norm", True),
    tie_embeddings=options.flag("tie_weights", False),
    dropout=options.rate("dropout", 0.0),
    embedding_dropout=options.flag("add_embedding_dropout", False),
  )


def _slstm_at(options: Options, num_blocks: int) -> tuple[int, ...]:
  at = options.values.get("slstm_at", [])
  if at == "all" or not options.has("mlstm_block"):
    # `ModelConfig` refuses one block more than there may be.
    return tuple(range(min(num_blocks, MAX_BLOCKS + 1)))
  if not isinstance(at, list) or not all(type(n) is int for n in at):
    raise UserError(
      f"slstm_at is {shown(at)}; it must be a list of block indices or 'all'."
    )
  return tuple(sorted(set(at)))


def _mlstm(options: Options, width: int) -> MLSTMConfig:
  mlstm = options.sub("mlstm_block").sub("mlstm")
  round_to = mlstm.integer("round_proj_up_to_multiple_of", 64, minimum=1)
  return MLSTMConfig(
    num_heads=mlstm.integer("num_heads", 4, minimum=1),
    factor=_factor(mlstm, 2.0, width, round_to),
    round_to=round_to,
    conv_window=mlstm.integer("conv1d_kernel_size", 4, minimum=0),
    qkv_block=mlstm.integer("qkv_proj_blocksize", 4, minimum=1),
    # A constant upstream; configurations that change it have this key.
    eps=options.number("mlstm_cell_eps", _CELL_EPS),
    bias=options.flag("bias", False),
  )


def _slstm(block: Options) -> SLSTMConfig:
  slstm = block.sub("slstm")
  for name in ("gradient_recurrent_clipval", "forward_clipval"):
    slstm.refuse(name, "the recurrence is never clipped here; set it to null")
  slstm.refuse(
    "gradient_recurrent_cut",
    "the gradient through the recurrence is never cut here; set it to false "
    "to import the weights",
  )
  return SLSTMConfig(
    cell=slstm.choice("function", {"slstm": "slstm", "lstm": "lstm"}, "slstm"),
    num_heads=slstm.integer("num_heads", 4, minimum=1),
    conv_window=slstm.integer("conv1d_kernel_size", 4, minimum=0),
    # Upstream accepts any name here, and an import does not need the meaning.
    recurrent_init=_RECURRENT_INITS.get(
      slstm.text("recurrent_weight_init", "zeros"), "zeros"
    ),
    bias_init=_BIAS_INITS.get(
      slstm.text("bias_init", "powerlaw_blockdependent"), "power_law"
    ),
    head_norm_scale=slstm.flag("group_norm_weight", True),
    # A missing key means that there is a feed-forward, null that there is none.
    feedforward="feedforward" not in block.values or block.has("feedforward"),
  )


def _feedforward(options: Options, width: int) -> FeedForwardConfig:
  feedforward = options.sub("slstm_block").sub("feedforward")
  feedforward.choice("ff_type", {"ffn_gated": None}, "ffn_gated")
  round_to = feedforward.integer("round_proj_up_to_multiple_of", 64, minimum=1)
  return FeedForwardConfig(
    factor=_factor(feedforward, 1.3, width, round_to),
    round_to=round_to,
    activation=feedforward.choice("act_fn", _ACTIVATIONS, "gelu"),
    bias=feedforward.flag("bias", False),
    dropout=feedforward.rate("dropout", 0.0),
  )


def _factor(options: Options, default: float, width: int, round_to: int):
  """A projection factor with which our rounding up gives their size."""
  factor = options.factor("proj_factor", default)
  if options.flag("round_proj_up_dim_up", True):
    return factor
  size = math.floor(factor * width / round_to) * round_to
  factor = size / width
  rounded = math.ceil(factor * width / round_to) * round_to
  return factor if rounded == size else math.nextafter(factor, 0)


def paper_config(
  cfg: ModelConfig, *, context: int, slstm_layout: SLSTMLayout
) -> dict[str, Any]:
  """The `xLSTMLMModelConfig` of an exported model.

  Args:
    cfg: the model.
    context: tokens of the longest row that the PyTorch model will read at
      once; its mLSTM allocates a mask of this length.
    slstm_layout: the sLSTM backend.

  Raises:
    UserError: the repository's blocks cannot express the model; the message
      names the field and the reason.
  """
  _check_expressible(cfg)
  kinds = set(cfg.kinds)
  return {
    "vocab_size": cfg.vocab_size,
    "embedding_dim": cfg.width,
    "num_blocks": cfg.num_blocks,
    _CONTEXT: context,
    "slstm_at": [at for at, kind in enumerate(cfg.kinds) if kind == "slstm"],
    "mlstm_block": _their_mlstm(cfg) if "mlstm" in kinds else None,
    "slstm_block": (
      _their_slstm(cfg, slstm_layout) if "slstm" in kinds else None
    ),
    "add_post_blocks_norm": cfg.out_norm,
    "tie_weights": cfg.tie_embeddings,
    "bias": "mlstm" in kinds and cfg.mlstm.bias,
    "dropout": cfg.dropout,
    "add_embedding_dropout": cfg.embedding_dropout,
  }


def _their_mlstm(cfg: ModelConfig) -> dict[str, Any]:
  mlstm = cfg.mlstm
  return {
    "mlstm": {
      "num_heads": mlstm.num_heads,
      "proj_factor": mlstm.factor,
      "round_proj_up_to_multiple_of": mlstm.round_to,
      "conv1d_kernel_size": mlstm.conv_window,
      "qkv_proj_blocksize": mlstm.qkv_block or mlstm.inner(cfg.width),
    }
  }


def _their_slstm(cfg: ModelConfig, layout: SLSTMLayout) -> dict[str, Any]:
  slstm, ours = cfg.slstm, cfg.feedforward
  feedforward = None
  if slstm.feedforward:
    feedforward = {
      "proj_factor": _their_factor(ours, cfg.width),
      "round_proj_up_to_multiple_of": ours.round_to,
      "act_fn": _inverse(_ACTIVATIONS)[ours.activation],
      "bias": ours.bias,
      "dropout": cfg.dropout if ours.dropout is None else ours.dropout,
    }
  return {
    "slstm": {
      "backend": layout,
      "function": slstm.cell,
      "num_heads": slstm.num_heads,
      "conv1d_kernel_size": slstm.conv_window,
      "recurrent_weight_init": _inverse(_RECURRENT_INITS)[slstm.recurrent_init],
      "bias_init": _inverse(_BIAS_INITS)[slstm.bias_init],
      "group_norm_weight": slstm.head_norm_scale,
    },
    "feedforward": feedforward,
  }


def _their_factor(ours: FeedForwardConfig, width: int) -> float:
  """A factor that rounding up turns into our number of hidden units."""
  hidden = ours.hidden(width)
  factors = (ours.factor, hidden / width, math.nextafter(hidden / width, 0))
  for factor in factors:
    theirs = dataclasses.replace(ours, factor=factor, rounding="ceil")
    if theirs.hidden(width) == hidden:
      return factor
  raise AssertionError(f"{ours} at width {width}")


def _inverse(meanings: Mapping[str, str]) -> dict[str, str]:
  return {ours: theirs for theirs, ours in meanings.items()}


def _check_expressible(cfg: ModelConfig) -> None:
  mlstm, feedforward = cfg.mlstm, cfg.feedforward
  norms = f"its norms are {_NORM}"
  # Field, value, whether the repository has it, and why not.
  needed: list[tuple[str, Any, bool, str]] = [
    ("norm", cfg.norm, cfg.norm == _NORM, norms),
    ("head_norm", cfg.head_norm, cfg.head_norm == _NORM, norms),
    (
      "post_norm",
      cfg.post_norm,
      not cfg.post_norm,
      "it does not norm branch outputs",
    ),
    ("logit_cap", cfg.logit_cap, cfg.logit_cap is None, "it has no caps"),
    (
      "pattern" if cfg.pattern else "mlstm_block",
      cfg.pattern or cfg.mlstm_block,
      {*cfg.kinds} <= {"mlstm", "slstm"},
      "it has the paper's blocks alone, and xlstm_jax.interop.hf exports the "
      "others",
    ),
  ]
  if "mlstm" in cfg.kinds:
    window, cap = mlstm.conv_window, mlstm.gate_cap
    needed += [
      (
        "mlstm.conv_window",
        window,
        window > 0,
        "its mLSTM always has a convolution",
      ),
      (
        "mlstm.gate_input",
        mlstm.gate_input,
        mlstm.gate_input == "qkv",
        "its gates see q, k and v",
      ),
      (
        "mlstm.gate_headwise",
        mlstm.gate_headwise,
        not mlstm.gate_headwise,
        "its gates see the channels of all heads",
      ),
      ("mlstm.gate_cap", cap, cap is None, "it has no caps"),
      (
        "mlstm.input_gate",
        mlstm.input_gate,
        mlstm.input_gate == "exp",
        "its input gate is exponential",
      ),
      (
        "mlstm.normalize",
        mlstm.normalize,
        mlstm.normalize,
        "it always normalises",
      ),
      (
        "mlstm.qk_norm",
        mlstm.qk_norm,
        not mlstm.qk_norm,
        "it does not norm q and k",
      ),
      (
        "mlstm.eps",
        mlstm.eps,
        mlstm.eps == _CELL_EPS,
        f"its cell adds {_CELL_EPS}",
      ),
    ]
  if "slstm" in cfg.kinds and cfg.slstm.feedforward:
    activations = ", ".join(_ACTIVATIONS.values())
    needed.append(
      (
        "feedforward.activation",
        feedforward.activation,
        feedforward.activation in _ACTIVATIONS.values(),
        f"its feed-forward has {activations}",
      )
    )
  for field, value, expressible, reason in needed:
    if not expressible:
      raise UserError(
        f"The paper's repository cannot express this model, whose {field} is "
        f"{shown(value)}: {reason}."
      )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.interop.paper",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  add = commands.add_parser(
    "import",
    help="make a workdir from a saved state dict",
    description="Reads config.json and model.safetensors and writes a workdir "
    "for evaluate, generate and init_from.",
  )
  add.add_argument(
    "--input",
    type=paths.argument(paths.reachable),
    required=True,
    help="the folder with both files",
  )
  add.add_argument(
    "--workdir",
    type=paths.argument(paths.new_folder),
    required=True,
    help="a new or empty folder for the workdir",
  )
  add = commands.add_parser(
    "export",
    help="make a state dict from a workdir",
    description="Writes config.json and model.safetensors, in float32.",
  )
  add.add_argument(
    "--workdir",
    type=paths.argument(paths.reachable),
    required=True,
    help="the workdir of a run or of an import",
  )
  add.add_argument(
    "--output",
    type=paths.argument(paths.new_folder),
    required=True,
    help="a new or empty folder for both files",
  )
  add.add_argument(
    "--step", type=int, help="the checkpoint's step (default: the latest)"
  )
  add.add_argument(
    "--slstm-backend",
    choices=list(_RECURRENT),
    default="vanilla",
    help="backend that the configuration names, and in whose layout sLSTM "
    "weights are stored (default: %(default)s)",
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args = parse_arguments(argv)
  if args.command == "import":
    cfg = import_folder(pathlib.Path(args.input), pathlib.Path(args.workdir))
    print(
      f"Imported a model of {cfg.num_blocks} blocks and width {cfg.width} into "
      f"{args.workdir}."
    )
    return
  export_folder(
    pathlib.Path(args.workdir),
    pathlib.Path(args.output),
    step=args.step,
    slstm_layout=args.slstm_backend,
  )
  print(f"Exported {args.workdir} to {args.output}.")


if __name__ == "__main__":
  sys.exit(exit_code(main))
