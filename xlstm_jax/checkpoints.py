"""Training states on disk: a thin layer over Orbax.

A step is a folder of items. "params" and "optimizer" are trees of arrays with
global shapes, which can be restored into any sharding; "progress" is JSON. A
step counts once Orbax has committed all of it. So a killed save leaves nothing
but a temporary folder, which the next writer removes.

Before a step is committed, its items are opened again and compared with what
was to be saved: a save that could not be restored is a failed save. A step is
committed together with checksums of its files. A writer moves damaged steps
aside before it continues from the newest good one; a reader refuses them. A
step without checksums is trusted.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
import sys
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax._src import distributed
from jax.experimental import multihost_utils

from xlstm_jax import checksums
from xlstm_jax.errors import UserError

Tree = Any
# The metric that is lowest in the best checkpoint.
EVAL_LOSS = "eval_loss"
# Where Orbax keeps the metrics of a step.
_METRICS = "metrics"
# The items that hold arrays, and the file through which each of them is found.
_ARRAYS = ("params", "optimizer")
_MANIFEST = "manifest.ocdbt"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Which checkpoints are kept.

  Attributes:
    keep_latest: How many of the newest checkpoints are kept.
    keep_best: How many of those with the lowest held-out loss are kept.
    keep_every: Every step that this divides is kept as well; None for none.
    keep_minutes: The first checkpoint after every so many minutes is kept as
      well; None for none.
    retries: How often in a row a failed save is repeated, each time at the next
      step, before the run stops.
  """

  keep_latest: int = 2
  keep_best: int = 1
  keep_every: int | None = None
  keep_minutes: int | None = None
  retries: int = 3


class SaveTimer:
  """Says when a checkpoint is due by the clock of process 0.

  Args:
    minutes: minutes between checkpoints; None for never.
    now: a monotonic clock, in seconds.
  """

  def __init__(
    self, minutes: float | None, now: Callable[[], float] = time.monotonic
  ):
    self._minutes = minutes
    self._now = now
    self._saved = now()

  def due(self) -> bool:
    """Whether one is due, the same on all processes.

    All processes must ask at the same step.
    """
    if self._minutes is None:
      return False
    return of_first_process(self._now() - self._saved >= 60 * self._minutes)

  def saved(self) -> None:
    """Starts the clock again."""
    self._saved = self._now()


class Checkpoints:
  """The checkpoints under a folder.

  Args:
    directory: the folder of the checkpoints.
    cfg: what to keep; None to read only, even while another process writes.
    copies_gb: gigabytes of copies that a save holds at a time; 96 is Orbax's
      default.

  Attributes:
    set_aside: a sentence for every damaged step that a writer moved aside.

  Raises:
    UserError: all checkpoints are damaged, the folder of a damaged one cannot
      be renamed, or `directory` cannot be created or reached.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    cfg: CheckpointConfig | None = None,
    *,
    copies_gb: int = 96,
  ):
    # Orbax wants absolute paths.
    self.directory = epath.Path(directory).expanduser().resolve()
    self._cfg = cfg
    self._copies_gb = copies_gb
    if cfg is not None:
      _create(self.directory)
    self._root, descriptor = _plain_path(self.directory)
    if descriptor is not None:
      weakref.finalize(self, os.close, descriptor)
    self._checked: set[int] = set()
    self._saving: tuple[int, dict[str, Any]] | None = None
    self._failure: OSError | ValueError | None = None
    self._failures = 0
    self._barriers = _Barriers()
    self.set_aside: list[str] = []
    if cfg is not None:
      self.set_aside = self._set_damaged_aside()
    self._manager = self._open()

  def steps(self) -> list[int]:
    """All committed steps, oldest first."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The newest step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step of lowest held-out loss, the newest if none was evaluated.

    Raises:
      UserError: the loss of a step cannot be read.
    """
    return min(
      self.steps(), key=lambda step: (self._loss_of(step), -step), default=None
    )

  def items(self, step: int) -> set[str]:
    """The names of the items of a step."""
    return {path.name for path in (self.directory / str(step)).iterdir()}

  def save(
    self,
    step: int,
    items: Mapping[str, Tree],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts saving; once this returns, the arrays may be overwritten.

    Args:
      step: a step that has not been saved yet.
      items: trees of `jax.Array` for "params" and "optimizer"; for "progress",
        a value that JSON can hold.
      metrics: includes `EVAL_LOSS` if the step was evaluated.

    Raises:
      UserError: this save and the ones before it failed more often than a save
        may be repeated.
    """
    if self._cfg is None:
      raise ValueError("these checkpoints were opened to read only")
    self.failure(wait=True)
    args = {
      name: ocp.args.JsonSave(tree)
      if name == "progress"
      else ocp.args.StandardSave(tree)
      for name, tree in items.items()
    }
    self._failure = None
    self._saving = step, _expected(items)
    self._barriers.begin()
    # What fails right here fails on this process alone. The others are inside
    # the save and cannot be told, so the run ends.
    with self._noting_write_errors(again=jax.process_count() == 1):
      self._manager.save(
        step,
        args=ocp.args.Composite(**args),
        metrics=dict(metrics or {}),
        force=True,
      )

  def set_damaged_aside(self) -> list[str]:
    """Renames the steps that were damaged after they were saved.

    All processes call this, while no save is under way.

    Returns:
      A sentence for each damaged step.

    Raises:
      UserError: all steps are damaged, or the folder of one cannot be renamed.
    """
    told = self._set_damaged_aside()
    if told:
      self._manager.reload()
    return told

  def failure(self, *, wait: bool = False) -> str | None:
    """Why the last save failed and should be repeated; None if it did not fail.

    Args:
      wait: whether to wait until that is decided. Otherwise, and with several
        processes, a save that is under way has not failed yet.

    Raises:
      UserError: it failed more often than it may be repeated.
    """
    # Several processes must find out at the same step.
    alone = jax.process_count() == 1
    if wait or (alone and not self._manager.is_saving_in_progress()):
      with self._noting_write_errors():
        self._manager.wait_until_finished()
      if self._failure is None:
        self._saving = None
        self._failures = 0
    return None if self._failure is None else _reason(self._failure)

  def wait(self) -> None:
    """Returns once the save under way is committed.

    Raises:
      UserError: it could not be written.
    """
    if self.failure(wait=True):
      raise self._write_error()

  def restore(
    self, step: int, abstract_items: Mapping[str, Tree]
  ) -> dict[str, Tree]:
    """Reads the named items, and nothing else, of a step.

    Args:
      step: one of `steps`.
      abstract_items: for an item of arrays, the tree of
        `jax.ShapeDtypeStruct` with the shardings to restore into, on any
        mesh; for "progress", anything.

    Raises:
      UserError: there is no such step or item, it is damaged, or its tree is
        different.
    """
    if step not in self._manager.all_steps():
      raise UserError(
        f"There is no checkpoint of step {step} in {self.directory}; there "
        f"are {self.steps() or 'none'}."
      )
    for name in abstract_items:
      if name not in self.items(step):
        raise UserError(
          f"The checkpoint {self.directory / str(step)} has no {name!r}."
        )
    self._refuse_damage(step, set(abstract_items))
    args = {}
    for name, abstract in abstract_items.items():
      if name == "progress":
        args[name] = ocp.args.JsonRestore()
      else:
        # The manager's own metadata call would read that of all items.
        stored = _stored_shapes(self._root / str(step) / name)
        self._check_structure(step, name, stored, _shapes(abstract))
        args[name] = ocp.args.StandardRestore(abstract)
    restored = self._manager.restore(step, args=ocp.args.Composite(**args))
    return {name: restored[name] for name in abstract_items}

  def close(self) -> None:
    """Waits for the save under way and ends the background threads.

    Raises:
      UserError: the save could not be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def _check_structure(self, step, name, stored, wanted) -> None:
    if differences := _differences(stored, wanted):
      raise UserError(
        f"The checkpoint {self.directory / str(step)} is of another model; "
        f"its {name} differ: {differences}."
      )

  def _loss_of(self, step: int) -> float:
    """The held-out loss of a step, infinite without one."""
    path = self.directory / str(step) / _METRICS / _METRICS
    if not path.exists():
      return math.inf
    try:
      return _loss(json.loads(path.read_bytes()))
    except (
      *(OSError, ValueError, TypeError, AttributeError),
      *(RecursionError, OverflowError),
    ) as error:
      raise UserError(
        f"The checkpoint of step {step} in {self.directory} is damaged: its "
        "metrics cannot be read. Choose another step by its number."
      ) from error

  def _refuse_damage(self, step: int, names: set[str]) -> None:
    """Refuses a damaged step; process 0 reads and checks it once for all."""
    if step in self._checked:
      return
    found = None
    if jax.process_index() == 0:
      found = _problem(self.directory / str(step), names)
    if found := of_first_process(found):
      others = [str(other) for other in self.steps() if other != step]
      raise UserError(
        f"The checkpoint of step {step} in {self.directory} is damaged: "
        f"{found}. Choose another step: {', '.join(others) or 'there is none'}."
      )

  def _set_damaged_aside(self) -> list[str]:
    """Renames the folders of damaged steps, unless no good one is left."""
    verdict = None
    if jax.process_index() == 0:
      verdict = _set_damaged_aside(self.directory)
    newest, told, refusal = of_first_process(verdict)
    if refusal:
      raise UserError(refusal)
    if newest is not None:
      self._checked.add(newest)
    return told

  @contextlib.contextmanager
  def _noting_write_errors(self, *, again: bool = True) -> Iterator[None]:
    """Notes a failed write; raises an error when no more may fail.

    Args:
      again: whether a failed save may be repeated at all.
    """
    try:
      yield
    except (OSError, ValueError) as error:
      if not is_write_error(error):
        raise
      if again:
        self._forget_failed_save()
      self._failure = error
      self._failures += 1
      if not again or self._failures > (self._cfg.retries if self._cfg else 0):
        raise self._write_error() from error

  def _write_error(self) -> UserError:
    assert self._failure
    reason, good = _reason(self._failure), self.latest()
    times = f", {self._failures} times in a row" * (self._failures > 1)
    advice = "make room for it"
    if isinstance(self._failure, _UnreadableError):
      advice = "check its disk"
    # The next call is not about this failure.
    self._failure = None
    return UserError(
      f"A checkpoint could not be written to {self.directory} "
      f"({reason}){times}: {advice} and run again; "
      + (
        "no earlier checkpoint exists."
        if good is None
        else f"step {good} is intact."
      )
    )

  def _forget_failed_save(self) -> None:
    """Opens the folder again, without the partial save and its space."""
    # Its threads may fail again as they end, with what we already report.
    with contextlib.suppress(OSError, ValueError):
      self._manager.close()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    def arrays():
      return ocp.StandardCheckpointHandler(save_concurrent_gb=self._copies_gb)

    return ocp.CheckpointManager(
      self._root,
      options=_options(self._cfg, self._before_commit, self._barriers),
      item_handlers={
        "params": arrays(),
        "optimizer": arrays(),
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def _before_commit(self) -> None:
    """Reads back a step that is complete but not yet renamed; adds checksums.

    Raises:
      OSError: the step could not be restored.
    """
    assert self._saving
    step, expected = self._saving
    for folder in self._root.iterdir():
      if folder.name.split(".")[0] == str(step):
        for name, content in expected.items():
          _read_back(folder, name, content)
        checksums.write(folder, [*sorted(expected), _METRICS])


class _Barriers:
  """The barriers at which the processes of a run meet in a save.

  Orbax has two barriers in the thread that writes, and the last ones in a
  thread that waits for it. A process in which writing failed would skip the
  first two, while the others wait there for twenty minutes. Here it tells the
  others why it failed, and then comes to every barrier.
  """

  _OF_WRITING = ("async_write_complete", "async_commit_complete")
  # All processes make the same saves.
  _numbers = itertools.count(1)

  def __init__(self):
    self._number = 0
    self._reached = len(self._OF_WRITING)
    self._saver = threading.current_thread()

  def begin(self) -> None:
    """Starts the barriers of a new save."""
    self._number = next(self._numbers)
    self._reached = 0
    self._saver = threading.current_thread()

  def __call__(self, *, key: str, timeout_ms: int) -> None:
    """Waits at one of Orbax's barriers.

    Raises:
      OSError: writing failed in another process.
    """
    if any(name in key for name in self._OF_WRITING):
      self._reach_next(timeout_ms)
      for _, reason in self._client.key_value_dir_get(f"{self._key}/failed/"):
        raise OSError(reason)
      return
    # The saving thread has a barrier of its own, before all others.
    if threading.current_thread() is not self._saver:
      self._stand_in_for_writing(timeout_ms)
    self._client.wait_at_barrier(key, timeout_ms)

  def _stand_in_for_writing(self, timeout_ms: int) -> None:
    if self._reached == len(self._OF_WRITING):
      return
    # Orbax calls this in a `finally`.
    error = sys.exception()
    self._client.key_value_set(
      f"{self._key}/failed/{jax.process_index()}",
      _reason(error) if error else "for no reason given",
    )
    while self._reached < len(self._OF_WRITING):
      self._reach_next(timeout_ms)

  def _reach_next(self, timeout_ms: int) -> None:
    self._reached += 1
    self._client.wait_at_barrier(f"{self._key}/{self._reached}", timeout_ms)

  @property
  def _key(self) -> str:
    return f"xlstm_jax/save/{self._number}"

  @property
  def _client(self) -> Any:
    # Key-value store and barriers have no public name.
    return distributed.global_state.client


def _set_damaged_aside(
  directory: epath.Path,
) -> tuple[int | None, list[str], str | None]:
  """The newest good step, sentences on what was renamed, and any refusal."""
  found: dict[int, str] = {}
  newest = None
  steps = ocp.path.step.standard_name_format().find_all(directory)
  for step in sorted((one.step for one in steps), reverse=True):
    # Content is checked up to the newest good step; of older steps, only what
    # opening them reads.
    problem = _problem(directory / str(step), contents=newest is None)
    if problem:
      found[step] = problem
    elif newest is None:
      newest = step
  told = [
    f"The checkpoint of step {step} in {directory} is damaged: {problem}."
    for step, problem in found.items()
  ]
  if found and newest is None:
    return (
      None,
      [],
      (
        f"{' '.join(told)} No good checkpoint is left: restore one from a "
        "copy, or start over in another workdir."
      ),
    )
  try:
    for at, step in enumerate(found):
      free = _free_name(directory, step)
      (directory / str(step)).rename(free)
      told[at] += f" It was renamed to {free.name}."
  except OSError as error:
    return (
      None,
      [],
      (f"{' '.join(told)} It cannot be moved aside: {error.strerror}."),
    )
  return newest, told, None


def _problem(
  folder: epath.Path,
  names: set[str] | None = None,
  *,
  contents: bool = True,
) -> str | None:
  """What is wrong with a step; None if nothing is.

  Checksums can be right in a damaged step: older versions committed steps whose
  parts Orbax had not found and merged.
  """
  for name in _ARRAYS:
    if names is None or name in names:
      item = folder / name
      if item.exists() and not (item / _MANIFEST).exists():
        return f"{name}/{_MANIFEST} is missing"
  return checksums.problem(folder, names, contents=contents)


def _expected(items: Mapping[str, Tree]) -> dict[str, Any]:
  """What a step must hold to be restored: shapes of arrays, and JSON."""
  return {
    name: _shapes(tree) if name in _ARRAYS else _json(tree)
    for name, tree in items.items()
  }


def _json(value: Any) -> str:
  """The value as text, in which NaN equals itself."""
  return json.dumps(value, sort_keys=True)


def _read_back(folder: epath.Path, name: str, expected: Any) -> None:
  """Opens an item as restoring would, without reading the values of arrays.

  Raises:
    OSError: it is missing, cannot be read, or is not what was saved.
  """
  try:
    if name not in _ARRAYS:
      stored = ocp.JsonCheckpointHandler().restore(
        folder / name, args=ocp.args.JsonRestore()
      )
      differences = "" if _json(stored) == expected else "its content"
    elif not (folder / name / _MANIFEST).exists():
      raise _UnreadableError(f"{name}/{_MANIFEST} is missing")
    else:
      differences = _differences(_stored_shapes(folder / name), expected)
      differences = differences or _missing_values(folder / name, expected)
  except (
    *(FileNotFoundError, ValueError, LookupError),
    *(TypeError, AttributeError),
  ) as error:
    raise _UnreadableError(f"{name} cannot be read: {error}") from error
  if differences:
    raise _UnreadableError(f"{name} is not what was saved: {differences}")


def _missing_values(
  folder: epath.Path, shapes: Mapping[str, tuple[int, ...]]
) -> str:
  """What is wrong with the first array whose values are incomplete; "" if none.

  It looks up every chunk as reading would, and checks the size of its file.
  """
  store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"})
  store = store.result()
  chunks: dict[str, dict[str, str | bytes]] = {}
  for key, value in _entries(store):
    name, _, chunk = key.rpartition("/")
    chunks.setdefault(name, {})[chunk] = value
  sizes: dict[str, int] = {}
  for path, shape in shapes.items():
    found = chunks.get(path.replace("/", "."), {})
    grid = found.pop(".zarray", None)
    if grid is None:
      return f"{path} is not listed"
    if isinstance(grid, str):
      grid = tensorstore.ocdbt.dump(store, node=grid).result()
    lengths = json.loads(grid)["chunks"]
    count = math.prod(-(-n // k) for n, k in zip(shape, lengths, strict=True))
    if len(found) != count:
      return f"{path} has {len(found)} chunks, not {count}"
    for value in found.values():
      if isinstance(value, str):
        _, base, name, start, length = value.split(":")
        file = urllib.parse.unquote(base + name)
        if file not in sizes:
          sizes[file] = (folder / file).stat().length
        if sizes[file] < int(start) + int(length):
          return f"{file} with values of {path} is cut off"
  return ""


def _entries(store: Any) -> Iterator[tuple[str, str | bytes]]:
  """Keys of an OCDBT database, each with its value or the place of that."""
  manifest = tensorstore.ocdbt.dump(store).result()
  nodes = [("", manifest["versions"][-1]["root"]["location"])]
  while nodes:
    prefix, location = nodes.pop()
    node = tensorstore.ocdbt.dump(store, node=location).result()
    for entry in node["entries"]:
      key = prefix + entry["key"].decode()
      if node["height"]:
        prefix_below = entry["subtree_common_prefix"].decode()
        nodes.append((prefix + prefix_below, entry["location"]))
      elif "inline_value" in entry:
        yield key, entry["inline_value"]
      else:
        yield key, entry["indirect_value"]


class _UnreadableError(OSError):
  """A step was written but cannot be restored."""


def _create(directory: epath.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"The checkpoints cannot be written to {directory}: {error.strerror}."
    ) from error


def _plain_path(directory: epath.Path) -> tuple[epath.Path, int | None]:
  """A path of the directory that Orbax and TensorStore take literally.

  Orbax finds the parts of a step by a glob of their whole path, in which
  brackets and stars match other names. TensorStore's paths must be UTF-8. So a
  directory with any but plain characters in its path is reached through a
  descriptor: /proc/self/fd/N.

  Args:
    directory: an absolute path.

  Returns:
    The path, and a descriptor that the caller closes once the path is no longer
    needed.

  Raises:
    UserError: the directory needs a descriptor, and the system has no such
      paths.
  """
  # Names of buckets have a colon.
  plain = re.fullmatch(r"[\w./:@+=,-]*", str(directory), re.ASCII)
  # A directory that does not exist has nothing to read.
  if plain or not directory.is_dir():
    return directory, None
  descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  path = epath.Path(f"/proc/self/fd/{descriptor}")
  if not path.exists():
    os.close(descriptor)
    raise UserError(
      f"Checkpoints cannot be kept in {directory} on this system, which has no "
      "/proc: use a folder with nothing but letters, digits and ._-+=,@ in its "
      "path."
    )
  return path, descriptor


def _free_name(directory: epath.Path, step: int) -> epath.Path:
  path, number = directory / f"damaged-{step}", 1
  while path.exists():
    number += 1
    path = directory / f"damaged-{step}-{number}"
  return path


def of_first_process(value: Any) -> Any:
  """The value of process 0, which JSON must hold; all processes call this."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  first = jax.process_index() == 0
  data = data if first else np.zeros(size, np.uint8)
  return json.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


def quiet() -> None:
  """Keeps Orbax from printing the failures that `Checkpoints` raises.

  Otherwise a failed write is reported a hundred times: in Orbax's logs, by
  asyncio, and by TensorStore for every write that was still under way when its
  event loop ended.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)

  others = sys.unraisablehook

  def report(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      others(unraisable)

  sys.unraisablehook = report


def is_write_error(error: BaseException) -> bool:
  """Whether `error` comes from the storage: the OS, or a TensorStore status."""
  if isinstance(error, OSError):
    return True
  # TensorStore raises ValueError("RESOURCE_EXHAUSTED: Error writing ...").
  return isinstance(error, ValueError) and bool(
    re.match(r"[A-Z_]{6,}: ", str(error))
  )


def _reason(error: BaseException) -> str:
  """The operating system's words, if the error or its status has any."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  words = re.search(r": ([^:]+) \[os_error_code=", str(error))
  return words[1] if words else str(error)


def _options(
  cfg: CheckpointConfig | None,
  before_commit: Callable[[], None],
  barriers: _Barriers,
) -> ocp.CheckpointManagerOptions:
  if cfg is None:
    # Orbax warns about `read_only`, so `save` refuses instead. Reading metrics
    # here would fail if those of one step are damaged.
    return ocp.CheckpointManagerOptions(
      create=False, save_root_metadata=False, lightweight_initialize=True
    )
  managers = ocp.checkpoint_managers
  keep = [
    managers.LatestN(cfg.keep_latest),
    managers.BestN(get_metric_fn=_loss, reverse=True, n=cfg.keep_best),
  ]
  if cfg.keep_every is not None:
    keep.append(managers.EveryNSteps(cfg.keep_every))
  if cfg.keep_minutes is not None:
    keep.append(managers.EveryNSeconds(60 * cfg.keep_minutes))
  return ocp.CheckpointManagerOptions(
    best_fn=_loss,
    best_mode="min",
    preservation_policy=managers.AnyPreservationPolicy(keep),
    cleanup_tmp_directories=True,
    async_options=ocp.AsyncOptions(
      post_finalization_callback=before_commit,
      barrier_sync_fn=barriers if jax.process_count() > 1 else None,
    ),
  )


def _loss(metrics: Mapping[str, float]) -> float:
  """The held-out loss to rank by: infinite if it is missing or NaN."""
  loss = metrics.get(EVAL_LOSS, math.inf)
  return math.inf if math.isnan(loss) else loss


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _stored_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
  """The shapes of an item's arrays; this opens each of them."""
  return _shapes(ocp.StandardCheckpointHandler().metadata(folder).tree)


def _differences(
  stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str:
  """The first differences, in words; "" for none."""
  found = []
  for path in sorted(stored.keys() | wanted.keys()):
    if path not in stored:
      found.append(f"{path} is missing")
    elif path not in wanted:
      found.append(f"{path} is not part of this model")
    elif stored[path] != wanted[path]:
      found.append(f"{path} is {stored[path]}, not {wanted[path]}")
  shown = found[:5]
  if len(found) > len(shown):
    shown.append(f"and {len(found) - len(shown)} more")
  return "; ".join(shown)
