"""Imports models of the paper's repository (NX-AI/xlstm).

Nothing is unpickled here. In your own PyTorch environment, with the model in
`model`, save its weights and configuration into a folder:

    safetensors.torch.save_model(model, "DIR/model.safetensors")
    json.dump(dataclasses.asdict(model.config), open("DIR/config.json", "w"))

and then

    python -m xlstm_jax.interop.paper import --input=DIR --workdir=WORKDIR
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from xlstm_jax import paths
from xlstm_jax.errors import UserError, exit_code, shown
from xlstm_jax.interop import tensor_files, workdir
from xlstm_jax.interop.names import ALL, Format, tensor
from xlstm_jax.interop.options import Options
from xlstm_jax.interop.tensor_files import StoredTensor
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import MAX_BLOCKS, ModelConfig

# How the repository's two sLSTM backends lay out the recurrent weights and the
# bias, which is flat in both.
SLSTMLayout = Literal["vanilla", "cuda"]
_RECURRENT = {"vanilla": "H GE D -> GHDE", "cuda": "H D GE -> GHDE"}
_BIAS = {"vanilla": "GHE -> GHE", "cuda": "HGE -> GHE"}

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
  # First the cell's input, then the output gate's.
  tensor("xlstm.proj_up.weight", "GU D -> DGU", "mixer.up.weight"),
  tensor("xlstm.proj_up.bias", "GU -> GU", "mixer.up.bias"),
  *_CONV,
  tensor("xlstm.q_proj.weight", "N O I -> NIO", "mixer.q.map.weight"),
  tensor("xlstm.k_proj.weight", "N O I -> NIO", "mixer.k.map.weight"),
  tensor("xlstm.v_proj.weight", "N O I -> NIO", "mixer.v.map.weight"),
  tensor("xlstm.q_proj.bias", "NO -> NO", "mixer.q.map.bias"),
  tensor("xlstm.k_proj.bias", "NO -> NO", "mixer.k.map.bias"),
  tensor("xlstm.v_proj.bias", "NO -> NO", "mixer.v.map.bias"),
  # The gates see q, k and v one after the other: S.
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
  # Upstream's names of the first two are swapped: "fgate" feeds the input
  # gate and "igate" the forget gate (NX-AI/xlstm issue 98).
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
  """Which sLSTM backend saved the state dict: its shapes tell."""
  for name, found in stored.items():
    if name.endswith("._recurrent_kernel_"):
      _, rows, columns = (*found.spec.shape, 0, 0, 0)[:3]
      return "cuda" if columns > rows else "vanilla"
  return "vanilla"


def untie(
  stored: Mapping[str, StoredTensor], *, tied: bool
) -> dict[str, StoredTensor]:
  """The tensors without the copy of the embedding that a tied model saves.

  Raises:
    UserError: the "copy" is another matrix.
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
    UserError: it is none, or its model is not one of ours.
  """
  cfg = model_config(tensor_files.read_json(folder / "config.json"))
  stored = untie(tensor_files.open_folder(folder), tied=cfg.tie_embeddings)
  return cfg, tensor_format(slstm_layout=slstm_layout(stored)), stored


def import_folder(source: pathlib.Path, target: pathlib.Path) -> ModelConfig:
  """Makes the workdir `target` of the folder `source`.

  Raises:
    UserError: `source` is damaged or not of our kind, or `target` is in use.
  """
  cfg, form, stored = open_checkpoint(source)
  workdir.create(target, source, cfg, form, stored)
  return cfg


def model_config(content: Mapping[str, Any]) -> ModelConfig:
  """The model of an `xLSTMLMModelConfig`, as `dataclasses.asdict` gives it.

  Raises:
    UserError: an option is missing, has another type, or asks for what this
      project does not have.
  """
  options = Options(content)
  width = options.integer("embedding_dim", minimum=1)
  num_blocks = options.integer("num_blocks", minimum=1)
  slstm_at = _slstm_at(options, num_blocks)
  slstm = options.sub("slstm_block").sub("slstm")
  norm = NormConfig("layer", 1e-5, "offset")
  return ModelConfig(
    vocab_size=options.integer("vocab_size", minimum=1),
    width=width,
    num_blocks=num_blocks,
    slstm_at=slstm_at,
    mlstm=_mlstm(options, width),
    slstm=_slstm(slstm) if slstm_at else SLSTMConfig(),
    feedforward=_feedforward(options, width)
    if slstm_at
    else FeedForwardConfig(),
    norm=norm,
    head_norm=norm,
    out_norm=options.flag("add_post_blocks_norm", True),
    tie_embeddings=options.flag("tie_weights", False),
    dropout=options.rate("dropout", 0.0),
    embedding_dropout=options.flag("add_embedding_dropout", False),
  )


def _slstm_at(options: Options, num_blocks: int) -> tuple[int, ...]:
  at = options.values.get("slstm_at", [])
  if at == "all" or not options.has("mlstm_block"):
    # One more than there may be is refused with the model.
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
    # A constant upstream, and a key of configurations that change it.
    eps=options.number("mlstm_cell_eps", 1e-6),
    bias=options.flag("bias", False),
  )


def _slstm(slstm: Options) -> SLSTMConfig:
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
    # Upstream takes any name here, "zeros" for one; to an import it is nothing.
    recurrent_init=_RECURRENT_INITS.get(
      slstm.text("recurrent_weight_init", "zeros"), "zeros"
    ),
    bias_init=_BIAS_INITS.get(
      slstm.text("bias_init", "powerlaw_blockdependent"), "power_law"
    ),
    head_norm_scale=slstm.flag("group_norm_weight", True),
  )


def _feedforward(options: Options, width: int) -> FeedForwardConfig:
  block = options.sub("slstm_block")
  if "feedforward" in block.values and not block.has("feedforward"):
    raise UserError(
      "slstm_block.feedforward is null: sLSTM blocks without a feed-forward "
      "do not exist here."
    )
  feedforward = block.sub("feedforward")
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
  """The projection factor; it makes our rounding up give their size."""
  factor = options.factor("proj_factor", default)
  if options.flag("round_proj_up_dim_up", True):
    return factor
  size = math.floor(factor * width / round_to) * round_to
  factor = size / width
  rounded = math.ceil(factor * width / round_to) * round_to
  return factor if rounded == size else math.nextafter(factor, 0)


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
    help="make a workdir of a saved state dict",
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
    type=paths.argument(paths.new_workdir),
    required=True,
    help="a new or empty folder for the workdir",
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args = parse_arguments(argv)
  cfg = import_folder(pathlib.Path(args.input), pathlib.Path(args.workdir))
  print(
    f"Imported a model of {cfg.num_blocks} blocks and width {cfg.width} into "
    f"{args.workdir}."
  )


if __name__ == "__main__":
  sys.exit(exit_code(main))
