"""What is found in a sequence of losses, also by a run that was continued."""

import dataclasses
import json
import math

import numpy as np
import pytest

from xlstm_jax.config import HealthConfig
from xlstm_jax.progress import LossHistory
from xlstm_jax.train.health import Health

CFG = HealthConfig(
  max_skipped=2, window=4, spike_deviations=3.0, rise_windows=2
)


def findings(losses, cfg=CFG, *, cut=None, grad_norm=1.0):
  """(step, serious) of all findings; continued from JSON after `cut`."""
  health, found = Health(cfg), []
  for step, loss in enumerate(losses):
    if step == cut:
      saved = json.loads(json.dumps(dataclasses.asdict(health.history())))
      health = Health(cfg, LossHistory(**saved))
    one = health.see(step, loss=loss, grad_norm=grad_norm)
    if one is not None:
      assert one.step == step
      found.append((step, one.serious))
  return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_too_many_skipped_in_a_row_are_serious(bad):
  losses = [1, bad, bad, 1, bad, bad, bad]
  expected = [(1, False), (2, False), (4, False), (5, False), (6, True)]
  assert findings(losses) == expected
  assert findings([1.0], grad_norm=bad) == [(0, False)]


def test_a_spike_is_measured_against_a_whole_window():
  # Mean 2, deviation 1 over four.
  window = [1, 3, 1, 3]
  assert findings([*window, 5.0]) == []
  assert findings([*window, 5.01]) == [(4, True)]
  assert findings([*window[1:], 50]) == []
  off = HealthConfig(window=4, spike_deviations=None)
  assert findings([*window, 50], off) == []


def test_what_was_skipped_or_is_old_is_no_part_of_the_window():
  losses = [9, 9, 9, 9, 1, math.nan, 3, 1, 3]
  wide = HealthConfig(window=4, spike_deviations=3.0)
  assert findings([*losses, 5.0], wide) == [(5, False)]
  assert findings([*losses, 5.01], wide) == [(5, False), (9, True)]


def test_a_loss_that_rises_slowly_is_told():
  noise = [0.1, -0.1, 0.1, -0.1]

  def run(levels):
    return findings([level + n for level in levels for n in noise], slow)

  slow = HealthConfig(window=4, rise_windows=2)
  assert run([3, 2, 1, 1]) == []
  # Windows end at 3, 7, 11, 15; each is compared with the one two before.
  assert run([1, 2, 2, 2]) == [(11, False)]
  assert run([1, 1.1, 1.2, 1.3]) == []
  assert run([1, 1.2, 1.3, 1.4]) == [(11, False)]
  assert run([1, 1, 1, 1]) == []


def test_a_continued_run_finds_the_same():
  rng = np.random.default_rng(0)
  losses = rng.normal(3, 1, 60) + np.linspace(0, 6, 60)
  losses[rng.random(60) < 0.3] = math.nan
  losses[40] = 30
  expected = findings(losses)
  assert len({serious for _, serious in expected}) == 2
  for cut in range(60):
    assert findings(losses, cut=cut) == expected
