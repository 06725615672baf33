"""Saving, keeping, restoring on other meshes, and failing without loss."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import pytest
import tensorstore
from etils import epath
from hypothesis import given
from orbax.checkpoint._src.serialization import ocdbt_utils

from xlstm_jax import checksums, sharding
from xlstm_jax.checkpoints import (
  CheckpointConfig,
  Checkpoints,
  SaveTimer,
  _entries,
)
from xlstm_jax.errors import UserError
from xlstm_jax.sharding import MeshConfig

SAVING = pathlib.Path(__file__).with_name("saving.py")
AXES = {"blocks": {"0": {"weight": ("width", "heads")}}, "scale": ("width",)}


def tree(value=0.0):
  weight = jnp.arange(64.0).reshape(16, 4) + value
  return {"blocks": {"0": {"weight": weight}}, "scale": jnp.ones(16) * value}


def placed(mesh, value=0.0):
  x = tree(value)
  return jax.device_put(x, sharding.shardings(mesh, AXES, x))


def abstract(mesh):
  x = tree()
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    x,
    sharding.shardings(mesh, AXES, x),
  )


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def mesh():
  return sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))


def save(checkpoints, mesh, step, loss=None):
  metrics = None if loss is None else {"eval_loss": loss}
  items = {
    "params": placed(mesh, step),
    "optimizer": {"mu": placed(mesh, -step)},
    "progress": {"step": step},
  }
  checkpoints.save(step, items, metrics)


def test_a_state_returns_on_another_mesh(tmp_path, mesh):
  checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig())
  assert checkpoints.latest() is None
  assert checkpoints.best() is None
  save(checkpoints, mesh, 3)
  checkpoints.close()
  other = sharding.make_mesh(MeshConfig(fsdp=8))
  reader = Checkpoints(tmp_path / "c")
  got = reader.restore(
    3,
    {
      "params": abstract(other),
      "optimizer": {"mu": abstract(other)},
      "progress": None,
    },
  )
  assert_equal(got["params"], tree(3))
  assert_equal(got["optimizer"]["mu"], tree(-3))
  assert got["progress"] == {"step": 3}
  assert got["params"]["scale"].sharding == abstract(other)["scale"].sharding


@pytest.mark.parametrize(
  "name",
  [
    *(b"slstm_at=[1]", b"back\\slash", b"a* {b,c}?", b"a\nline"),
    *("\u4e2d\u00e9".encode(), b"no \xff text"),
  ],
)
def test_folders_of_any_name_hold_checkpoints(tmp_path, mesh, name):
  folder = tmp_path / os.fsdecode(name) / "c"
  cfg = CheckpointConfig(keep_latest=1, keep_best=0)
  checkpoints = Checkpoints(folder, cfg)
  for step in (1, 2):
    save(checkpoints, mesh, step)
  checkpoints.close()
  assert [path.name for path in folder.iterdir()] == ["2"]
  assert (folder / "2" / "params" / "manifest.ocdbt").exists()
  again = Checkpoints(folder, cfg)
  assert again.latest() == 2
  again.close()
  plain = tmp_path / "plain"
  shutil.copytree(folder, plain)
  for place in (folder, plain):
    got = Checkpoints(place).restore(2, {"params": abstract(mesh)})
    assert_equal(got["params"], tree(2))


def test_a_folder_that_cannot_be_reached_is_refused(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file/c of .* written: Not a directory"):
    Checkpoints(tmp_path / "file" / "c", CheckpointConfig())
  monkeypatch.setattr(type(tmp_path), "exists", lambda _: False)
  monkeypatch.setattr(epath.Path, "exists", lambda _: False, raising=False)
  monkeypatch.setattr(type(epath.Path()), "exists", lambda _: False)
  with pytest.raises(UserError, match=r"\[1\] on this system.* no /proc"):
    Checkpoints(tmp_path / "[1]", CheckpointConfig())


def test_params_return_alone(tmp_path, mesh):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  save(checkpoints, mesh, 1)
  checkpoints.close()
  got = Checkpoints(tmp_path).restore(1, {"params": abstract(mesh)})
  assert set(got) == {"params"}
  assert_equal(got["params"], tree(1))


def test_latest_best_and_every_nth_are_kept(tmp_path, mesh):
  cfg = CheckpointConfig(keep_latest=2, keep_best=1, keep_every=4)
  checkpoints = Checkpoints(tmp_path, cfg)
  losses = {2: 3.0, 3: 2.0, 5: 2.5, 6: float("nan")}
  for step in range(1, 9):
    save(checkpoints, mesh, step, losses.get(step))
  checkpoints.close()
  again = Checkpoints(tmp_path, cfg)
  assert again.steps() == [3, 4, 7, 8]
  assert again.best() == 3
  assert again.latest() == 8
  again.close()


def test_the_first_step_after_some_minutes_is_kept(tmp_path, mesh):
  cfg = CheckpointConfig(keep_latest=1, keep_best=0, keep_minutes=60)
  checkpoints = Checkpoints(tmp_path, cfg)
  for step in range(1, 5):
    save(checkpoints, mesh, step)
  checkpoints.close()
  # Within the hour the first, and the latest.
  assert Checkpoints(tmp_path).steps() == [1, 4]


def test_a_checkpoint_is_due_after_some_minutes_and_again():
  now = [100.0]
  timer = SaveTimer(0.5, lambda: now[0])
  never = SaveTimer(None, lambda: now[0])
  due = []
  for _ in range(8):
    now[0] += 10
    due.append(timer.due())
    assert not never.due()
    if due[-1]:
      timer.saved()
  assert due == [False, False, True] * 2 + [False, False]


def test_the_best_of_runs_without_evaluation_is_the_newest(tmp_path, mesh):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  for step in (1, 2):
    save(checkpoints, mesh, step)
  checkpoints.wait()
  assert checkpoints.best() == 2
  checkpoints.close()


def test_a_saved_state_may_be_donated_at_once(tmp_path, mesh):
  step = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_latest=5))
  big = jax.device_put(
    jnp.zeros((1024, 1024)),
    jax.NamedSharding(mesh, jax.P("fsdp", "tensor")),
  )
  for n in range(5):
    # As a run whose loss is not finite.
    progress = {"loss": float("nan"), "none": None, "1": [1.5, float("inf")]}
    checkpoints.save(n, {"params": {"x": big}, "progress": progress})
    for _ in range(3):
      big = step(big)
  checkpoints.close()
  like = {
    "x": jax.ShapeDtypeStruct(big.shape, big.dtype, sharding=big.sharding)
  }
  reader = Checkpoints(tmp_path)
  for n in range(5):
    got = reader.restore(n, {"params": like})["params"]["x"]
    np.testing.assert_array_equal(got, 3.0 * n)


def test_only_committed_steps_exist(tmp_path, mesh):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  save(checkpoints, mesh, 1)
  checkpoints.close()
  (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
  reader = Checkpoints(tmp_path)
  assert reader.steps() == [1]
  reader.close()
  assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
  writer = Checkpoints(tmp_path, CheckpointConfig())
  save(writer, mesh, 3)
  writer.close()
  assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_a_reader_leaves_the_folder_alone(tmp_path, mesh):
  reader = Checkpoints(tmp_path / "none")
  assert reader.latest() is None
  with pytest.raises(ValueError, match="read only"):
    save(reader, mesh, 1)
  reader.close()
  assert not (tmp_path / "none").exists()


def test_another_structure_is_named_leaf_by_leaf(tmp_path, mesh):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  save(checkpoints, mesh, 1)
  checkpoints.close()
  wanted = abstract(mesh)
  wanted["blocks"] = {"1": wanted["blocks"]["0"]}
  wanted["scale"] = jax.ShapeDtypeStruct((8,), jnp.float32)
  with pytest.raises(UserError) as error:
    Checkpoints(tmp_path).restore(1, {"params": wanted})
  message = str(error.value)
  assert "blocks/0/weight is not part of this model" in message
  assert "blocks/1/weight is missing" in message
  assert "scale is (16,), not (8,)" in message


def test_missing_steps_and_items_are_user_errors(tmp_path, mesh):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, {"params": placed(mesh)})
  checkpoints.close()
  reader = Checkpoints(tmp_path)
  with pytest.raises(UserError, match=r"no checkpoint of step 2 .* \[1\]"):
    reader.restore(2, {"params": abstract(mesh)})
  with pytest.raises(UserError, match="has no 'optimizer'"):
    reader.restore(1, {"optimizer": {"mu": abstract(mesh)}})


# A file size limit stands for the full disk: writes fail, the folder lives.
FULL_DISK = """
  import resource, signal, sys
  import jax, numpy as np
  from xlstm_jax.checkpoints import CheckpointConfig, Checkpoints
  from xlstm_jax.errors import UserError

  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  noise = np.random.default_rng(0).standard_normal((256, 256))
  items = {"params": {"x": jax.device_put(noise)}, "progress": {"step": 1}}
  checkpoints = Checkpoints(sys.argv[1], CheckpointConfig())
  checkpoints.save(1, items)
  checkpoints.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  for limit in (100_000, 10):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
      checkpoints.save(2, items)
      checkpoints.wait()
    except UserError as error:
      print(error)
    print(checkpoints.steps())
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  checkpoints.save(2, items)
  checkpoints.close()
"""


def test_a_full_disk_is_reported_and_the_last_good_step_stays(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)],
    capture_output=True,
    text=True,
    # A machine that is busy with others imports for minutes.
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  errors = [s for s in done.stdout.splitlines() if "could not be written" in s]
  assert len(errors) == 2
  assert all(
    "(File too large)" in s and "step 1 is intact" in s for s in errors
  )
  assert done.stdout.splitlines().count("[1]") == 2
  assert Checkpoints(tmp_path).steps() == [1, 2]
  left = [path.name for path in pathlib.Path(tmp_path).iterdir()]
  assert sorted(left) == ["1", "2"]


# Damage.


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A folder with the steps 1 and 2."""
  folder = tmp_path_factory.mktemp("checkpoints") / "c"
  checkpoints = Checkpoints(folder, CheckpointConfig())
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  save(checkpoints, mesh, 1, loss=2.0)
  save(checkpoints, mesh, 2, loss=1.0)
  checkpoints.close()
  return folder


@pytest.fixture
def copy(two_steps, tmp_path):
  return pathlib.Path(shutil.copytree(two_steps, tmp_path / "c"))


def values_of(step):
  """The largest file of the parameters: where their values are."""
  paths = [p for p in (step / "params").rglob("d/*") if p.is_file()]
  return max(paths, key=lambda path: path.stat().st_size)


def flip(path, at=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if at is None else at] ^= 4
  path.write_bytes(data)


def halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, pathlib.Path.unlink])
def test_damage_to_any_file_of_the_newest_step_is_found(copy, damage):
  paths = [p for p in (copy / "2").rglob("*") if p.is_file()]
  # Written by Orbax at the commit and read by nobody.
  unread = {"_CHECKPOINT_METADATA", "commit_success.txt"}
  for path in paths:
    if path.parent == copy / "2" and path.name in unread:
      continue
    before = path.read_bytes()
    damage(path)
    found = checksums.problem(epath.Path(copy / "2"))
    if path.name != checksums.FILE:
      assert str(path.relative_to(copy / "2")) in str(found)
    else:
      # Without any record a step is taken for what it says.
      assert (found is None) == (damage == pathlib.Path.unlink)
    path.write_bytes(before)
  assert len(paths) > 20
  assert checksums.problem(epath.Path(copy / "2")) is None


@pytest.mark.parametrize(
  ("damage", "what"),
  [
    (flip, "has changed"),
    (halve, "has [0-9]+ bytes, not"),
    (pathlib.Path.unlink, "is missing"),
  ],
)
def test_a_damaged_newest_step_is_moved_aside_for_the_one_before(
  copy, mesh, damage, what
):
  damage(values_of(copy / "2"))
  checkpoints = Checkpoints(copy, CheckpointConfig())
  assert checkpoints.latest() == 1
  (told,) = checkpoints.set_aside
  assert re.search(f"step 2 in {copy} is damaged: .*params/.*{what}", told)
  assert told.endswith("It was renamed to damaged-2.")
  got = checkpoints.restore(1, {"params": abstract(mesh)})
  assert_equal(got["params"], tree(1))
  # Nothing that the user had is deleted, and the step can be saved again.
  save(checkpoints, mesh, 2)
  checkpoints.close()
  damage(values_of(copy / "2"))
  checkpoints = Checkpoints(copy, CheckpointConfig())
  assert checkpoints.latest() == 1
  checkpoints.close()
  left = sorted(path.name for path in copy.iterdir())
  assert left == ["1", "damaged-2", "damaged-2-2"]


def test_damaged_metrics_of_an_older_step_do_not_keep_a_run_from_resuming(copy):
  halve(copy / "1" / "metrics" / "metrics")
  assert Checkpoints(copy).latest() == 2
  with pytest.raises(UserError, match=r"step 1 .* metrics cannot be read"):
    Checkpoints(copy).best()
  checkpoints = Checkpoints(copy, CheckpointConfig())
  assert checkpoints.steps() == [2]
  assert "metrics/metrics has" in checkpoints.set_aside[0]
  checkpoints.close()


def test_where_all_steps_are_damaged_nothing_begins_anew(copy):
  for step in ("1", "2"):
    flip(values_of(copy / step))
  with pytest.raises(UserError, match="No good checkpoint is left"):
    Checkpoints(copy, CheckpointConfig())
  assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_reader_refuses_a_damaged_step_and_names_the_others(copy, mesh):
  flip(values_of(copy / "2"))
  reader = Checkpoints(copy)
  assert reader.latest() == 2
  with pytest.raises(
    UserError, match=r"step 2 .* is damaged: .*\. Choose another step: 1\."
  ):
    reader.restore(2, {"params": abstract(mesh)})
  assert_equal(reader.restore(1, {"params": abstract(mesh)})["params"], tree(1))
  # What is not read does not matter.
  assert reader.restore(2, {"progress": None})["progress"] == {"step": 2}
  assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_without_checksums_changed_values_are_read_as_they_are(tmp_path):
  """Why there are checksums, and what a step without them is worth."""
  noise = np.random.default_rng(0).standard_normal((256, 256), np.float32)
  x = jax.device_put(noise)
  like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, {"params": {"x": x}})
  checkpoints.close()
  flip(values_of(tmp_path / "1"))
  with pytest.raises(UserError, match="is damaged"):
    Checkpoints(tmp_path).restore(1, {"params": like})
  (tmp_path / "1" / checksums.FILE).unlink()
  got = Checkpoints(tmp_path).restore(1, {"params": like})
  assert not np.array_equal(got["params"]["x"], x)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "{",
    '{"a": 1}',
    '{"a": [1, true]}',
    '{"a": [1, 2, 3]}',
    "[" * 9999,
  ],
)
def test_damaged_checksums_are_damage(tmp_path, text):
  (tmp_path / checksums.FILE).write_text(text)
  folder = Checkpoints(tmp_path).directory
  assert checksums.problem(folder) == f"{checksums.FILE} cannot be read"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "\u001b[31m"])
def test_checksums_of_files_elsewhere_are_damage(tmp_path, name):
  (tmp_path / checksums.FILE).write_text(json.dumps({name: [1, 2]}))
  problem = checksums.problem(Checkpoints(tmp_path).directory)
  assert problem == f"{checksums.FILE} names files outside of the folder"


@given(
  mutations.of(b'{"a/b": [3, 1], "a/c": [4, 5], "d": [70000, 2147483648]}')
)
def test_any_record_of_checksums_is_read_or_damage(tmp_path_factory, data):
  folder = epath.Path(tmp_path_factory.getbasetemp() / "record")
  (folder / "a").mkdir(parents=True, exist_ok=True)
  (folder / "a" / "b").write_bytes(b"abc")
  (folder / checksums.FILE).write_bytes(data)
  found = checksums.problem(folder)
  # There is no file "d", unless its name or its table is lost.
  assert found is None or found.isprintable()


@pytest.mark.parametrize(
  "text", ["[" * 10**5, '{"eval_loss": ' + "9" * 400 + "}", "[]", "\xff"]
)
def test_metrics_that_cannot_be_read_are_damage(copy, text):
  (copy / "1" / "metrics" / "metrics").write_bytes(text.encode("latin-1"))
  (copy / "1" / checksums.FILE).unlink()
  with pytest.raises(UserError, match=r"step 1 .* metrics cannot be read"):
    Checkpoints(copy).best()


def test_damage_is_found_while_a_run_goes_on(copy, mesh):
  checkpoints = Checkpoints(copy, CheckpointConfig())
  assert checkpoints.set_damaged_aside() == []
  flip(values_of(copy / "2"))
  (told,) = checkpoints.set_damaged_aside()
  assert told.endswith("It was renamed to damaged-2.")
  assert checkpoints.latest() == 1
  got = checkpoints.restore(1, {"params": abstract(mesh)})
  assert_equal(got["params"], tree(1))
  flip(values_of(copy / "1"))
  with pytest.raises(UserError, match="No good checkpoint is left"):
    checkpoints.set_damaged_aside()
  checkpoints.close()


def merge_nothing(step):
  """As older versions left a step whose parts Orbax had not found."""
  for item in ("params", "optimizer"):
    (step / item / "manifest.ocdbt").unlink()
  checksums.write(epath.Path(step), ["params", "optimizer", "progress"])


def test_steps_in_which_nothing_was_merged_are_damaged(copy, mesh):
  merge_nothing(copy / "2")
  with pytest.raises(
    UserError, match=r"step 2 .* is damaged: params/manifest\.ocdbt is missing"
  ):
    Checkpoints(copy).restore(2, {"params": abstract(mesh)})
  checkpoints = Checkpoints(copy, CheckpointConfig())
  assert checkpoints.latest() == 1
  (told,) = checkpoints.set_aside
  assert told.endswith(
    "manifest.ocdbt is missing. It was renamed to damaged-2."
  )
  checkpoints.close()


# Saves that fail.


@pytest.fixture
def failing(monkeypatch):
  """How many of the next saves fail just before they are committed."""
  left = [0]
  write = checksums.write

  def fail(*arguments):
    if left[0]:
      left[0] -= 1
      raise OSError(28, "No space left on device")
    write(*arguments)

  monkeypatch.setattr(checksums, "write", fail)
  return left


def test_a_failed_save_is_told_without_waiting(tmp_path, mesh, failing):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(retries=1))
  save(checkpoints, mesh, 1)
  assert checkpoints.failure(wait=True) is None
  failing[0] = 1
  save(checkpoints, mesh, 2)
  deadline = time.monotonic() + 900
  while (failure := checkpoints.failure()) is None:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert failure == "No space left on device"
  assert checkpoints.steps() == [1]
  save(checkpoints, mesh, 3)
  assert checkpoints.failure(wait=True) is None
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [1, 3]


def unmerged(step):
  (step / "params" / "manifest.ocdbt").unlink()


def valueless(step):
  values_of(step).unlink()


def cut_off(step):
  halve(values_of(step))


def without_part(step):
  """As where a process's part was not seen when the parts were merged."""
  path = str(step / "params") + "/"
  base = {"driver": "file", "path": path}
  store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
  del store["noise/1.0"]


def shapeless(step):
  (step / "params" / "_METADATA").unlink()


def of_another_model(step):
  path = step / "params" / "_METADATA"
  path.write_text(path.read_text().replace("scale", "bias"))


def without_progress(step):
  shutil.rmtree(step / "progress")


def with_other_progress(step):
  (step / "progress" / "metadata").write_text('{"step": 7}')


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (unmerged, r"params/manifest\.ocdbt is missing"),
    (valueless, "params cannot be read: .*No such file"),
    (cut_off, "params is not .*: .*/d/[0-9a-f]+ with values of noise is cut"),
    (without_part, "params is not what was saved: noise has 7 chunks, not 8"),
    (shapeless, "params cannot be read"),
    (of_another_model, "params cannot be read: .*bias"),
    (without_progress, "progress cannot be read"),
    (with_other_progress, "progress is not what was saved: its content"),
  ],
)
def test_a_save_that_could_not_be_restored_has_failed(
  tmp_path, mesh, monkeypatch, damage, reason
):
  damages = []
  before_commit = Checkpoints._before_commit

  def damaged(self):
    if damages:
      (step,) = pathlib.Path(tmp_path).glob("2.*")
      damages.pop()(step)
    before_commit(self)

  monkeypatch.setattr(Checkpoints, "_before_commit", damaged)
  noise = np.random.default_rng(0).standard_normal((128, 128))
  rows = jax.NamedSharding(mesh, jax.P("fsdp"))
  params = {"noise": jax.device_put(noise, rows), "scale": jnp.ones(16)}
  items = {"params": params, "progress": {"step": 1}}
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(retries=1))
  checkpoints.save(1, items)
  assert checkpoints.failure(wait=True) is None
  damages.append(damage)
  checkpoints.save(2, items)
  assert re.match(reason, checkpoints.failure(wait=True) or "")
  assert checkpoints.steps() == [1]
  # It is made again.
  checkpoints.save(3, items)
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [1, 3]


def test_a_save_in_which_orbax_merged_nothing_has_failed(
  tmp_path, mesh, monkeypatch
):
  async def skip(*_, **__):
    pass

  monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", skip)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(retries=0))
  save(checkpoints, mesh, 1)
  with pytest.raises(
    UserError,
    match=r"\((params|optimizer)/manifest\.ocdbt is missing\): check its disk",
  ):
    checkpoints.failure(wait=True)
  checkpoints.close()
  assert Checkpoints(tmp_path).latest() is None


def test_databases_of_several_levels_are_listed(tmp_path):
  base = {"driver": "file", "path": f"{tmp_path}/"}
  config = {"max_decoded_node_bytes": 1000, "max_inline_value_bytes": 9}
  store = tensorstore.KvStore.open(
    {"driver": "ocdbt", "base": base, "config": config}
  ).result()
  with tensorstore.Transaction() as writing:
    for number in range(300):
      key = f"blocks.{number}.weight/0"
      store.with_transaction(writing)[key] = b"1" * (number % 20)
  found = dict(_entries(tensorstore.KvStore.open(base).result()))
  listed = [name.decode() for name in store.list().result()]
  assert sorted(found) == sorted(listed)
  assert found["blocks.3.weight/0"] == b"111"
  assert str(found["blocks.19.weight/0"]).endswith(":19")


def test_two_processes_hear_of_a_save_that_failed_in_one(tmp_path):
  with socket.create_server(("", 0)) as server:
    port = str(server.getsockname()[1])
  processes = [
    subprocess.Popen(
      [sys.executable, SAVING, str(index), port, str(tmp_path / "[c] *")],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"XLA_FLAGS": ""},
    )
    for index in range(2)
  ]
  ends = [process.communicate(timeout=900) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], ends
  # What fails costs no step that was committed.
  for output, _ in ends:
    # Behind what gloo says.
    assert output.splitlines()[-4:] == [
      "1 None [1]",
      "2 No space left on device [1]",
      "3 Input/output error [1]",
      "4 None [4]",
    ]
  assert [path.name for path in (tmp_path / "[c] *").iterdir()] == ["4"]
  step = tmp_path / "[c] *" / "4"
  assert checksums.problem(epath.Path(step)) is None
  assert (step / "params" / "manifest.ocdbt").exists()


def test_failed_saves_are_made_again_a_number_of_times(tmp_path, mesh, failing):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(retries=2))
  save(checkpoints, mesh, 1)
  checkpoints.wait()
  failing[0] = 2
  # A save waits for the one before, and counts it.
  for step in (2, 3, 4):
    save(checkpoints, mesh, step)
  assert checkpoints.failure(wait=True) is None
  assert checkpoints.steps() == [1, 4]
  # A save that succeeds begins the count anew.
  failing[0] = 3
  save(checkpoints, mesh, 5)
  save(checkpoints, mesh, 6)
  save(checkpoints, mesh, 7)
  with pytest.raises(
    UserError, match=r"No space .*, 3 times in a row: .* step 4 is intact"
  ):
    checkpoints.failure(wait=True)
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [1, 4]
