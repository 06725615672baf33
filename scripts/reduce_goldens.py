"""Cuts the goldens down to the set that is committed in tests/goldens.

    python scripts/reduce_goldens.py --source=../shared/goldens

What each file keeps is in `REDUCTIONS`. Cells treat batch rows and heads
apart, models rows, so one of them stands for all; losses, their gradients and
the cross entropy of every token are those of all rows. Of the reference's own
float32 result only the distance from its float64 result is kept, by a name
with "fp32_error" where that has "fp64".
"""

import argparse
import dataclasses
import fnmatch
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
from safetensors.numpy import load_file, save_file

Cut = Callable[[str, np.ndarray], np.ndarray]

TARGET = pathlib.Path(__file__).parents[1] / "tests" / "goldens"


def whole(name: str, x: np.ndarray) -> np.ndarray:
  """All of a tensor."""
  del name
  return x


def first_row_and_head(name: str, x_BH: np.ndarray) -> np.ndarray:
  """Row 0 and head 0 of the mLSTM's tensors, which are [B, H, ...].

  With the sigmoid gate, which has outputs alone, the first 24 tokens of them.
  """
  return x_BH[:1, :1, :24] if "siging" in name else x_BH[:1, :1]


def first_row(name: str, x: np.ndarray) -> np.ndarray:
  """Row 0 of a model's logits, hidden channels and states."""
  if "slstm_state" in name:  # [4, B, H D]
    return x[:, :1]
  return x[:1] if "logits" in name or "hidden" in name or "state" in name else x


def first_head(name: str, x: np.ndarray) -> np.ndarray:
  """Head 0 of the sLSTM's tensors; gradients of R and b sum over rows."""
  if name.endswith("state"):  # [4, B, H D]
    return x[..., :8]
  if name.endswith(("/R", "/b")):  # [G, H, ...]
    return x[:, :1]
  if name.endswith("/x"):  # [B, T, G, H, D]
    return x[:, :, :, :1]
  return x[:, :, :1]  # [B, T, H, D]


@dataclasses.dataclass(frozen=True)
class Reduction:
  """What is kept of some files.

  Attributes:
    files: pattern of paths below the source.
    keep: patterns of tensor names; none for files that are copied as they are.
    cut: the kept part of a tensor.
    errors: patterns of float64 tensors whose float32 error is kept.
  """

  files: str
  keep: tuple[str, ...] = ()
  cut: Cut = whole
  errors: tuple[str, ...] = ()


REDUCTIONS = (
  # Gradients of q, k and v where the states count too: "grad_hstate".
  Reduction(
    "cells_mlstm/*.safetensors",
    keep=(
      "in/*",
      "fp64/rec/*",
      "fp64/grad_h/f",
      "fp64/grad_h_rec/[!qkv]*",
      "fp64/grad_h_eps0/[ifm]*",
      "fp64/grad_hstate/*",
      "fp64/siging_norm?/h",
    ),
    cut=first_row_and_head,
    errors=(
      "fp64/rec/*",
      "fp64/grad_h/*",
      "fp64/grad_hstate/*",
      "fp64/siging_norm?/h",
    ),
  ),
  Reduction(
    "cells_slstm/*.safetensors",
    keep=("in/*", "fp64/y", "fp64/last_state", "fp64/grad/*"),
    cut=first_head,
    errors=("fp64/y", "fp64/last_state", "fp64/grad/*"),
  ),
  # A model of each family, of the paper's one with eps and one without; of
  # gradients those of small parameters, which depend on everything behind
  # them, and in float32 those of which the reference loses most.
  Reduction("paper_m10/meta.json"),
  Reduction("paper_m10/weights.safetensors"),
  # Its full pass has eps in another gauge and agrees to 1e-5 alone; that of
  # steps, whose gauge is ours, agrees to 1e-9.
  Reduction(
    "paper_m10/io.safetensors",
    keep=("input_ids", "labels", "[!l]*_fp64", "loss_fp64", "last*"),
    cut=first_row,
    errors=("token_ce_fp64",),
  ),
  Reduction(
    "paper_m10/grads_fp64.safetensors",
    keep=("*gate.bias", "*norm*", "*conv1d*", "*.q_proj.*", "*skip"),
  ),
  Reduction("paper_m10/grads_fp32.safetensors", keep=("*gate.bias",)),
  Reduction("paper_ms11_eps0/meta.json"),
  Reduction("paper_ms11_eps0/weights.safetensors"),
  Reduction(
    "paper_ms11_eps0/io.safetensors",
    keep=("input_ids", "labels", "*_fp64", "last*"),
    cut=first_row,
    errors=("logits_fp64", "token_ce_fp64"),
  ),
  Reduction(
    "paper_ms11_eps0/grads_fp64.safetensors",
    keep=(
      *("*gate.bias", "*.xlstm.?gate.weight", "*norm*", "*conv1d*"),
      *("*_proj.*", "*skip", "*_cell._*"),
    ),
  ),
  Reduction("paper_ms11_eps0/grads_fp32.safetensors", keep=("*gate.bias",)),
  Reduction("large_tiny/meta.json"),
  Reduction("large_tiny/weights.safetensors"),
  Reduction(
    "large_tiny/io.safetensors",
    keep=(
      "input_ids",
      "labels",
      "logits_fp64",
      "loss_fp64",
      "token_ce_fp64",
      "*_state_fp64/*",
    ),
    cut=first_row,
    errors=("logits_fp64", "token_ce_fp64"),
  ),
  Reduction(
    "large_tiny/grads_fp64.safetensors",
    keep=("*.[if]gate_preact*", "*norm*"),
  ),
  Reduction(
    "large_tiny/grads_fp32.safetensors",
    keep=("*.[if]gate_preact*", "*norm*"),
  ),
  Reduction("large_docreset/meta.json"),
  Reduction("large_docreset/weights.safetensors"),
  Reduction("large_docreset/io.safetensors", keep=("*",), cut=first_row),
  Reduction(
    "large_docreset/grads_fp64.safetensors",
    keep=("*.[if]gate_preact*", "*norm*"),
  ),
  Reduction("hf_tiny/meta.json"),
  Reduction("hf_tiny/checkpoint_sharded/*"),
  Reduction(
    "hf_tiny/io.safetensors",
    keep=(
      "input_ids",
      "labels_noshift",
      "greedy*",
      "hidden_fp64/2",
      "logits_fp64",
      "loss_fp64",
      "token_ce_fp64",
      "prefill37_state_fp64/*",
    ),
    cut=first_row,
    errors=("logits_fp64", "token_ce_fp64"),
  ),
  Reduction(
    "hf_tiny/grads_fp64.safetensors",
    keep=("*.[if]gate_preact*", "*norm*"),
  ),
  Reduction(
    "hf_tiny/grads_fp32.safetensors",
    keep=("*.[if]gate_preact*", "*norm*"),
  ),
)


def reduce(
  tensors: dict[str, np.ndarray], reduction: Reduction
) -> dict[str, np.ndarray]:
  """The tensors and errors that a reduction keeps."""

  def select(patterns):
    return [
      name
      for name in tensors
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]

  kept = {
    name: np.asarray(reduction.cut(name, tensors[name]), order="C")
    for name in select(reduction.keep)
  }
  for name in select(reduction.errors):
    single = tensors[name.replace("fp64", "fp32", 1)]
    error = reduction.cut(name, single - tensors[name])
    kept[name.replace("fp64", "fp32_error", 1)] = np.asarray(
      np.linalg.norm(error)
    )
  return kept


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--source", type=pathlib.Path, required=True)
  parser.add_argument("--target", type=pathlib.Path, default=TARGET)
  args = parser.parse_args()
  total = 0
  for reduction in REDUCTIONS:
    files = sorted(args.source.glob(reduction.files))
    if not files:
      parser.error(f"no {reduction.files} in {args.source}")
    for source in files:
      target = args.target / source.relative_to(args.source)
      target.parent.mkdir(parents=True, exist_ok=True)
      if reduction.keep:
        save_file(reduce(load_file(source), reduction), target)
      else:
        shutil.copyfile(source, target)
      total += target.stat().st_size
      print(f"{target.stat().st_size:9,}  {target.relative_to(args.target)}")
  print(f"{total:9,}  in all")


if __name__ == "__main__":
  main()
