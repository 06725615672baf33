"""The sLSTM and the LSTM against textbook code and plain autodiff."""

import functools
from typing import NamedTuple

import compiled
import jax
import jax.numpy as jnp
import ml_dtypes
import mlstm_contract
import numpy as np
import pytest
from bound import excess
from jax.sharding import AxisType, PartitionSpec

from xlstm_jax.cells import hopper_gpus, lstm, recurrence, slstm

CELLS = {
  "slstm": (slstm, slstm.slstm, slstm.slstm_step),
  "lstm": (lstm, lstm.lstm, lstm.lstm_step),
}
TIME = 21


class Form(NamedTuple):
  """A way to compute the cells, and the units of the heads it is tested with.

  Kernels keep the sLSTM's state in a scale of their own: `scaled` results are
  compared in one that all share.
  """

  backend: str = "recurrent"
  units: int = 6
  scaled: bool = False


NATIVE = Form()
KERNELS = [Form("pallas_gpu", D, scaled=True) for D in (64, 192, 256, 384, 512)]
# A kernel's rows are tested where its device is.
KERNELS_HERE = KERNELS if hopper_gpus.device_refusal() is None else []
BEFORE = mlstm_contract.BEFORE
GATES = mlstm_contract.GATES


def slstm_cell(raw, y, c, n, m):
  """XLSTM.md's equations with the scale of c and n left to autodiff."""
  i, f, z, o = raw[:, 0], raw[:, 1], raw[:, 2], raw[:, 3]
  del y
  log_f = -jnp.logaddexp(0, -f)
  empty = n == 0
  new_m = jnp.where(empty, i, jnp.maximum(i, log_f + m))
  forget = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, log_f + m - new_m)))
  write = jnp.exp(i - new_m)
  c = forget * c + write * jnp.tanh(z)
  n = forget * n + write
  return sigmoid(o) * c / n, c, n, new_m


def lstm_cell(raw, y, c):
  i, f, z, o = raw[:, 0], raw[:, 1], raw[:, 2], raw[:, 3]
  del y
  c = c * sigmoid(f) + jnp.tanh(z) * sigmoid(i)
  return jnp.tanh(c) * sigmoid(o), c


def sigmoid(x):
  return jnp.exp(-jnp.logaddexp(0, -x))


TEXTBOOK = {"slstm": slstm_cell, "lstm": lstm_cell}


def textbook(cell, x, R, b, segments, units, segment):
  """Step by step, to be differentiated as it is."""

  def step(carry, token):
    units, segment = carry
    x, now = token
    start, real = (now != 0) & (now != segment), now != 0
    start, real = start[:, None, None], real[:, None, None]
    before = [jnp.where(start, 0, u) for u in units]
    raw = x + jnp.einsum("bhd,ghde->bghe", before[0], R) + b
    after = TEXTBOOK[cell](raw, *before)
    after = [jnp.where(real, a, u) for a, u in zip(after, units, strict=True)]
    segment = jnp.where(now != 0, now, segment)
    return (after, segment), jnp.where(real, after[0], 0)

  carry = (list(units), segment)
  (units, _), y = jax.lax.scan(step, carry, (x.swapaxes(0, 1), segments.T))
  return y.swapaxes(0, 1), units


class Case(NamedTuple):
  x: np.ndarray
  R: np.ndarray
  b: np.ndarray
  units: tuple[np.ndarray, ...]
  dy: np.ndarray
  dunits: tuple[np.ndarray, ...]


def in_one_scale(units):
  """y and c of an LSTM; y, c / n and log n + m of an sLSTM."""
  if len(units) == 2:
    return units
  y, c, n, m = units
  empty = n == 0
  n = jnp.where(empty, 1, n)
  return y, jnp.where(empty, 0, c / n), jnp.where(empty, 0, jnp.log(n) + m)


@functools.cache
def case(cell: str, gate: str, time: int = TIME, form: Form = NATIVE) -> Case:
  """Rows as in `mlstm_contract.segments`; all that a row warms is not 0."""
  rng = np.random.default_rng(0)
  B, H, D = 4, 2, form.units

  def normal(*shape):
    narrow = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    return narrow.astype(np.float64)

  x = normal(B, time, 4, H, D)
  gates = mlstm_contract.gates(gate, rng, (B, time, H * D))
  for index, values in enumerate(gates):
    values = values.reshape(B, time, H, D).astype(ml_dtypes.bfloat16)
    x[:, :, index] = values.astype(np.float64)
  warm = (BEFORE > 0)[:, None, None]
  units = [warm * normal(B, H, D) for _ in range(4 if cell == "slstm" else 2)]
  if cell == "slstm":
    units[2] = warm * np.float64(np.float32(np.exp(units[2])))
  return Case(
    x,
    normal(4, H, D, D) * 2.0 ** -round(np.log2(D / 6) / 2),
    normal(4, H, D),
    tuple(units),
    normal(B, time, H, D),
    tuple(normal(B, H, D) for _ in units[form.scaled and cell == "slstm" :]),
  )


@functools.cache
def program(cell: str, which: str, form: Form):
  """Results and gradients, in the types of the arguments."""
  module, sequence, _ = CELLS[cell]

  def loss(floats, segments, segment, dy, dunits):
    x, R, b, units = floats
    if which == "ours":
      state = module.State(*units, segment_B=segment)
      y, last = sequence(
        x, R, b, segments_BT=segments, state=state, backend=form.backend
      )
      last = last[:-1]
    else:
      y, last = textbook(cell, x, R, b, segments, units, segment)
    if form.scaled:
      last = in_one_scale(last)
    total = sum(jnp.vdot(a, d) for a, d in zip(last, dunits, strict=True))
    return total + jnp.vdot(y, dy.astype(y.dtype)).astype(total.dtype), (
      y,
      last,
    )

  return compiled.jit(jax.grad(loss, has_aux=True))


def run(
  cell: str, which: str, c: Case, dtype: str, form: Form = NATIVE
) -> dict[str, np.ndarray]:
  """y, last units and gradients by name; only x and R are ever bfloat16."""
  with jax.enable_x64(dtype == "float64"):
    wide = jnp.promote_types(dtype, jnp.float32)
    cast = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, wide))
    floats = (c.x.astype(dtype), c.R.astype(dtype), *cast((c.b, c.units)))
    segments = jnp.asarray(mlstm_contract.segments(c.x.shape[1]))
    grads, (y, last) = program(cell, which, form)(
      floats, segments, jnp.asarray(BEFORE), *cast((c.dy, c.dunits))
    )
  names = ["y", *(f"last {i}" for i in range(len(last))), "dx", "dR", "db"]
  values = [y, *last, *grads[:3], *grads[3]]
  names += [f"dunits {i}" for i in range(len(grads[3]))]
  return {
    name: np.asarray(a, np.float64)
    for name, a in zip(names, values, strict=True)
  }


@functools.cache
def truth(
  cell: str, gate: str, time: int, form: Form = NATIVE
) -> dict[str, np.ndarray]:
  c = case(cell, gate, time, form)
  return run(cell, "textbook", c, "float64", form)


@functools.cache
def moved(cell: str, gate: str, time: int, dtype: str, form: Form):
  """Truths for inputs each of which is an ulp of its type away."""
  c = case(cell, gate, time, form)
  rng = np.random.default_rng(2)

  def move(x, dtype="float32"):
    signs = rng.choice([-1, 1], size=x.shape)
    return x * (1 + signs * float(ml_dtypes.finfo(dtype).eps))

  def other() -> Case:
    narrow = {name: move(getattr(c, name), dtype) for name in ("x", "R", "dy")}
    wide = [tuple(map(move, units)) for units in (c.units, c.dunits)]
    return Case(b=move(c.b), units=wide[0], dunits=wide[1], **narrow)

  return [run(cell, "textbook", other(), "float64", form) for _ in range(4)]


def float64_shares(
  cell: str, gate: str, time: int, *, form: Form = NATIVE
) -> dict[str, float]:
  """The error of every result as a share of 1e-10 of its norm."""
  like = form._replace(backend=NATIVE.backend)
  expected = truth(cell, gate, time, like)
  results = run(cell, "ours", case(cell, gate, time, like), "float64", form)
  return {
    name: mlstm_contract.relative(value, expected[name]) / 1e-10
    for name, value in results.items()
  }


def rounded_shares(
  cell: str, gate: str, time: int, *, dtype: str, form: Form = NATIVE
) -> dict[str, float]:
  """The error of every result as a share of the bound.

  That is twice the sum of what the textbook loses and of what an ulp in the
  inputs changes.
  """
  like = form._replace(backend=NATIVE.backend)
  c, expected = case(cell, gate, time, like), truth(cell, gate, time, like)
  native = run(cell, "textbook", c, dtype, like)
  others = moved(cell, gate, time, dtype, like)
  return {
    name: excess(
      value,
      native[name],
      expected[name],
      moved=[other[name] for other in others],
    )
    for name, value in run(cell, "ours", c, dtype, form).items()
  }


SHARES = {
  "float64": float64_shares,
  "float32": functools.partial(rounded_shares, dtype="float32"),
  "bfloat16": functools.partial(rounded_shares, dtype="bfloat16"),
}


@pytest.mark.parametrize("dtype", SHARES)
@pytest.mark.parametrize("cell", CELLS)
def test_all_gates(cell, dtype):
  for gate in GATES:
    mlstm_contract.check(SHARES[dtype](cell, gate, TIME))


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 300, 512])
@pytest.mark.parametrize("cell", CELLS)
def test_all_gates_at_other_lengths(cell, time):
  for gate in GATES:
    for shares in SHARES.values():
      mlstm_contract.check(shares(cell, gate, time))


@pytest.mark.parametrize("time", [1, 2, TIME, 300])
@pytest.mark.parametrize("form", KERNELS_HERE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_hold_the_contract_on_their_device(cell, form, time):
  for gate in GATES:
    mlstm_contract.check(
      rounded_shares(cell, gate, time, dtype="bfloat16", form=form)
    )


def test_y_does_not_depend_on_the_scale():
  """y does not change when c, n and m stand for the same past otherwise."""
  c = case("slstm", "normal")
  y, cell, n, m = (u[1:2] for u in c.units)
  shift = 0.7
  moved = (y, cell * np.exp(-shift), n * np.exp(-shift), m + shift)
  with jax.enable_x64(True):
    outputs = [
      slstm.slstm(
        jnp.asarray(c.x[1:2]),
        jnp.asarray(c.R),
        jnp.asarray(c.b),
        state=slstm.State(
          *map(jnp.asarray, units), segment_B=jnp.zeros(1, jnp.int32)
        ),
      )[0]
      for units in ((y, cell, n, m), moved)
    ]
  np.testing.assert_allclose(*outputs, rtol=1e-12)


@functools.partial(compiled.jit, static_argnames="cell")
def apply(x, R, b, segments, state, *, cell):
  return CELLS[cell][1](x, R, b, segments_BT=segments, state=state)


def inputs(cell: str, gate: str = "normal"):
  """x, R, b, segments and state of a case, to be used in float64."""
  c = case(cell, gate)
  state = CELLS[cell][0].State(*c.units, segment_B=BEFORE)
  return c.x, c.R, c.b, mlstm_contract.segments(TIME), state


def assert_equal(actual, expected, tolerance=0.0):
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_parts_equal_the_whole(cell):
  x, R, b, segments, first = inputs(cell)
  step = compiled.jit(CELLS[cell][2])
  with jax.enable_x64(True):
    whole = apply(x, R, b, segments, first, cell=cell)
    outputs, state = [], first
    for t in range(13):
      y, state = step(x[:, t], R, b, segments_B=segments[:, t], state=state)
      outputs.append(y[:, None])
    y, state = apply(x[:, 13:], R, b, segments[:, 13:], state, cell=cell)
    parts = np.concatenate([*outputs, y], axis=1), state
  assert_equal(parts, whole, 1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_no_segments_and_no_state(cell):
  x, R, b, _, state = inputs(cell)
  warm = jax.tree.map(lambda a: a[1:2], state)
  same = np.full((1, TIME), 3, np.int32)
  empty = jax.tree.map(np.zeros_like, warm)
  with jax.enable_x64(True):
    run = functools.partial(apply, x[1:2], R, b, cell=cell)
    assert_equal(run(None, warm), run(same, warm))
    assert_equal(run(None, empty), run(None, None))
    assert_equal(run(None, None)[1].segment_B, np.array([1]))


@pytest.mark.parametrize("cell", CELLS)
def test_on_a_mesh_gradients_of_matrices_are_sums_over_devices(cell):
  """Of matrices that all devices share; their rows start with no state."""
  x, R, b, segments, _ = inputs(cell)
  dy = case(cell, "normal").dy
  axes = ("data", "fsdp")
  mesh = jax.make_mesh(
    (2, 2), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
  )
  rows, shared = PartitionSpec(axes), PartitionSpec()

  def both(x, R, b, segments, dy):
    def y(x, R, b):
      return CELLS[cell][1](x, R, b, segments_BT=segments)[0]

    found, back = jax.vjp(y, x, R, b)
    return found, *back(dy)

  on_mesh = jax.shard_map(
    both,
    mesh=mesh,
    in_specs=(rows, shared, shared, rows, rows),
    out_specs=(rows, rows, shared, shared),
  )
  with jax.enable_x64(True):
    results = [compiled.jit(f)(x, R, b, segments, dy) for f in (on_mesh, both)]
  assert_equal(*results, 2e-14)  # 4.9e-15 measured


@pytest.mark.parametrize("gate", ["normal", "mixed=100", "i=100"])
@pytest.mark.parametrize("cell", CELLS)
def test_documents_rows_and_padding_do_not_mix(cell, gate):
  """Every document gives what it gives alone, at any gates, in any batch."""
  x, R, b, segments, state = inputs(cell, gate)
  with jax.enable_x64(True):
    y, last = apply(x, R, b, segments, state, cell=cell)
    garbage = np.where((segments == 0)[..., None, None, None], np.nan, x)
    assert_equal(apply(garbage, R, b, segments, state, cell=cell), (y, last))
    for row, document in ((1, 4), (1, 5), (1, 6), (2, 1), (2, 2), (3, 4)):
      (place,) = np.nonzero(segments[row] == document)
      # Alone, at the beginning of a row of the same length.
      alone = np.zeros_like(x[:1])
      alone[:, : len(place)] = x[row, place]
      only = (np.arange(TIME) < len(place)).astype(np.int32)[None]
      y_alone, last_alone = apply(alone, R, b, only, None, cell=cell)
      assert_equal(y_alone[0, : len(place)], y[row, place], 1e-13)
      if document == segments[row].max():
        pairs = zip(last_alone[:-1], last[:-1], strict=True)
        for u_alone, u in pairs:
          assert_equal(u_alone[0], u[row], 1e-13)
  assert not np.any(y[segments == 0])


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_do_not_cross_borders(cell):
  """Nor do they come from later tokens."""
  x, R, b, segments, state = inputs(cell)

  @compiled.jit
  def gradient(x, mask):
    def loss(x):
      y, _ = CELLS[cell][1](x, R, b, segments_BT=segments, state=state)
      return jnp.sum(y * mask[..., None, None])

    return jax.grad(loss)(x)

  with jax.enable_x64(True):
    x = np.where((segments == 0)[..., None, None, None], np.nan, x)
    R, b, segments, state = jax.tree.map(jnp.asarray, (R, b, segments, state))
    for t in (0, 8, 20):
      seen = (segments == segments[:, t : t + 1]) & (np.arange(TIME) <= t)
      dx = gradient(x, np.broadcast_to(np.arange(TIME) == t, segments.shape))
      assert not np.any(dx[~seen])
      assert np.all(np.any(dx[segments[:, t] > 0, t], axis=(1, 2, 3)))


@pytest.mark.parametrize("cell", CELLS)
def test_types(cell):
  """R's type is that of products; states and gates stay float32."""
  x, R, b, segments, state = inputs(cell)
  units = [jax.ShapeDtypeStruct(u.shape, "float32") for u in state[:-1]]

  def loss(x, R, b, segments, units, segment):
    state = CELLS[cell][0].State(*units, segment_B=segment)
    y, last = CELLS[cell][1](x, R, b, segments_BT=segments, state=state)
    return jnp.sum(y).astype("float32"), (y, last)

  for kind in ("bfloat16", "float32"):
    grads, (y, last) = jax.eval_shape(
      jax.grad(loss, (0, 1, 2), has_aux=True),
      jax.ShapeDtypeStruct(x.shape, kind),
      jax.ShapeDtypeStruct(R.shape, "bfloat16"),
      jax.ShapeDtypeStruct(b.shape, "float32"),
      jax.ShapeDtypeStruct(segments.shape, "int32"),
      units,
      jax.ShapeDtypeStruct(BEFORE.shape, "int32"),
    )
    assert [g.dtype for g in grads] == [kind, "bfloat16", "float32"]
    assert y.dtype == kind
    assert {u.dtype for u in last[:-1]} == {jnp.dtype("float32")}


def keep_the_state(monkeypatch):
  """Documents go on from the state of those before them."""
  monkeypatch.setattr(recurrence, "_fresh", lambda start, units: units)


def no_way_back_through_the_matrix(monkeypatch):
  """The backward scan forgets that y feeds the next gates."""

  def product(spec, x, y, dtype, product=recurrence.product):
    z = product(spec, x, y, dtype)
    return 0 * z if spec == "BGHE,GHDE->BHD" else z

  monkeypatch.setattr(recurrence, "product", product)


@pytest.mark.parametrize(
  "mutation", [keep_the_state, no_way_back_through_the_matrix]
)
def test_mutations_are_caught(mutation, monkeypatch):
  program.cache_clear()
  mutation(monkeypatch)
  try:
    with pytest.raises(AssertionError):
      mlstm_contract.check(float64_shares("slstm", "normal", TIME))
  finally:
    program.cache_clear()
