"""Batches in order, without what is left out; waits that are given up."""

import collections
import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from xlstm_jax import sharding
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.errors import UserError
from xlstm_jax.plan import machines
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import feed
from xlstm_jax.train.feed import Feed
from xlstm_jax.train.rollbacks import Rollback

CFG = RunConfig(data=DataConfig(context=4), batch_size=8)


@pytest.fixture
def run():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
  return types.SimpleNamespace(cfg=CFG, mesh=mesh)


def numbered(cfg, *, batch_size, position, rows=slice(None)):
  """Batches whose entries tell their number, row and place."""
  B, T = batch_size, cfg.context
  while True:
    batch_BT = 100 * position + np.arange(B * T).reshape(B, T)
    yield {"inputs": batch_BT[rows]}
    position += 1


def read(feeding, count):
  found = []
  for _ in range(count):
    item = feeding.next(unless=lambda: False)
    assert item is not None
    number, batch = item
    expected = next(
      numbered(CFG.data, batch_size=CFG.batch_size, position=number)
    )
    np.testing.assert_array_equal(batch["inputs"], expected["inputs"])
    found.append(number)
  feeding.close()
  return found


def test_what_is_left_out_is_jumped_at_the_start_and_on_the_way(
  run, monkeypatch
):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  left_out = [
    Rollback(found=1, reason="r", to=0, first=8 * first, stop=8 * stop)
    for first, stop in ((3, 5), (7, 8), (8, 10))
  ]
  assert read(Feed(run, 0, ()), 4) == [0, 1, 2, 3]
  assert read(Feed(run, 1, left_out), 6) == [1, 2, 5, 6, 10, 11]
  assert read(Feed(run, 4, left_out), 2) == [5, 6]


def test_a_wait_is_given_up_when_told(run, monkeypatch):
  never = threading.Event()

  def stuck(*_, **__):
    never.wait()
    yield from ()

  monkeypatch.setattr(feed.pipeline, "batches", stuck)
  feeding = Feed(run, 0, ())
  answers = iter([False, True])
  assert feeding.next(unless=lambda: next(answers)) is None
  feeding.close()
  never.set()


def test_data_that_are_there_are_given_in_any_case(run, monkeypatch):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  assert read(Feed(run, 2, ()), 1) == [2]


@pytest.mark.parametrize("error", [UserError("Altered."), MemoryError()])
def test_errors_of_the_reader_are_raised_where_it_is_read(
  run, monkeypatch, error
):
  def broken(*_, **__):
    raise error
    yield

  monkeypatch.setattr(feed.pipeline, "batches", broken)
  feeding = Feed(run, 0, ())
  with pytest.raises(type(error)):
    feeding.next(unless=lambda: False)
  feeding.close()


def test_a_feed_that_nobody_reads_ends(run, monkeypatch):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  feeding = Feed(run, 0, ())
  feeding.close()
  feeding._thread.join(300)
  assert not feeding._thread.is_alive()


def test_the_batch_size_counts_the_windows(run, monkeypatch):
  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  run.cfg = dataclasses.replace(CFG, batch_size=4)
  left_out = [Rollback(found=1, reason="r", to=0, first=8, stop=18)]
  feeding = Feed(run, 0, left_out)
  numbers = []
  for _ in range(4):
    item = feeding.next(unless=lambda: False)
    assert item is not None
    numbers.append(item[0])
  feeding.close()
  assert numbers == [0, 1, 5, 6]


Device = collections.namedtuple("Device", ["id", "process_index"])


@pytest.mark.parametrize(
  ("mesh", "owners", "expected"),
  [
    (MeshConfig(), [0] * 8, [[*range(16)]]),
    (
      MeshConfig(data=2, fsdp=2, tensor=2),
      [0, 0, 1, 1, 2, 2, 3, 3],
      [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    ),
    # Processes that split heads or time read the same rows.
    (MeshConfig(data=1, tensor=8), [0] * 4 + [1] * 4, 2 * [[*range(16)]]),
    (
      MeshConfig(data=2, sequence=4),
      [0, 0, 1, 1, 2, 2, 3, 3],
      2 * [[*range(8)]] + 2 * [[*range(8, 16)]],
    ),
    # Squares of a torus.
    (
      MeshConfig(),
      [0, 0, 1, 1, 1, 1, 0, 0],
      [[0, 1, 2, 3, 12, 13, 14, 15], [*range(4, 12)]],
    ),
  ],
)
def test_a_process_reads_the_rows_of_its_devices(mesh, owners, expected):
  where = sharding.batch_sharding(sharding.make_mesh(mesh))
  held = {
    Device(device.id, owners[device.id]): at
    for device, at in where.devices_indices_map((16, 8)).items()
  }
  of_others = types.SimpleNamespace(devices_indices_map=lambda _: held)
  for process, rows in enumerate(expected):
    assert feed.share(of_others, (16, 8), process).tolist() == rows


PODS = [
  ("v5e:4x4", MeshConfig(data=16)),
  ("v5e:4x4", MeshConfig(data=2, fsdp=2, tensor=2, sequence=2)),
  ("v5e:16x16", MeshConfig(data=32, fsdp=8)),
  ("v5p:4x4x4", MeshConfig(data=1, fsdp=64)),
  ("v5p:4x4x4", MeshConfig(data=4, fsdp=4, tensor=4)),
  ("v5p:8x8x8", MeshConfig(data=64, fsdp=8)),
  ("v5p:8x8x8", MeshConfig(data=8, fsdp=64)),
  ("v5p:8x8x8", MeshConfig(data=1, fsdp=512)),
  ("v5p:8x8x8", MeshConfig(data=512)),
  ("v5p:8x8x8", MeshConfig(data=8, fsdp=16, tensor=2, sequence=2)),
]


@pytest.fixture
def pod(request, monkeypatch):
  """A mesh on a TPU slice that is not there, and its hosts."""
  pytest.importorskip("libtpu")
  for name, value in machines._LIBTPU.items():
    monkeypatch.setenv(name, value)
  topology, cfg = request.param
  mesh = sharding.make_mesh(cfg, machines.machine(topology).devices)
  hosts = sorted({device.process_index for device in mesh.devices.flat})
  assert len(hosts) == mesh.size // 4
  return mesh, hosts


@pytest.mark.parametrize("pod", PODS, indirect=True)
def test_the_hosts_of_a_pod_read_the_whole_batch(pod):
  mesh, hosts = pod
  where, shape = sharding.batch_sharding(mesh), (2 * mesh.size, 8)
  rows = {host: feed.share(where, shape, host) for host in hosts}
  every = np.unique(np.concatenate([*rows.values()]))
  np.testing.assert_array_equal(every, np.arange(shape[0]))
  for device, at in where.devices_indices_map(shape).items():
    wanted = np.arange(shape[0])[at[0]]
    assert np.isin(wanted, rows[device.process_index]).all()
  if mesh.shape["tensor"] == 1:
    # Nothing is read twice.
    assert sum(map(len, rows.values())) == shape[0]


@pytest.mark.parametrize("pod", PODS, indirect=True)
def test_every_chip_of_a_pod_gets_its_part(pod, monkeypatch):
  mesh, hosts = pod
  cfg = dataclasses.replace(CFG, batch_size=2 * mesh.size)
  run = types.SimpleNamespace(cfg=cfg, mesh=mesh)
  whole = next(numbered(cfg.data, batch_size=cfg.batch_size, position=0))

  def parts(shape, where, of):
    indices = where.devices_indices_map(shape)
    return {d: of(at) for d, at in indices.items() if d.process_index == host}

  monkeypatch.setattr(feed.pipeline, "batches", numbered)
  monkeypatch.setattr(jax, "make_array_from_callback", parts)
  indices = sharding.batch_sharding(mesh).devices_indices_map(
    whole["inputs"].shape
  )
  for host in {hosts[0], hosts[len(hosts) // 3], hosts[-1]}:
    monkeypatch.setattr(jax, "process_index", lambda n=host: n)
    feeding = Feed(run, 0, ())
    _, batch = feeding.next(unless=lambda: False)
    feeding.close()
    assert len(batch["inputs"]) == 4
    for device, part in batch["inputs"].items():
      np.testing.assert_array_equal(part, whole["inputs"][indices[device]])
