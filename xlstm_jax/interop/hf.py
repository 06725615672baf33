"""Reads and writes Hugging Face `xLSTMForCausalLM` checkpoint folders.

python -m xlstm_jax.interop.hf import --input=HF_DIR --workdir=DIR
python -m xlstm_jax.interop.hf export --workdir=DIR --output=HF_DIR
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlstm_jax import config, paths
from xlstm_jax.data import tokenizer as tokenizers
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.interop import large, tensor_files, tokenizer_files, workdir
from xlstm_jax.interop.names import Format, NameMap
from xlstm_jax.interop.options import Options
from xlstm_jax.interop.tensor_files import StoredTensor
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition, Params

CONFIG = "config.json"
GENERATION = "generation_config.json"
_DTYPES = {
  "float32": tensor_files.DTYPES["F32"],
  "bfloat16": tensor_files.DTYPES["BF16"],
}
_PADDING = (
  "The xLSTM of transformers ignores attention_mask. Pad on the right, which "
  "leaves the logits of a text as they are; on the left it is read as text. "
  "Generate from prompts of one length at a time."
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def open_checkpoint(
  folder: pathlib.Path,
) -> tuple[ModelConfig, Format, dict[str, StoredTensor]]:
  """The model, the format and the tensors of a checkpoint folder.

  Raises:
    UserError: the folder is no checkpoint, or its model is not one of ours.
  """
  content = tensor_files.read_json(folder / CONFIG)
  cfg = large.model_config(content)
  stored = tensor_files.open_folder(folder)
  form = large.tensor_format(
    embedding=large.embedding_name(stored),
    weight_mode=large.weight_mode(content),
  )
  return cfg, form, stored


def import_folder(source: pathlib.Path, target: pathlib.Path) -> ModelConfig:
  """Makes the workdir `target` from the checkpoint folder `source`.

  Raises:
    UserError: `source` is damaged or has another kind of model, or `target` is
      in use.
  """
  cfg, form, stored = open_checkpoint(source)
  content = tensor_files.read_json(source / CONFIG)
  workdir.create(
    target,
    source,
    cfg,
    form,
    stored,
    end_of_text=large.end_of_text(content),
    kept=_kept(source, content, stored),
    kept_files=tokenizer_files.read(source),
  )
  return cfg


def export_folder(
  source: pathlib.Path,
  target: pathlib.Path,
  *,
  step: int | None = None,
  dtype: str | None = None,
  weight_mode: large.WeightMode = "single",
  max_shard_bytes: int = 5 * 10**9,
) -> list[str]:
  """Writes the model of the workdir `source` as the checkpoint `target`.

  Args:
    source: the workdir.
    target: a folder that is empty or missing.
    step: the checkpoint's step; None for the latest.
    dtype: dtype of the stored tensors; None for that of the imported ones, or
      float32 if nothing was imported.
    weight_mode: whether joint projections are one tensor.
    max_shard_bytes: as for `tensor_files.write_folder`.

  Returns:
    A sentence for each thing that transformers does wrong with this model.

  Raises:
    UserError: the format cannot express the model, or `target` is in use.
  """
  workdir.require_empty(target)
  run = config.load(source)
  tokenizer = workdir.read_tokenizer(source)
  kept = Options(workdir.read_kept(source))
  names = {name: name for name in _DTYPES}
  stored_as: str = dtype or kept.choice("dtype", names, "float32")
  content = large.hugging_face_config(
    run.model,
    weight_mode=weight_mode,
    dtype=stored_as,
    kept=kept.sub("options").values if kept.has("options") else None,
  )
  generation = kept.sub("generation").values
  if stored_as != kept.values.get("dtype"):
    content[large.KERNEL_DTYPE] = stored_as
  as_imported = _has_imported_tokenizer(kept, tokenizer, content)
  cache = large.cache_fault(run.model)
  if not kept.has("options") and cache is not None:
    content["use_cache"] = False
  if tokenizer is not None and not (as_imported and kept.has("options")):
    content |= dict.fromkeys(large.TOKEN_IDS, tokenizer.end_of_text)
    names = (*large.TOKEN_IDS, "use_cache")
    generation = {name: content[name] for name in names}
  found = tokenizer_files.exported(
    tokenizer,
    tokenizer_files.read(source / tokenizer_files.KEPT) if as_imported else {},
    content,
  )
  told = tokenizer_files.outside(found, content, run.model.vocab_size)
  params = workdir.restore(source, run, step)
  target.mkdir(parents=True, exist_ok=True)
  write_tensors(
    target,
    run.model,
    params,
    dtype=_DTYPES[stored_as],
    weight_mode=weight_mode,
    max_shard_bytes=max_shard_bytes,
  )
  tokenizer_files.save(target, tokenizer, found)
  if generation:
    tensor_files.write_json(target / GENERATION, generation)
  tensor_files.write_json(target / CONFIG, content)
  if tokenizer is None:
    told.append(f"{source} has no tokenizer to export.")
  if cache is not None:
    told.append(
      f"In transformers {cache}. Its forward pass and generate() need "
      "use_cache=False, with which every new token reads the whole text again, "
      "and texts of no more than max_inference_chunksize "
      f"({content['max_inference_chunksize']}) tokens."
    )
  return [*told, _PADDING]


def _has_imported_tokenizer(
  kept: Options,
  tokenizer: tokenizers.Tokenizer | None,
  content: Mapping[str, Any],
) -> bool:
  """Whether a workdir still has its import's tokenizer, or still has none."""
  if "tokenizer" in kept.values:
    hash = None if tokenizer is None else tokenizer.hash
    return kept.values["tokenizer"] == hash
  # Older imports did not record it.
  return tokenizer is None or (
    tokenizer.end_of_text == large.end_of_text(content)
  )


def _kept(
  source: pathlib.Path,
  content: Mapping[str, Any],
  stored: Mapping[str, StoredTensor],
) -> dict[str, Any]:
  """What an export of the workdir writes again, apart from the model."""
  kept: dict[str, Any] = {"options": large.kept_options(content)}
  dtypes = {found.spec.dtype for found in stored.values()}
  for name, dtype in _DTYPES.items():
    if dtypes == {dtype}:
      kept["dtype"] = name
  if (source / GENERATION).exists():
    kept["generation"] = tensor_files.read_json(source / GENERATION)
  return kept


def write_tensors(
  target: pathlib.Path,
  cfg: ModelConfig,
  params: Params,
  *,
  dtype: np.dtype,
  weight_mode: large.WeightMode,
  max_shard_bytes: int,
) -> None:
  """Writes a model's parameters as files, one tensor in memory at a time.

  Args:
    target: an existing folder.
    cfg: a model that the format can express.
    params: its parameters.
    dtype: dtype of the stored tensors.
    weight_mode: whether joint projections are one tensor.
    max_shard_bytes: as for `tensor_files.write_folder`.
  """
  form = large.tensor_format(weight_mode=weight_mode)
  tied = cfg.tie_embeddings
  names = NameMap(form, cfg, Definition(cfg).abstract())
  specs = names.specs(dtype)
  if tied:
    specs[large.HEAD] = specs[large.EMBEDDING]

  def value(name: str) -> np.ndarray:
    stored_as = large.EMBEDDING if tied and name == large.HEAD else name
    return names.value(params, stored_as).astype(dtype, copy=False)

  tensor_files.write_folder(
    target, specs, value, max_shard_bytes=max_shard_bytes
  )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m xlstm_jax.interop.hf",
    description="Imports models from, and exports them to, Hugging Face "
    "checkpoint folders (xLSTMForCausalLM; import reads NX-AI's xlstm_large "
    "too).",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  add = commands.add_parser(
    "import",
    help="make a workdir from a checkpoint folder",
    description="Reads config.json and model.safetensors (or its shards and "
    "index) and writes a workdir for evaluate, generate and init_from, with "
    "the tokenizer.",
  )
  add.add_argument(
    "--input",
    type=paths.argument(paths.reachable),
    required=True,
    help="the checkpoint folder",
  )
  add.add_argument(
    "--workdir",
    type=paths.argument(paths.new_folder),
    required=True,
    help="a new or empty folder for the workdir",
  )
  add = commands.add_parser(
    "export",
    help="make a checkpoint folder from a workdir",
    description="Writes config.json, the parameters as safetensors, and the "
    "workdir's tokenizer; says on stderr what transformers does wrong.",
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
    help="a new or empty folder for the checkpoint",
  )
  add.add_argument(
    "--step", type=int, help="the checkpoint's step (default: the latest)"
  )
  add.add_argument(
    "--dtype",
    choices=list(_DTYPES),
    help="dtype of the stored tensors (default: that of the imported folder, "
    "or float32)",
  )
  add.add_argument(
    "--weight-mode",
    choices=["single", "fused"],
    default="single",
    help="store joint projections separately or stacked (default: %(default)s)",
  )
  add.add_argument(
    "--max-shard-size",
    default="5GB",
    help="largest size of a file, such as 500MB (default: %(default)s)",
  )
  return parser.parse_args(argv)


def parse_size(text: str) -> int:
  """Bytes of a size such as "5GB" or "1000".

  Raises:
    UserError: the text is no size.
  """
  match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
  if not match or int(match[1]) == 0:
    raise UserError(
      f"{text!r} is no size; write bytes, or a number with KB, MB or GB."
    )
  return int(match[1]) * _UNITS[match[2]]


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args: Any = parse_arguments(argv)
  if args.command == "import":
    cfg = import_folder(pathlib.Path(args.input), pathlib.Path(args.workdir))
    print(
      f"Imported a model of {cfg.num_blocks} blocks and width {cfg.width} into "
      f"{args.workdir}."
    )
    return
  told = export_folder(
    pathlib.Path(args.workdir),
    pathlib.Path(args.output),
    step=args.step,
    dtype=args.dtype,
    weight_mode=args.weight_mode,
    max_shard_bytes=parse_size(args.max_shard_size),
  )
  for sentence in told:
    print(f"warning: {sentence}", file=sys.stderr)
  print(f"Exported {args.workdir} to {args.output}.")


if __name__ == "__main__":
  sys.exit(exit_code(main))
