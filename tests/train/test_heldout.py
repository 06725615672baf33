"""The evaluation of a run: what it computes beside its held-out text."""

import types

import jax
import pytest
from data.small_datasets import write_dataset

from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.evaluate import perplexity
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.sharding import MeshConfig, make_mesh
from xlstm_jax.train import heldout


@pytest.mark.parametrize("limit", [None, 100, 10**6])
def test_a_context_longer_than_the_text_costs_no_more(
  tmp_path, monkeypatch, limit
):
  data = write_dataset(
    tmp_path / "data", [(b"a", 0)], heldout=[(b"some text", 0), (b"more", 1)]
  )
  cfg = RunConfig(
    model=ModelConfig(vocab_size=257, width=16, num_blocks=1),
    data=DataConfig(paths=(str(data),), context=2**20),
    compute=Compute(dtype="float32"),
    batch_size=32,
    accumulation=2,
    eval_every=1,
    eval_tokens=limit,
  )
  definition = Definition(cfg.model, cfg.compute)
  run = types.SimpleNamespace(
    cfg=cfg,
    heldout=heldout.opened(cfg),
    definition=definition,
    mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
  )
  params = definition.init(jax.random.key(0))
  shapes, put = [], perplexity._put

  def counting(batch, mesh):
    shapes.append(batch["inputs"].shape)
    return put(batch, mesh)

  monkeypatch.setattr(perplexity, "_put", counting)
  found = heldout.scores(run, params, before_batch=lambda: None)
  assert shapes == [(1, 64)]
  expected = perplexity.evaluate_split(
    definition,
    params,
    run.heldout[0],
    context="document",
    batch_size=1,
    mesh=run.mesh,
  )
  assert found["eval_loss"] == pytest.approx(expected.total.loss, rel=2e-6)
  assert found["eval_loss/b"] == pytest.approx(
    expected.sources["b"].loss, rel=2e-6
  )
