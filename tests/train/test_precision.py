"""In bfloat16 a model learns no worse than in float32: the policy suffices."""

import dataclasses
import sysconfig
from pathlib import Path

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.small_datasets import write_dataset

from xlstm_jax import config, metrics, objective
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
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

  The quickstart in bfloat16 ends 0.43 % better than in float32 with one seed
  and 1.04 % worse with another (docs/numerics.md), so that being within a
  percent on both sides is no property of a single seed.
  """
  data = stdlib_dataset(tmp_path / "data")
  wide = heldout_loss("float32", data, tmp_path / "float32")
  narrow = heldout_loss("bfloat16", data, tmp_path / "bfloat16")
  # It has learned: a uniform guess loses log 257 = 5.55 nats, a unigram 3.3.
  assert wide < 3.0
  assert narrow != wide
  assert narrow < 1.01 * wide


@pytest.mark.slow
@pytest.mark.parametrize(
  ("model", "most"),
  [
    # 1.0 and 2.3 % measured, in gradients of a projection and of gate biases.
    (
      ModelConfig(vocab_size=257, width=128, num_blocks=2, slstm_at=(1,)),
      0.015,
    ),
    (
      ModelConfig(
        vocab_size=257,
        width=128,
        num_blocks=2,
        mlstm_block="large",
        mlstm_large=MLSTMLargeConfig(num_heads=2),
      ),
      0.03,
    ),
  ],
  ids=["paper", "large"],
)
def test_no_gradient_is_lost_in_bfloat16(model, most):
  """Of no parameter: sums over thousands of tokens need more than its bits."""
  rng = np.random.default_rng(0)
  likely = 1 / np.arange(1, model.vocab_size + 1)
  ids = rng.choice(model.vocab_size, (2, 8, 1024), p=likely / likely.sum())
  inputs_BT, targets_BT = jnp.asarray(ids)
  params = Definition(model, Compute("float32")).init(jax.random.key(0))

  def gradients(dtype):
    definition = Definition(model, Compute(dtype))

    def loss(params):
      lm = definition.bind(params)
      x_BTD, _ = lm(inputs_BT)
      total, _ = objective.cross_entropy(
        lm.vocabulary_weight(),
        x_BTD,
        targets_BT,
        jnp.ones(targets_BT.shape),
        chunk=1024,
        cap=None,
      )
      return total

    return compiled.jit(jax.grad(loss))(params)

  def check(path, exact, found):
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error <= most, (jax.tree_util.keystr(path), error)

  wide, narrow = gradients("float32"), gradients("bfloat16")
  jax.tree_util.tree_map_with_path(check, wide, narrow)
