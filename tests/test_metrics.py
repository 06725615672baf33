"""Records that outlive a killed process, and the arithmetic of rates."""

import errno
import itertools
import math
import struct
import time

import mutations
import pytest
from hypothesis import given

from xlstm_jax import metrics
from xlstm_jax.errors import UserError


def test_records_return_as_they_were_written(tmp_path):
  log = metrics.Log(tmp_path, step=0)
  log.write(1, {"loss": 0.1 + 0.2})
  log.write(2, {"loss": math.nan, "grad_norm": math.inf})
  assert metrics.read(tmp_path) == [
    {"step": 1, "loss": 0.1 + 0.2},
    {"step": 2, "loss": None, "grad_norm": None},
  ]
  log.close()


def events(workdir):
  """What TensorBoard reads: length, its checksum, event, its checksum."""
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield metrics.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_gets_the_same_and_forgets_what_lies_ahead(tmp_path):
  log = metrics.Log(tmp_path, step=4)
  log.write(5, {"loss": 0.5, "grad_norm": math.inf})
  log.close()
  version, start, record = events(tmp_path)
  assert version.file_version == "brain.Event:2"
  assert start.step == 5
  assert start.session_log.status == metrics.SessionLog.START
  assert record.step == 5
  assert {v.tag: v.simple_value for v in record.summary.value} == {
    "loss": 0.5,
    "grad_norm": math.inf,
  }


class FullDisk:
  def write(self, text):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
  log = metrics.Log(tmp_path, step=0)
  with monkeypatch.context() as patched:
    patched.setattr(log, "_file", FullDisk())
    with pytest.raises(UserError, match="No space left on device"):
      log.write(1, {"loss": 1.0})
  log.close()
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    metrics.Log(tmp_path / "file", step=0)


def test_a_run_that_continues_drops_what_lies_ahead(tmp_path):
  log = metrics.Log(tmp_path, step=0)
  for step in (1, 2, 2, 3):
    log.write(step, {"loss": step})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')
  log = metrics.Log(tmp_path, step=2)
  assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 2]
  log.write(3, {"loss": 30})
  log.close()
  assert metrics.read(tmp_path)[-1] == {"step": 3, "loss": 30}


def test_a_metric_that_is_measured_again_is_dropped_at_that_step(tmp_path):
  log = metrics.Log(tmp_path, step=0)
  for step in (1, 2):
    log.write(step, {"loss": 1})
    log.write(step, {"eval_loss": step})
  log.close()
  metrics.Log(tmp_path, step=2, without="eval_loss").close()
  assert [sorted(r) for r in metrics.read(tmp_path)] == [
    *(["loss", "step"], ["eval_loss", "step"]),
    ["loss", "step"],
  ]


@pytest.mark.parametrize(
  "torn",
  ['{"step": 4, "lo', "4", "[1]", "{}", "", '{"step": null}', "[" * 10**5],
)
def test_half_a_line_is_dropped(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{torn}')
  metrics.Log(tmp_path, step=9).close()
  assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
  "line",
  [b"", b'{"step": 2, "lo', b'{"step": "2"}', b"\xff", b"[" * 10**5, b"{}"],
  ids=range(6),
)
def test_a_damaged_line_is_told_and_nothing_is_dropped(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
  before = path.read_bytes()
  with pytest.raises(UserError, match=r"damaged in line 2.*delete that line"):
    metrics.read(tmp_path)
  with pytest.raises(UserError, match="damaged in line 2"):
    metrics.Log(tmp_path, step=9)
  assert path.read_bytes() == before


@given(
  mutations.of(b'{"step": 1, "loss": 2.5}\n{"step": 2}\n{"step": 3, "a": 1}\n')
)
def test_any_bytes_are_records_or_refused(tmp_path_factory, data):
  workdir = tmp_path_factory.getbasetemp()
  path = workdir / "metrics.jsonl"
  path.write_bytes(data)
  try:
    records = metrics.read(workdir)
    metrics._drop_after(path, 2, "a")
  except UserError:
    assert path.read_bytes() == data
  else:
    until = itertools.takewhile(lambda record: record["step"] <= 2, records)
    kept = [r for r in until if r["step"] < 2 or "a" not in r]
    assert metrics.read(workdir) == kept


def test_a_run_without_records_has_none(tmp_path):
  assert metrics.read(tmp_path) == []


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  log = metrics.Log(tmp_path, step=0)
  log.write(1, {"loss": 1.0})
  log.close()
  assert not list(tmp_path.iterdir())


def test_the_clock_counts_one_activity_at_a_time(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  clock = metrics.Clock("step")
  for seconds in (1, 2):
    with clock.spent_on("data"):
      now[0] += seconds
      assert clock.activity == "data"
  with clock.spent_on("save"):
    now[0] += 4
    assert clock.spent() == {"step": 0, "data": 3, "save": 4}
  now[0] += 8
  assert clock.changes == 6
  assert clock.lap() == {"step": 8, "data": 3, "save": 4}
  now[0] += 1
  assert clock.lap() == {"step": 1}
  clock.now("eval")
  now[0] += 5
  assert clock.lap() == {"eval": 5}
  assert clock.spent() == {"step": 9, "data": 3, "save": 4, "eval": 5}


def test_a_change_is_counted_before_it_is_made():
  """The watchdog, in another thread, reads them the other way round."""

  class Clock(metrics.Clock):
    def __setattr__(self, name, value):
      changed.append(name)
      super().__setattr__(name, value)

  changed = []
  clock = Clock("start")
  changed.clear()
  clock.now("step")
  assert changed.index("changes") < changed.index("activity")


def test_peaks_are_known_by_kind_of_device():
  assert metrics.peak_flops("NVIDIA H200") == 989e12
  assert metrics.peak_flops("TPU v5 lite") == 197e12
  assert metrics.peak_flops("cpu") is None


def test_perplexity_overflows_to_infinity():
  assert metrics.perplexity(math.log(7)) == pytest.approx(7)
  assert metrics.perplexity(1e4) == math.inf


@pytest.mark.parametrize(
  ("number", "text"),
  [(0.5, "0.5"), (999.4, "999"), (12345, "12.3k"), (4.56e13, "45.6T")],
)
def test_numbers_are_short(number, text):
  assert metrics.short(number) == text


def test_durations_are_readable():
  assert metrics.duration(59.6) == "1m00s"
  assert metrics.duration(728) == "12m08s"
  assert metrics.duration(11100) == "3h05m"
