"""State, documents and choices of the mLSTM, whatever form computes it."""

import dataclasses
import functools
import inspect
import logging
import types

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells import backends
from xlstm_jax.cells.mlstm import BACKENDS, Shapes, State, mlstm, mlstm_step
from xlstm_jax.cells.mlstm.chunkwise import default_chunk
from xlstm_jax.errors import UserError

FORMS = [("recurrent", None), ("parallel", None), ("chunkwise", 8)]
EXTREMES = {  # gates of the tokens around a border: i before, f at, i after
  "moderate": (0.0, 2.0, 0.0),
  "old loud": (15.0, -25.0, -10.0),
  "old louder": (100.0, 15.0, -100.0),
  "new loud": (-100.0, -100.0, 100.0),
}


def tokens(batch, time, seed=0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  normal = functools.partial(rng.normal, size=(batch, time, 2, 8))
  x = {"q": normal(), "k": normal(), "v": normal()}
  x |= {"i": normal()[..., 0], "f": normal()[..., 1] + 2}
  return {name: a.astype(dtype) for name, a in x.items()}


def warm_state(batch, dtype=np.float64):
  rng = np.random.default_rng(7)
  shapes = ((batch, 2, 8, 8), (batch, 2, 8), (batch, 2))
  C, n, m = (rng.normal(size=shape).astype(dtype) for shape in shapes)
  return State(C, n, m, np.full(batch, 3, np.int32))


def part(x, *index):
  return {name: a[index] for name, a in x.items()}


def apply(x, segments_BT=None, state=None, *, form):
  backend, chunk = form
  return mlstm(
    x["q"],
    x["k"],
    x["v"],
    i_BTH=x["i"],
    f_BTH=x["f"],
    segments_BT=segments_BT,
    state=state,
    backend=backend,
    chunk=chunk,
  )


run = compiled.jit(apply, static_argnames="form")


def assert_close(actual, expected, tolerance=1e-12):
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def like(mask, a):
  """The mask with trailing dimensions of 1, as many as `a` has more."""
  return mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim))


def gate_gradients(form, dtype):
  """Those of f and of the first m where the state's memory dominates."""
  state = warm_state(2)
  loud = np.full_like(state.m_BH, 20.0)
  with jax.enable_x64(dtype == "float64"):
    x = {name: jnp.asarray(a, dtype) for name, a in tokens(2, 64).items()}
    C, n, m = (jnp.asarray(a, dtype) for a in (*state[:2], loud))
    weights = np.random.default_rng(1).normal(size=(2, 64, 2, 8))

    @jax.grad
    def gradients(gates):
      past = State(C, n, gates["m"], jnp.asarray(state.segment_B))
      h, _ = apply(x | {"f": gates["f"]}, state=past, form=form)
      return jnp.sum(h * weights)

    found = jax.jit(gradients)({"f": x["f"], "m": m})
  return {name: np.float64(a) for name, a in found.items()}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_gates_keep_their_digits_beside_an_old_memory(form):
  """They are far smaller than those of q: no terms may be made that cancel.

  Measured: at most 1.0e-5; with m as a constant 3.8e-4 to 2.4e-3.
  """
  truth = gate_gradients(("recurrent", None), "float64")
  for name, found in gate_gradients(form, "float32").items():
    error = np.linalg.norm(found - truth[name]) / np.linalg.norm(truth[name])
    assert error <= 2e-5, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "cuts",
  [(13,), pytest.param((1, 5, 6, 20), marks=pytest.mark.slow)],
)
def test_split_equals_whole(form, cuts):
  """Results and gradients do not depend on where a sequence is cut."""
  x, state = tokens(2, 21), warm_state(2)
  segments = np.array([[3] * 9 + [4] * 12, [3] * 5 + [5] * 13 + [0] * 3])
  segments = jnp.asarray(segments, jnp.int32)

  def in_parts(x, state, bounds):
    outputs = []
    for start, stop in bounds:
      piece = part(x, slice(None), slice(start, stop))
      h, state = apply(piece, segments[:, start:stop], state, form=form)
      outputs.append(h)
    return jnp.concatenate(outputs, axis=1), state

  def loss(floats, bounds):
    x, (C, n, m) = floats
    h, last = in_parts(x, State(C, n, m, jnp.asarray(state.segment_B)), bounds)
    total = jnp.sum(jnp.sin(h))
    return total + sum(jnp.sum(jnp.cos(a)) for a in last[:3]), (h, last)

  both = compiled.jit(
    jax.value_and_grad(loss, has_aux=True), static_argnames="bounds"
  )
  bounds = tuple(zip((0, *cuts), (*cuts, 21), strict=True))
  with jax.enable_x64(True):
    parts = both((x, state[:3]), bounds=bounds)
    whole = both((x, state[:3]), bounds=((0, 21),))
  assert_close(parts, whole)


@functools.partial(compiled.jit, static_argnames="form")
def parts_and_gradients(x, segments, first, *, form):
  """Outputs, and the gradients of the first document's and of the others'."""

  def loss(x, mask):
    h, last = apply(x, segments, form=form)
    return jnp.sum(h * mask), (h, last)

  mask = first[..., None, None]
  dfirst, results = jax.grad(loss, has_aux=True)(x, mask)
  dsecond, _ = jax.grad(loss, has_aux=True)(x, ~mask)
  return *results, dfirst, dsecond


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", EXTREMES)
def test_packed_equals_separate(form, gates):
  """Nothing crosses a border, not even through m, at any gates."""
  borders = np.array([5, 8, 13])
  x = tokens(3, 21)
  first = np.arange(21) < borders[:, None]
  at = np.arange(21) == borders[:, None]
  i_before, f_at, i_after = EXTREMES[gates]
  x["i"] += like(np.where(first, i_before, i_after), x["i"])
  x["f"] = np.where(like(at, x["f"]), f_at, x["f"])
  # The second document alone, at the beginning of its row.
  alone = {k: np.zeros_like(a) for k, a in x.items()}
  length = 21 - borders
  for row, border in enumerate(borders):
    for k in x:
      alone[k][row, : 21 - border] = x[k][row, border:]
  real = np.arange(21) < length[:, None]

  with jax.enable_x64(True):
    segments = np.where(first, 1, 2).astype(np.int32)
    h, last, dfirst, dsecond = parts_and_gradients(
      x, segments, first, form=form
    )
    h1, _, _, _ = parts_and_gradients(
      x, first.astype(np.int32), first, form=form
    )
    h2, last2, _, _ = parts_and_gradients(
      alone, real.astype(np.int32), first, form=form
    )
  assert_close(h[first], h1[first])
  assert_close(h[~first], h2[real])
  assert_close(last[:3], last2[:3])
  for k in x:
    assert not np.any(dsecond[k][first]), k
    assert not np.any(dfirst[k][~first]), k


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_later_ones(form):
  """The gradient of an output with respect to later tokens is exactly 0."""
  x = tokens(1, 21)

  def loss(x, t):
    return jnp.sum(apply(x, form=form)[0][:, t])

  gradient = compiled.jit(jax.grad(loss))
  with jax.enable_x64(True):
    for t in (0, 7, 8, 14):
      for k, dx in gradient(x, t).items():
        assert not np.any(dx[:, t + 1 :]), (k, t)
        assert np.any(dx[:, : t + 1]) or (k, t) == ("f", 0)


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_padding_do_not_mix(form):
  """Rows do not see each other, and nothing sees what padding contains."""
  x, other = tokens(3, 21), tokens(3, 21, seed=5)
  warm = np.array([False, True, True])
  state = jax.tree.map(lambda a: a * like(warm, a), warm_state(3))
  segments = [[1] * 21, [3] * 4 + [4] * 9 + [0] * 8, [0] * 21]
  segments = np.array(segments, np.int32)

  def row(tree, index):
    return jax.tree.map(lambda a: a[index : index + 1], tree)

  def mixed(mask):
    return {k: np.where(like(mask, a), a, other[k]) for k, a in x.items()}

  with jax.enable_x64(True):
    whole = run(x, segments, state, form=form)
    for index in range(3):
      moved = run(mixed(np.arange(3) == index), segments, state, form=form)
      assert_close(row(moved, index), row(whole, index), 0.0)
    padded = run(mixed(segments != 0), segments, state, form=form)
    cut = part(x, slice(1, 2), slice(0, 13))
    _, shorter = run(cut, segments[1:2, :13], row(state, 1), form=form)
  assert_close(padded, whole, 0.0)
  h, last = whole
  assert not np.any(h[segments == 0])
  assert_close(row(last, 1), shorter)
  assert_close(row(last, 2), row(state, 2), 0.0)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]])
def test_without_segments_every_token_continues(form):
  x, state = tokens(2, 21), warm_state(2)
  same = np.full((2, 21), 3, np.int32)
  with jax.enable_x64(True):
    plain = run(x, None, state, form=form)
    assert_close(plain, run(x, same, state, form=form), 0.0)
    # A zero segment is no reason to drop what a state holds.
    unnamed = state._replace(segment_B=np.zeros(2, np.int32))
    h, last = run(x, None, unnamed, form=form)
    assert_close(h, plain[0], 0.0)
    np.testing.assert_array_equal(last.segment_B, [1, 1])
    # The empty past is a state like any other.
    zero = jax.tree.map(np.zeros_like, state)
    assert_close(run(x, None, zero, form=form), run(x, form=form), 0.0)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_steps_equal_sequence(input_gate):
  x, state = tokens(2, 6), warm_state(2)
  if input_gate == "sigmoid":
    state = state._replace(m_BH=0 * state.m_BH)
  segments = np.array([[3, 3, 4, 4, 4, 5], [3, 4, 4, 4, 0, 0]], np.int32)
  options = {"input_gate": input_gate, "eps": 1e-3}

  @compiled.jit
  def sequence(x, segments_BT, state):
    i, f = x["i"], x["f"]
    return mlstm(
      *(x[name] for name in "qkv"),
      i_BTH=i,
      f_BTH=f,
      segments_BT=segments_BT,
      state=state,
      chunk=4,
      **options,
    )

  @compiled.jit
  def step(x, segments_B, state):
    i, f = x["i"], x["f"]
    return mlstm_step(
      *(x[name] for name in "qkv"),
      i_BH=i,
      f_BH=f,
      segments_B=segments_B,
      state=state,
      **options,
    )

  with jax.enable_x64(True):
    whole, last = sequence(x, segments, state)
    for t in range(6):
      h, state = step(part(x, slice(None), t), segments[:, t], state)
      assert_close(h, whole[:, t])
  assert_close(state, last)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_types(form, dtype):
  """Outputs and gradients are of the inputs' types, states are float32."""
  x = {k: a.astype(dtype) for k, a in tokens(1, 9).items()}

  def loss(x):
    h, last = apply(x, form=form)
    return jnp.sum(h).astype("float32"), (h, last)

  grads, (h, last) = jax.eval_shape(jax.grad(loss, has_aux=True), x)
  assert h.dtype == dtype
  assert [a.dtype for a in last] == ["float32"] * 3 + ["int32"]
  assert {g.dtype for g in grads.values()} == {jnp.dtype(dtype)}


def test_the_choice_is_logged_once(caplog, monkeypatch):
  ran = []

  def spy(name, form):
    def spied(*args, **options):
      ran.append(name)
      return form(*args, **options)

    return spied

  names = [n for n, form in BACKENDS.backends.items() if not form.is_kernel]
  for name in names:
    form = BACKENDS.backends[name]
    spied = dataclasses.replace(form, run=spy(name, form.run))
    monkeypatch.setitem(BACKENDS.backends, name, spied)

  def trace(time, backend="auto"):
    x = tokens(1, time)
    jax.eval_shape(functools.partial(apply, form=(backend, None)), x)

  backends._announce.cache_clear()
  with caplog.at_level(logging.INFO):
    trace(9)
    trace(9)
    for name in names:
      trace(9, name)
  assert ran == ["chunkwise", "chunkwise", *names]
  assert [record.message for record in caplog.records] == [
    "mLSTM backend on cpu: chunkwise"
  ]
  trace(1)
  assert ran[-1] == "recurrent"


TAKEN = Shapes(B=1, T=128, H=2, K=64, V=128, dtype="bfloat16")


def chosen(name="auto", **changes):
  return BACKENDS.choose(name, TAKEN._replace(**changes)).name


def test_auto_names_the_kernel_where_it_runs(monkeypatch, caplog):
  here = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
  monkeypatch.setattr(backends, "this_device", lambda: here)
  assert chosen() == "pallas_gpu"
  assert chosen(K=512, V=512) == "pallas_gpu"
  assert chosen(T=1) == "recurrent"
  assert chosen("parallel") == "parallel"
  backends._announce.cache_clear()
  with caplog.at_level(logging.INFO):
    for _ in range(2):
      assert chosen(T=127) == "chunkwise"
      for other in ({"dtype": "float32"}, {"V": 1344}, {"chunk": 48}):
        assert chosen(T=512, **other) == "chunkwise"
  start = "mLSTM backend on gpu: chunkwise, not pallas_gpu: "
  reasons = [record.message.removeprefix(start) for record in caplog.records]
  assert reasons == [
    "its chunks are longer than 127 tokens",
    "it computes in bfloat16, and the tokens are float32",
    "heads of 64 keys and 1344 values exceed 1280 numbers",
    "chunk is 48, and it takes chunks of 128 or 256 tokens",
  ]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"backend": "triton"}, "no mLSTM backend 'triton'; choose recurrent"),
    ({"chunk": 0}, "chunk is 0"),
    ({"input_gate": "softplus"}, "input_gate is 'softplus'"),
  ],
)
def test_bad_choices(options, message):
  x = {k: jnp.asarray(a) for k, a in tokens(1, 9).items()}
  gates = {"i_BTH": x["i"], "f_BTH": x["f"]}
  # The annotations, executed in tests, would refuse the gate's name first.
  call = inspect.unwrap(mlstm)
  with pytest.raises(UserError, match=message):
    call(x["q"], x["k"], x["v"], **gates, **options)


@pytest.mark.parametrize(
  ("time", "dims", "chunk"),
  [
    (8192, (256, 512), 256),
    (300, (256, 512), 160),
    (8192, (64, 128), 64),
    (2048, (64, 64), 64),
    (2048, (4, 4), 16),
    (17, (64, 64), 32),
    (5, (64, 64), 5),
    (1, (64, 64), 1),
  ],
)
def test_default_chunk(time, dims, chunk):
  assert default_chunk(time, *dims) == chunk


def test_memory_of_the_backward_pass_is_linear_in_time():
  def temporary(time, form):
    x = {k: jnp.zeros_like(a) for k, a in tokens(1, time).items()}

    def loss(x):
      return jnp.sum(apply(x, form=form)[0])

    program = compiled.jit(jax.grad(loss)).lower(x).compile()
    return program.memory_analysis().temp_size_in_bytes

  short, long = (temporary(time, ("chunkwise", 16)) for time in (512, 1024))
  assert long <= 2.1 * short
  assert temporary(1024, ("parallel", None)) > 4 * long
