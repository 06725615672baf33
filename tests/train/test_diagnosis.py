"""What rules the memories of a run: sums over all pairs, and whole runs."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import EXPERIMENT, GRACE, prepared

from xlstm_jax import config, metrics
from xlstm_jax.config import RunConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.memory import Observation
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.runtime.status import Status
from xlstm_jax.sharding import MeshConfig, make_mesh
from xlstm_jax.train import diagnosis, kernels, loop

B, T, H, K = 2, 40, 2, 8
NAMES = {
  f"memory/{name}"
  for name in ("tokens_p01", "tokens_median", "divides", "two_parts")
}
# Two documents and padding; one that has the whole row.
SEGMENTS_BT = np.array([[1] * 15 + [2] * 20 + [0] * 5, [1] * 40], np.int32)


def arrays(first: float, *, spread: float = 1.0):
  """q, k, i, f; the first token of each document adds `first` to its i."""
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, B, T, H, K))
  i, f = rng.normal(size=(2, B, T, H)) * spread
  start_BT = np.diff(SEGMENTS_BT, axis=1, prepend=0) > 0
  i += np.where(start_BT[..., None], first, 0)
  return [jnp.float32(x) for x in (q, k, i, f + 4)]


def rule_of(given, **options):
  def rule(*given):
    layer = Observation._make([*given, MLSTMConfig(**options)])
    return diagnosis.rule(layer, jnp.asarray(SEGMENTS_BT), chunk=128)

  return jax.jit(rule)(*given)


def direct(given, input_gate):
  """Tokens that rule, and |n^T q| K^-0.5, in float64; NaN at padding."""
  q, k, i, f = (np.asarray(x, np.float64) for x in given)
  log_i = i if input_gate == "exp" else -np.logaddexp(0, -i)
  log_f = -np.logaddexp(0, -f)
  tokens, size = np.full((2, B, T, H), np.nan)
  for b, t, h in np.ndindex(B, T, H):
    if SEGMENTS_BT[b, t]:
      same = SEGMENTS_BT[b, : t + 1] == SEGMENTS_BT[b, t]
      s = np.flatnonzero(same)
      kept = np.array([log_f[b, r + 1 : t + 1, h].sum() for r in s])
      w = np.exp(log_i[b, s, h] + kept)
      tokens[b, t, h] = np.sum(w**2) ** 2 / np.sum(w**4)
      size[b, t, h] = abs(w @ (k[b, s, h] @ q[b, t, h])) * K**-0.5
  return tokens, size


@pytest.mark.parametrize(
  ("first", "input_gate"),
  # A last gate far below m_0 = 0, where weights scaled by exp(-m) vanish.
  [(0.0, "exp"), (15.0, "exp"), (-60.0, "exp"), (3.0, "sigmoid")],
)
def test_the_recurrence_is_the_sum_over_all_pairs(first, input_gate):
  given = arrays(first)
  tokens, size = direct(given, input_gate)
  rule = rule_of(given, input_gate=input_gate)
  np.testing.assert_allclose(rule.tokens_BTH, tokens, rtol=1e-5)
  # float32 decides otherwise only at the border.
  assert np.nanmin(np.abs(size - 1)) > 1e-4
  divides = np.where(np.isnan(size), np.nan, size > 1)
  np.testing.assert_array_equal(rule.divides_BTH, divides)


def test_a_memory_that_one_token_rules_is_seen():
  ruled, ordinary, plain = (
    {name: float(x) for name, x in diagnosis.summary(rule).items()}
    for rule in (
      rule_of(arrays(15.0)),
      rule_of(arrays(0.0, spread=0.3)),
      rule_of(arrays(15.0), normalize=False),
    )
  )
  assert ruled["tokens_p01"] == pytest.approx(1)
  assert ruled["tokens_median"] == pytest.approx(1, abs=1e-3)
  assert (ruled["two_parts"], ordinary["two_parts"]) == (1, 0)
  assert ordinary["tokens_median"] > 5
  assert 0.1 < ordinary["divides"] < 0.9
  # Without a normaliser there is none that divides.
  assert plain["tokens_p01"] == ruled["tokens_p01"]
  assert (plain["divides"], plain["two_parts"]) == (0, 0)


def test_figures_are_those_of_the_first_part_on_any_mesh():
  model = ModelConfig(
    vocab_size=11,
    width=16,
    num_blocks=2,
    mlstm=MLSTMConfig(num_heads=2, round_to=16),
  )
  compute = Compute(dtype="float32", scan=True, remat="block")
  definition = Definition(model, compute)
  rng = np.random.default_rng(0)
  # Those of `init` give every token the same gates.
  params = jax.tree.map(
    lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), definition.abstract()
  )
  batch = {
    "inputs": jnp.asarray(rng.integers(11, size=(8, T)), jnp.int32),
    "segments": jnp.asarray(np.repeat(SEGMENTS_BT, 4, axis=0)),
  }

  def figures(mesh, batch, accumulation):
    cfg = RunConfig(model=model, compute=compute, accumulation=accumulation)
    run: Any = types.SimpleNamespace(cfg=cfg, definition=definition, mesh=mesh)
    with jax.set_mesh(mesh):
      return diagnosis.figures(run, params, batch)

  one = make_mesh(MeshConfig(), jax.devices()[:1])
  eight = make_mesh(MeshConfig(data=2, tensor=2, sequence=2))
  found = figures(eight, batch, 2)
  assert found.keys() == NAMES | {f"{n}/{at}" for n in NAMES for at in (0, 1)}
  expected, others = (
    figures(one, {name: x[part::2] for name, x in batch.items()}, 1)
    for part in (0, 1)
  )
  assert found == pytest.approx(expected, rel=1e-5)
  name = "memory/tokens_median"
  assert expected[f"{name}/0"] != expected[f"{name}/1"]
  assert others[name] != pytest.approx(expected[name], rel=1e-3)


@pytest.mark.slow
def test_a_run_that_is_watched_trains_the_same(tmp_path, capsys, monkeypatch):
  data = prepared(tmp_path, "data", "--tokenizer=byte")
  path = tmp_path / "experiment.py"
  path.write_text(EXPERIMENT)
  cfg = config.from_experiment(
    str(path), [f"--config.data.paths={data}", f"--config.{GRACE}"]
  )
  cfg = dataclasses.replace(
    cfg,
    optim=dataclasses.replace(cfg.optim, warmup_steps=1),
    steps=3,
    eval_every=None,
    compilation_cache=None,
  )
  # Both have the same step, which is compiled once.
  checked_step, steps = kernels.checked_step, []

  def step_of(run):
    steps[:] = steps or [checked_step(run)]
    return steps[0]

  monkeypatch.setattr(kernels, "checked_step", step_of)
  assert loop.train(cfg, tmp_path / "plain") == Status.DONE
  assert "\nmemory " not in capsys.readouterr().out
  watched = dataclasses.replace(cfg, diagnose_every=2)
  assert loop.train(watched, tmp_path / "watched") == Status.DONE
  lines = capsys.readouterr().out.splitlines()
  lines = [line for line in lines if line.startswith("memory ")]
  assert len(lines) == 2
  assert lines[0].startswith("memory    2  ruled by ")

  records = metrics.trajectory(tmp_path / "watched")
  found = [r for r in records if "memory/divides" in r]
  assert [r["step"] for r in records] == [1, 2, 2, 3, 3]
  # The last step is not due, but recorded.
  assert [r["step"] for r in found] == [2, 3]
  for record in found:
    assert record.keys() == {"step", *NAMES, *(f"{name}/0" for name in NAMES)}
    assert np.all(np.isfinite([*record.values()]))
    assert 1 <= record["memory/tokens_p01"] <= record["memory/tokens_median"]
  rest = [r for r in records if r not in found]
  assert rest == metrics.trajectory(tmp_path / "plain")
