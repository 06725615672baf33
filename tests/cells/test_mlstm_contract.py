"""The contract of mlstm_contract.py, over its tables."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import mlstm_contract
import numpy as np
import pytest
from mlstm_contract import (
  FORMS,
  FORMS_HERE,
  GATES,
  RULED,
  TRUTH,
  Form,
  Options,
  case,
  run,
  truth,
)

from xlstm_jax.cells.mlstm import (
  backends,
  chunkwise,
  parallel,
  sequence,
)
from xlstm_jax.cells.mlstm.state import rescale

CHECKS = {
  "float64": mlstm_contract.check_float64,
  "float32": functools.partial(mlstm_contract.check_rounded, dtype="float32"),
  "bfloat16": functools.partial(mlstm_contract.check_rounded, dtype="bfloat16"),
}
TABLE = [
  pytest.param(
    dtype,
    form,
    id=f"{form}-{dtype}",
    # Of the chunk sizes one is quick: every size compiles anew.
    marks=[pytest.mark.slow] if form.chunk not in (None, 16) else [],
  )
  for form in FORMS_HERE
  for dtype in form.dtypes
]
NAMED = backends.BACKENDS.backends
KERNELS = [form for form in FORMS_HERE if NAMED[form.backend].is_kernel]
PLAIN = Options(normalize=False)
SIGMOID = Options(input_gate="sigmoid")
OPTIONS = {
  "sigmoid": (SIGMOID, GATES),
  "sigmoid-plain": (Options(input_gate="sigmoid", normalize=False), GATES),
  # Without the normaliser, exp(100) is what the definition asks for.
  "exp-plain": (PLAIN, ["normal", "init", "init0", "capped"]),
  "eps0": (Options(eps=0.0), GATES),
}


@pytest.mark.parametrize(("dtype", "form"), TABLE)
def test_all_gates(dtype, form):
  for gate in GATES:
    # An ulp in the inputs changes little where one token rules the memory, and
    # an ulp of C much: in float32 too, the definition is no measure of itself.
    if not (form == TRUTH and dtype == "float32" and gate in RULED):
      CHECKS[dtype](form, gate)


# No chunk of several tokens divides these lengths.
LONG = [
  *((301, Form("chunkwise", chunk)) for chunk in (1, 16, 48, 128)),
  *((512, Form("chunkwise", chunk)) for chunk in (7, 24, 511)),
  *((time, Form("parallel")) for time in (301, 512)),
  *((time, form) for time in (301, 512) for form in KERNELS),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("time", "form"),
  [pytest.param(*case, id="{}-{}".format(*case)) for case in LONG],
)
def test_all_gates_of_longer_sequences(time, form):
  for gate in GATES:
    for dtype in form.dtypes:
      # In float32 an error there is that of C's rounding at each step or chunk,
      # of which two draws differ by 2 (decision 4).
      if not (dtype == "float32" and gate in RULED):
        CHECKS[dtype](form, gate, time)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [64, 256])
def test_wide_heads_in_the_chunks_of_kernels(chunk):
  form = Form("chunkwise", chunk, dims=(64, 128))
  for check in CHECKS.values():
    check(form, "mixed=50", 301)


WIDE = (
  (96, 192),
  (128, 256),
  (256, 512),
  (384, 384),
  (512, 512),
  (768, 768),
  (1280, 1280),
)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dims", "form"),
  [
    pytest.param(dims, form, id=f"{dims[0]}-{dims[1]}-{form}")
    for dims in WIDE
    for form in KERNELS
  ],
)
def test_wide_heads_of_kernels(dims, form):
  """Without capped gates, where the luck of one rounding decides.

  Of 256 x 512 one reader makes all gradients (decision 5, "Other draws").
  """
  form = dataclasses.replace(form, dims=dims)
  # What is compared keeps C of every token, 50 MB at the widest.
  time = 301 if max(dims) <= 512 else 140
  for gate in ("normal", "init"):
    mlstm_contract.check_rounded(form, gate, time, dtype="bfloat16")


# Stretches of 18, 36 and 9 tokens; on 8 devices the last is padding alone in
# one row, and documents start and end in any of them.
SPLIT_TIME = 72
SPLIT = [
  Form("chunkwise", 9, 4),
  Form("recurrent", None, 2, ("float64", "float32")),
  Form("parallel", None, 8, ("float64", "float32")),
]


@pytest.mark.parametrize(
  ("dtype", "form"),
  [
    pytest.param(dtype, form, id=f"{form}-{dtype}")
    for form in SPLIT
    for dtype in form.dtypes
  ],
)
def test_time_may_be_split_over_devices(dtype, form):
  for gate in GATES:
    CHECKS[dtype](form, gate, SPLIT_TIME)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_options_where_time_is_split(options):
  options, gates = OPTIONS[options]
  for gate in gates:
    mlstm_contract.check_float64(SPLIT[0], gate, SPLIT_TIME, options)


@pytest.mark.parametrize(
  ("form", "dtype", "options"),
  [
    pytest.param(
      form,
      dtype,
      options,
      id=f"{form}-{dtype}-{options}",
      marks=[] if quick else [pytest.mark.slow],
    )
    for form in (
      Form("chunkwise", 16, dtypes=("float64", "float32")),
      Form("parallel", dtypes=("float64", "float32")),
      *KERNELS,
    )
    for dtype in form.dtypes
    for options in OPTIONS
    for quick in [
      form.chunk == 16 and dtype == "float64" and options in ("sigmoid", "eps0")
    ]
  ],
)
def test_options(form, dtype, options):
  options, gates = OPTIONS[options]
  for gate in gates:
    CHECKS[dtype](form, gate, options=options)


QUICK_TIMES = (1, 2, 17)
TIMES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130, 256, 500, 512)


@pytest.mark.parametrize(
  ("time", "form"),
  [
    pytest.param(
      time,
      form,
      id=f"{time}-{form}",
      marks=[] if quick else [pytest.mark.slow],
    )
    for time in TIMES
    for form in (
      Form("chunkwise"),
      Form("chunkwise", 24),
      Form("parallel"),
      *KERNELS,
    )
    for quick in [time in QUICK_TIMES and form == Form("chunkwise")]
  ],
)
def test_any_length(time, form):
  CHECKS[form.dtypes[0]](form, "normal", time)
  if time in (1, 17, 130, 500):
    # A loud token alone has h = +-v: eps is all that dq is left with.
    gate = "normal" if time == 1 else "mixed=100"
    for dtype in ("float32", "bfloat16"):
      if dtype in form.dtypes:
        CHECKS[dtype](form, gate, time)


def each_row(both):
  """As `both` over [B, T, ...], one row after the other."""

  def mapped(*arrays):
    rows = jax.vmap(both)(*(x[:, None] for x in arrays))
    return [x[:, 0] for x in rows]

  return mapped


def on_a_mesh(both, *, check_vma=True):
  """As `both`, in shard_map: the four rows over the devices there are."""
  devices = jax.devices()[: math.gcd(4, jax.device_count())]
  mesh = jax.make_mesh(
    (len(devices),),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )
  spec = jax.sharding.PartitionSpec("data")
  return jax.shard_map(
    both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
  )


def both_passes(form, q, k, v, dh, i, f, wrapped=lambda cell: cell):
  """h and the gradients of the tokens and gates; the cell is `wrapped`."""

  def cell(q, k, v, i, f):
    options = {"backend": form.backend, "chunk": form.chunk}
    return backends.mlstm(q, k, v, i_BTH=i, f_BTH=f, **options)[0]

  h, back = jax.vjp(wrapped(cell), q, k, v, i, f)
  return [h, *back(dh)]


@functools.cache
def plain(form):
  """Tokens and gates in the form's last type, and `both_passes` of them."""
  x = case("normal", 67, form.dims)
  arrays = [jnp.asarray(y, form.dtypes[-1]) for y in (*x[:3], x.dh_BTHV)]
  arrays += [jnp.asarray(y, jnp.float32) for y in (x.i_BTH, x.f_BTH)]
  return arrays, jax.jit(functools.partial(both_passes, form))(*arrays)


@pytest.mark.parametrize(
  "transformed", ["vmap", "remat", "shard_map", "shard_map-unchecked"]
)
@pytest.mark.parametrize(
  "form",
  [Form("recurrent"), Form("parallel"), Form("chunkwise", 16), *KERNELS],
  ids=str,
)
def test_transformations_change_nothing(form, transformed):
  arrays, plain_results = plain(form)
  both = functools.partial(both_passes, form)
  other = {
    "vmap": each_row(both),
    "remat": functools.partial(both, wrapped=jax.checkpoint),
    "shard_map": on_a_mesh(both),
    "shard_map-unchecked": on_a_mesh(both, check_vma=False),
  }[transformed]
  for got, expected in zip(jax.jit(other)(*arrays), plain_results, strict=True):
    got, expected = np.float64(got), np.float64(expected)
    assert np.all(np.isfinite(expected))
    error = np.linalg.norm(got - expected)
    # 2.2e-7 measured on CPU; a few results may be rounded the other way. What
    # kernels lose was not recorded on a GPU.
    eps = float(jnp.finfo(form.dtypes[-1]).eps)
    bound = eps if form in KERNELS else 1e-4
    assert error <= bound * np.linalg.norm(expected)


def test_definition_is_the_unstabilised_recurrence():
  """C, n and h without any m, in the definition's own equations."""
  x = case("normal")
  C = np.exp(x.state.m_BH)[..., None, None] * x.state.C_BHKV
  n = np.exp(x.state.m_BH)[..., None] * x.state.n_BHK
  m, segment = x.state.m_BH, x.state.segment_B
  h_BTHV = np.zeros_like(x.v_BTHV)
  for t in range(x.q_BTHK.shape[1]):
    start = (x.segments_BT[:, t] != segment) & (x.segments_BT[:, t] != 0)
    real = x.segments_BT[:, t] != 0
    segment = np.where(real, x.segments_BT[:, t], segment)
    reset = np.where(start, 0.0, 1.0)[:, None]
    C, n, m = reset[..., None, None] * C, reset[..., None] * n, reset * m
    q, k, v = x.q_BTHK[:, t] * 8**-0.5, x.k_BTHK[:, t], x.v_BTHV[:, t]
    i, f = np.exp(x.i_BTH[:, t]), 1 / (1 + np.exp(-x.f_BTH[:, t]))
    i, f = np.where(real[:, None], i, 0), np.where(real[:, None], f, 1)
    C = f[..., None, None] * C + (
      i[..., None, None] * k[..., :, None] * v[..., None, :]
    )
    n = f[..., None] * n + i[..., None] * k
    with np.errstate(divide="ignore"):
      m = np.maximum(np.log(f) + m, np.log(i))
    size = np.maximum(np.abs(np.sum(n * q, -1)), 1) + 1e-6 * np.exp(m)
    h_BTHV[:, t] = np.einsum("BHKV,BHK->BHV", C, q) / size[..., None]
    h_BTHV[~real, t] = 0
  expected = truth("normal")
  np.testing.assert_allclose(expected["h"], h_BTHV, rtol=1e-9, atol=1e-12)
  scale = np.exp(expected["m"])
  np.testing.assert_allclose(expected["m"], m, rtol=1e-12)
  np.testing.assert_allclose(expected["C"] * scale[..., None, None], C)
  np.testing.assert_allclose(expected["n"] * scale[..., None], n)


def test_gradient_is_the_slope():
  """Finite differences of the definition, along random directions."""
  rng = np.random.default_rng(1)
  x, grads = case("normal", 12), truth("normal", 12)
  fields = {"q_BTHK": "dq", "k_BTHK": "dk", "v_BTHV": "dv"}
  fields |= {"i_BTH": "di", "f_BTH": "df"}
  for field, name in fields.items():
    direction = rng.normal(size=getattr(x, field).shape)

    def loss(step, field=field, direction=direction):
      moved = x._replace(**{field: getattr(x, field) + step * direction})
      out = run(Form("recurrent"), moved, "float64")
      return np.vdot(out["h"], x.dh_BTHV) + sum(
        np.vdot(out[key], d) for key, d in zip("Cnm", x.dstate, strict=True)
      )

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(np.vdot(grads[name], direction), slope, 1e-6)


def leak(monkeypatch):
  """The state crosses borders of documents."""

  def update(tokens, segment_B, *, stabilize, update=chunkwise.update):
    del segment_B
    return update(tokens, tokens.id_BT[:, -1], stabilize=stabilize)

  monkeypatch.setattr(chunkwise, "update", update)


def no_normaliser_gradient(monkeypatch):
  """The normaliser counts as a constant, as in other kernels."""

  def readout(C, n, m, *, readout=parallel.readout, **options):
    return readout(C, jax.lax.stop_gradient(n), m, **options)

  monkeypatch.setattr(parallel, "readout", readout)


def scale_gradient_twice(monkeypatch):
  """What flows back through the scale of the last state counts twice."""

  def with_own_scale(state, _):
    m_BH = jax.lax.stop_gradient(state.m_BH)
    return rescale(state._replace(m_BH=m_BH), state.m_BH)

  monkeypatch.setattr(chunkwise, "with_own_scale", with_own_scale)


def differences_of_running_sums(monkeypatch):
  """The sum of log f between two tokens as F_t - F_s, which cancels."""

  def sums_between(x):
    upto = jnp.cumsum(x, axis=-1)
    return upto[..., :, None] - upto[..., None, :]

  monkeypatch.setattr(parallel, "sums_between", sums_between)


def narrow_sums(monkeypatch):
  """Sums of log f in bfloat16."""

  def sums_after(x, sums_after=parallel.sums_after):
    return sums_after(x.astype(jnp.bfloat16)).astype(x.dtype)

  monkeypatch.setattr(parallel, "sums_after", sums_after)


def forget_programs(monkeypatch):
  """Compiles forms anew for the rest of a test; others keep the sound ones."""
  anew = functools.cache(mlstm_contract.program.__wrapped__)
  monkeypatch.setattr(mlstm_contract, "program", anew)


@pytest.mark.parametrize(
  ("mutation", "dtype", "gate"),
  [
    (leak, "float64", "normal"),
    (no_normaliser_gradient, "float64", "normal"),
    (scale_gradient_twice, "float64", "normal"),
    (differences_of_running_sums, "float32", "forget"),
    (narrow_sums, "bfloat16", "init0"),
  ],
)
def test_mutations_are_caught(mutation, dtype, gate, monkeypatch):
  form = Form("chunkwise", 16)
  CHECKS[dtype](form, gate)  # the truth is kept from before the mutation
  forget_programs(monkeypatch)
  mutation(monkeypatch)
  with pytest.raises(AssertionError):
    CHECKS[dtype](form, gate)


def leak_between_devices(monkeypatch):
  """What a device passes on crosses borders of documents."""

  def update(tokens, segment_B, *, stabilize, update=backends.update):
    del segment_B
    return update(tokens, tokens.id_BT[:, -1], stabilize=stabilize)

  monkeypatch.setattr(backends, "update", update)


def only_the_neighbour(monkeypatch):
  """A device learns nothing of those before its neighbour."""
  monkeypatch.setattr(sequence, "composed", lambda _, second, dtype: second)


def own_end(monkeypatch):
  """Every device returns the state that its own tokens leave."""
  monkeypatch.setattr(sequence, "of_holder", lambda tree, *_: tree)


@pytest.mark.parametrize(
  "mutation", [leak_between_devices, only_the_neighbour, own_end]
)
def test_mutations_are_caught_where_time_is_split(mutation, monkeypatch):
  truth("normal", SPLIT_TIME)  # is kept from before the mutation
  forget_programs(monkeypatch)
  mutation(monkeypatch)
  with pytest.raises(AssertionError):
    CHECKS["float64"](Form("chunkwise", 9, 4), "normal", SPLIT_TIME)


def test_backends_are_all_tested():
  """Kernels too, whatever the device."""
  assert {form.backend for form in FORMS} == set(NAMED)


def test_backends_run_wherever_they_are_not_refused():
  here = {form.backend for form in FORMS_HERE}
  kernels = {name for name, form in NAMED.items() if form.is_kernel}
  assert here >= set(NAMED) - kernels
  assert set(mlstm_contract.REFUSALS) == kernels
  for name, refusal in mlstm_contract.REFUSALS.items():
    assert (name in here) == (refusal() is None)
