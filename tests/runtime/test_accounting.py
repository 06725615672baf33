"""Wall time by activity, over kills, restarts and rollbacks."""

import mutations
import pytest
from hypothesis import HealthCheck, given, settings

from xlstm_jax import metrics
from xlstm_jax.errors import UserError
from xlstm_jax.runtime import accounting
from xlstm_jax.runtime.accounting import Goodput


@pytest.fixture
def now(monkeypatch):
  """Seconds that all clocks agree on."""
  now = [1000.0]
  for name in ("time", "perf_counter", "monotonic"):
    monkeypatch.setattr(f"time.{name}", lambda: now[0])
  return now


def begin(workdir, now, *, step, start=5):
  clock = metrics.Clock(accounting.START)
  now[0] += start
  goodput = Goodput(workdir, clock)
  goodput.back_to(step)
  clock.now(accounting.STEP)
  return clock, goodput


def spend(clock, now, activity, seconds):
  with clock.spent_on(activity):
    now[0] += seconds


def test_one_run_accounts_for_every_second(tmp_path, now):
  clock, goodput = begin(tmp_path, now, step=0)
  spend(clock, now, "compile", 10)
  spend(clock, now, "data", 1)
  now[0] += 80
  spend(clock, now, "save", 4)
  expected = {"start": 5, "compile": 10, "data": 1, "step": 80, "save": 4}
  assert goodput.spent() == expected | {"lost": 0}
  record = goodput.record()
  assert record["goodput"] == 0.8
  assert record["time/compile"] == 10
  assert goodput.line() == (
    "80.0% of 1m40s in steps; start 5.0%, compile 10.0%, data wait 1.0%, "
    "saving 4.0%"
  )


def test_work_after_the_checkpoint_and_the_time_away_are_lost(tmp_path, now):
  _, goodput = begin(tmp_path, now, step=0)
  now[0] += 20
  goodput.write(8)
  now[0] += 30
  goodput.write(16)
  now[0] += 7
  # Killed 2 s later, started 100 s after that: from step 8, as 16 was not
  # committed.
  now[0] += 2 + 100
  _, goodput = begin(tmp_path, now, step=8)
  now[0] += 11
  lost = 30 + 7 + 2 + 100
  assert goodput.spent() == {"start": 5 + 5, "step": 20 + 11, "lost": lost}
  assert sum(goodput.spent().values()) == now[0] - 1000
  goodput.write(16)
  # Nothing of the other step 16 is left.
  now[0] += 3
  _, goodput = begin(tmp_path, now, step=16)
  assert goodput.spent() == {"start": 15, "step": 31, "lost": lost + 3}


def test_a_run_that_is_extended_has_not_lost_the_time_since_it_was_finished(
  tmp_path, now
):
  _, goodput = begin(tmp_path, now, step=0)
  now[0] += 20
  goodput.write(8, finished=True)
  now[0] += 1000
  _, goodput = begin(tmp_path, now, step=8)
  now[0] += 7
  assert goodput.spent() == {"start": 5 + 5, "step": 20 + 7, "lost": 0}
  # From here on it is not finished.
  goodput.write(8)
  now[0] += 100
  _, goodput = begin(tmp_path, now, step=8)
  assert goodput.spent() == {"start": 15, "step": 27, "lost": 100}


def test_what_is_rolled_back_is_lost(tmp_path, now):
  clock, goodput = begin(tmp_path, now, step=0)
  now[0] += 20
  goodput.write(8)
  spend(clock, now, "eval", 6)
  now[0] += 30
  goodput.give_up()
  goodput.back_to(8)
  now[0] += 1
  assert goodput.spent() == {"start": 5, "step": 20 + 1, "lost": 6 + 30}


def test_one_process_writes(tmp_path, now, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  _, goodput = begin(tmp_path, now, step=0)
  goodput.write(1)
  assert not list(tmp_path.iterdir())


WRITTEN = (
  '{"written": 900.0, "spent": {"start": 1.5, "step": 20.0, "lost": 0.0}, '
  '"checkpoints": {"8": {"start": 1.5, "step": 15.0}}}'
)


@pytest.mark.parametrize(
  "text",
  [
    *("", "{", "3", "[]", '{"spent": 3}', '{"written": "now"}', "[" * 10**5),
    *(WRITTEN.replace("20.0", n) for n in ("NaN", "1e999", "9" * 999, "-1")),
    WRITTEN.replace("900.0", "Infinity"),
    WRITTEN.replace("900.0", "false").replace("20.0", "NaN"),
    WRITTEN.replace("start", "\\ud800"),
  ],
  ids=range(14),
)
def test_a_damaged_file_costs_the_figures_alone(tmp_path, now, text):
  (tmp_path / accounting.FILE).write_text(text)
  _, goodput = begin(tmp_path, now, step=8)
  now[0] += 5
  assert goodput.spent() == {"start": 5, "step": 5, "lost": 0}


@given(mutations.of(WRITTEN.encode()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_figures_or_none(tmp_path, now, data):
  (tmp_path / accounting.FILE).write_bytes(data)
  _, goodput = begin(tmp_path, now, step=8)
  now[0] += 5
  assert 0 <= goodput.record()["goodput"] <= 1
  assert "in steps" in goodput.line()
  goodput.write(16)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, now):
  _, goodput = begin(tmp_path / "none", now, step=0)
  with pytest.raises(UserError, match=r"goodput\.json cannot be written"):
    goodput.write(1)
