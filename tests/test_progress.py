"""Progress and the form in which checkpoints hold it."""

import json

import pytest

from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.progress import LossHistory, Progress, WindowOrder

CFG = DataConfig(paths=("a", "b"), context=32, seed=3, weights=(1.0, 2.0))
PROGRESS = Progress(
  step=7,
  windows=56,
  skipped=2,
  seed=1,
  tokenizer="t",
  data=["a", "b"],
  order=WindowOrder.of(CFG),
  health=LossHistory(2, [3.5, 3.25], 1, [[4.0, 0.5]]),
  owes_evaluation=True,
)
SAVED: dict = {
  "step": 7,
  "windows": 56,
  "skipped": 2,
  "seed": 1,
  "tokenizer": "t",
  "data": ["a", "b"],
  "order": {"context": 32, "shuffle": True, "seed": 3, "weights": [1.0, 2.0]},
  "health": {
    "skipped": 2,
    "losses": [3.5, 3.25],
    "fresh": 1,
    "levels": [[4.0, 0.5]],
  },
  "owes_evaluation": True,
}


def test_the_saved_form_is_that_of_every_version():
  assert json.dumps(PROGRESS.to_json()) == json.dumps(SAVED)
  assert Progress.from_json(json.loads(json.dumps(SAVED)), "4") == PROGRESS


def test_checkpoints_of_older_versions_lack_some_of_it():
  older = {**SAVED}
  del older["order"], older["skipped"]
  progress = Progress.from_json(older, "4")
  assert progress.order is None
  assert progress.skipped is None


def test_checkpoints_of_newer_versions_may_have_more():
  newer = {**SAVED, "mood": "good", "health": {**SAVED["health"], "x": 1}}
  assert Progress.from_json(newer, "4") == PROGRESS


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"windows": "x"}, r"run/4: \$\.windows is 'x'; it must be an integer"),
    ({"health": {"losses": 3}}, r"\$\.health\.losses is 3"),
  ],
)
def test_a_damaged_progress_is_named(changes, message):
  with pytest.raises(UserError, match=message):
    Progress.from_json({**SAVED, **changes}, "run/4")
