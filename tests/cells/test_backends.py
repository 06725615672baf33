"""A backend of a cell is one row: a toy in each registry is chosen and run."""

import dataclasses
import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells import backends, lstm, mlstm, recurrence, slstm
from xlstm_jax.cells.backends import Backend, Registry, Share
from xlstm_jax.cells.lstm.recurrent import cell as lstm_cell
from xlstm_jax.cells.mlstm.chunkwise import chunkwise
from xlstm_jax.cells.slstm.recurrent import cell as slstm_cell
from xlstm_jax.errors import UserError
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig

B, T, H, D = 2, 6, 2, 4
SHARE = Share(B=B, T=T, width=H * D, tensor=1)


def run_mlstm(**options):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, H, D)))
  gates = x[..., 0]
  return mlstm.mlstm(x, x, x, i_BTH=gates, f_BTH=gates, **options)[0]


def run_recurrent(run, **options):
  rng = np.random.default_rng(0)
  sizes = ((B, T, 4, H, D), (4, H, D, D), (4, H, D))
  return run(*(jnp.asarray(rng.normal(size=s)) for s in sizes), **options)[0]


@dataclasses.dataclass(frozen=True)
class Case:
  """A cell.

  Attributes:
    registry: Of its backends.
    native: A native form of it.
    run: The cell on some tokens.
    kind: Of a block that has it, and what of the kind's config says so.
  """

  registry: Registry
  native: Callable[..., Any]
  run: Callable[..., jax.Array]
  kind: str
  config: dict[str, Any] = dataclasses.field(default_factory=dict)

  def prepare(self, backend: str, dtype: str):
    """The comparison of a backend, as a model's block asks for it."""
    model = ModelConfig(width=H * D, pattern=(self.kind,))
    row, mixer = model.kinds_used[self.kind]
    mixer = dataclasses.replace(mixer, num_heads=H, **self.config)
    cell = row.cell(mixer, SHARE, Compute(dtype=dtype))
    assert cell.registry is self.registry
    return cell.prepare(backend)


CASES = {
  "mlstm": Case(mlstm.BACKENDS, chunkwise, run_mlstm, "mlstm_large"),
  "slstm": Case(
    slstm.BACKENDS,
    functools.partial(recurrence.scan, slstm_cell),
    functools.partial(run_recurrent, slstm.slstm),
    "slstm",
  ),
  "lstm": Case(
    lstm.BACKENDS,
    functools.partial(recurrence.scan, lstm_cell),
    functools.partial(run_recurrent, lstm.lstm),
    "slstm",
    {"cell": "lstm"},
  ),
}
each_cell = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def doubled(native):
  def form(*args, **options):
    y, state = native(*args, **options)
    return 2 * y, state

  return form


@pytest.fixture
def install(monkeypatch):
  """Puts a row into a registry, before all others."""

  def install(registry, row):
    rows = {row.name: row} | registry.backends
    monkeypatch.setattr(registry, "backends", rows)

  return install


@each_cell
def test_a_row_is_run_by_name_and_by_auto(case, install, caplog):
  native = case.run(backend=case.registry.native)
  install(case.registry, Backend("toy", doubled(case.native)))
  backends._announce.cache_clear()
  with caplog.at_level(logging.INFO):
    for name in ("toy", "auto", "auto"):
      np.testing.assert_array_equal(case.run(backend=name), 2 * native)
  assert [record.message for record in caplog.records] == [
    f"{case.registry.cell} backend on cpu: toy"
  ]
  # The definition is one form, whatever "auto" would take.
  np.testing.assert_array_equal(case.run(backend=case.registry.native), native)


@each_cell
def test_a_row_that_cannot_says_why(case, install, caplog):
  asked = []

  def why_not(device, shapes):
    asked.append((device.platform, shapes))
    return f"it takes no rows of {shapes.T} tokens" if shapes.T < 100 else None

  toy = Backend("toy", doubled(case.native), why_not=why_not, platform="cpu")
  install(case.registry, toy)
  cell, native = case.registry.cell, case.registry.native
  with pytest.raises(UserError) as error:
    case.run(backend="toy")
  assert str(error.value) == (
    f"The {cell} backend 'toy' cannot run: it takes no rows of 6 tokens. "
    f"Choose another backend, for example {native!r}."
  )
  platform, shapes = asked[0]
  assert (platform, *shapes[:4]) == ("cpu", B, T, H, D)
  backends._announce.cache_clear()
  with caplog.at_level(logging.INFO):
    case.run(backend="auto")
  assert [record.message for record in caplog.records] == [
    f"{cell} backend on cpu: {native}, not toy: it takes no rows of 6 tokens"
  ]
  longer = shapes._replace(T=100)
  assert case.registry.choose("toy", longer) is toy
  assert case.registry.choose("auto", longer) is toy
  assert case.registry.passed_over(longer) == {}


@each_cell
def test_auto_passes_over_what_can_be_named(case, install):
  row = Backend(
    "toy", doubled(case.native), why_not_auto=lambda shapes: "it is slower"
  )
  install(case.registry, row)
  native = case.run(backend=case.registry.native)
  np.testing.assert_array_equal(case.run(backend="auto"), native)
  np.testing.assert_array_equal(case.run(backend="toy"), 2 * native)


@each_cell
def test_a_name_that_is_none_is_refused_with_those_that_are(case):
  names = ", ".join(case.registry.backends)
  with pytest.raises(
    UserError,
    match=f"no {case.registry.cell} backend 'triton'; choose {names}",
  ):
    case.run(backend="triton")


def test_where_no_form_can_there_is_a_sentence():
  row = Backend("toy", chunkwise, why_not=lambda device, shapes: "never")
  registry = Registry("mLSTM", "mlstm_backend", "toy", (row,))
  with pytest.raises(UserError, match="No mLSTM backend can compute x here"):
    registry.choose("auto", "x")


def test_the_reasons_are_those_of_kernels_for_the_device(monkeypatch):
  """Nobody on a TPU wants to know what a GPU's kernel lacks."""
  shapes = mlstm.Shapes(B=1, T=128, H=2, K=64, V=64, dtype="float32")
  kernels = {"gpu": ["pallas_gpu"], "tpu": ["pallas_tpu"], "cpu": []}
  for platform, names in kernels.items():
    device = types.SimpleNamespace(platform=platform, device_kind="other")
    monkeypatch.setattr(backends, "this_device", lambda device=device: device)
    assert list(mlstm.BACKENDS.passed_over(shapes)) == names
    assert mlstm.BACKENDS.has_kernel_for(platform) == bool(names)


@pytest.mark.parametrize(
  ("cell", "dtype"), [("slstm", "bfloat16"), ("lstm", "float32")]
)
def test_a_wrong_kernel_of_a_recurrence_is_found(cell, dtype, install):
  """test_self_test.py has those of the mLSTM."""
  case = CASES[cell]
  kernel = Backend("sound", case.native, platform="cpu")
  install(case.registry, kernel)
  case.prepare("sound", dtype)()
  wrong = dataclasses.replace(kernel, name="wrong", run=doubled(case.native))
  install(case.registry, wrong)
  compare = case.prepare("wrong", dtype)
  setting = f"{case.registry.setting}={case.registry.native}"
  with pytest.raises(
    UserError,
    match=f"The {case.registry.cell} backend 'wrong' computes wrongly on cpu "
    f".*Train with --config.compute.{setting}",
  ):
    compare()


def wrong_in(part):
  """The scan with 10 % more of the gradient of an operand."""

  def form(*args):
    args = list(args)
    x = args[part]
    args[part] = x + 0.1 * (x - jax.lax.stop_gradient(x))
    return recurrence.scan(slstm_cell, *args)

  return form


@pytest.mark.parametrize(("part", "named"), [(0, "dx"), (1, "dR"), (2, "db")])
def test_wrong_gradients_of_a_recurrence_are_named(part, named, install):
  kernel = Backend("wrong", wrong_in(part), platform="cpu")
  install(slstm.BACKENDS, kernel)
  with pytest.raises(UserError, match=rf": {named} is off by [^,]*\. Train"):
    CASES["slstm"].prepare("wrong", "float32")()
