"""In bfloat16 a model learns no worse than in float32: the policy suffices."""

import dataclasses
import sysconfig
from pathlib import Path

import pytest
from data.small_datasets import write_dataset

from xlstm_jax import config, metrics
from xlstm_jax.train import loop

ROOT = Path(__file__).parents[2]


def stdlib_dataset(folder: Path) -> Path:
  """Text of the kind that the quickstart trains on, every tenth held out."""
  paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
  texts = [path.read_bytes() for path in paths]
  documents = [(text, 0) for text in texts if text.isascii()]
  heldout = documents[::10]
  train = [part for part in documents if part not in heldout]
  return write_dataset(folder, train, heldout=heldout, shard_entries=2**22)


def heldout_loss(dtype: str, data: Path, workdir: Path) -> float:
  """Of the quickstart's recipe on a small model, after 120 steps."""
  cfg = config.from_experiment(str(ROOT / "experiments" / "quickstart.py"))
  cfg = dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, width=64, num_blocks=2),
    compute=dataclasses.replace(cfg.compute, dtype=dtype),
    data=dataclasses.replace(cfg.data, paths=(str(data),), context=128),
    optim=dataclasses.replace(cfg.optim, warmup_steps=20),
    batch_size=8,
    steps=120,
    eval_every=120,
    eval_tokens=2**14,
    save_every=120,
    compilation_cache=None,
  )
  assert loop.train(cfg, workdir) == 0
  *_, last = (r for r in metrics.read(workdir) if "eval_loss" in r)
  assert last["step"] == cfg.steps
  return last["eval_loss"]


@pytest.mark.slow
def test_bfloat16_is_not_a_percent_worse(tmp_path):
  """One-sided: rounding makes another run, which may end up better.

  The quickstart in bfloat16 ends 1.35 % better than in float32 with one seed
  and 0.55 % worse with another (docs/numerics.md), so that being within a
  percent on both sides is no property of a single seed.
  """
  data = stdlib_dataset(tmp_path / "data")
  wide = heldout_loss("float32", data, tmp_path / "float32")
  narrow = heldout_loss("bfloat16", data, tmp_path / "bfloat16")
  # It has learned: a uniform guess loses log 257 = 5.55 nats, a unigram 3.3.
  assert wide < 3.0
  assert narrow != wide
  assert narrow < 1.01 * wide
