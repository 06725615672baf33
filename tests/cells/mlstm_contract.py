"""What every form of the mLSTM must satisfy, as functions over a table.

A new backend joins with a row in `FORMS`; a kernel's rows are tested where its
device is. Truth is the definition in float64; inputs are numbers that bfloat16
(tokens) or float32 (gates, states) can hold, so that one truth serves all
types.

C and n mean something in the scale exp(m) alone, and forms round m apart: last
states are compared and differentiated in one scale, `Case.gauge_BH`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import compiled
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from bound import excess

from xlstm_jax import sharding
from xlstm_jax.cells.hopper_gpus import device_refusal
from xlstm_jax.cells.mlstm import State, mlstm
from xlstm_jax.cells.mlstm.state import rescale
from xlstm_jax.cells.mlstm.tpu import backend as tpu
from xlstm_jax.sharding import on_mesh, time_axis

DIMS = (8, 12)  # keys and values of a head
# Why a backend does not run on the default device, or None.
REFUSALS = {
  "pallas_gpu": device_refusal,
  "pallas_tpu": tpu.device_refusal,
}


@dataclasses.dataclass(frozen=True)
class Form:
  """A way to compute the cell.

  Attributes:
    backend: its name.
    chunk: tokens per chunk, where it has chunks.
    devices: over which time is split, where it can be.
    dtypes: the types it is tested in.
    dims: keys and values of the heads it is tested with.
  """

  backend: str
  chunk: int | None = None
  devices: int = 1
  dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
  dims: tuple[int, int] = DIMS

  def __str__(self) -> str:
    chunk = "" if self.chunk is None else f"-{self.chunk}"
    devices = "" if self.devices == 1 else f"-on-{self.devices}"
    return self.backend + chunk + devices

  def runs_here(self) -> bool:
    """Whether the default device is one that the backend takes."""
    refusal = REFUSALS.get(self.backend)
    return refusal is None or refusal() is None


FORMS = (
  # In float64 it is the truth itself, which the definition's own tests hold.
  Form("recurrent", dtypes=("float32", "bfloat16")),
  Form("parallel"),
  Form("chunkwise", 1),
  Form("chunkwise", 7),
  Form("chunkwise", 16),
  Form("chunkwise", 32),
  Form("chunkwise", 48),
  Form("chunkwise", 128),
  Form("pallas_gpu", 128, dtypes=("bfloat16",), dims=(64, 128)),
  Form("pallas_gpu", 256, dtypes=("bfloat16",), dims=(64, 128)),
  Form("pallas_tpu", 128, dtypes=("bfloat16",), dims=(64, 128)),
  Form("pallas_tpu", 256, dtypes=("bfloat16",), dims=(64, 128)),
)
FORMS_HERE = tuple(form for form in FORMS if form.runs_here())
TRUTH = FORMS[0]

ROW = ("batch", "time")
INPUTS = (*[(*ROW, None, None)] * 3, (*ROW, None), (*ROW, None), ROW)
STATE = State._make(("batch", *[None] * rest) for rest in (3, 2, 1, 0))


class Case(NamedTuple):
  """Tokens after states, the cotangents of all results, the last scale."""

  q_BTHK: np.ndarray
  k_BTHK: np.ndarray
  v_BTHV: np.ndarray
  i_BTH: np.ndarray
  f_BTH: np.ndarray
  segments_BT: np.ndarray
  state: State
  dh_BTHV: np.ndarray
  dstate: tuple[np.ndarray, ...]
  gauge_BH: np.ndarray


@dataclasses.dataclass(frozen=True)
class Options:
  """The cell's own options."""

  input_gate: str = "exp"
  normalize: bool = True
  eps: float = 1e-6


def gates(name: str, rng: np.random.Generator, shape: tuple[int, ...]):
  """Input and forget gates of [B, T, H] before their nonlinearity."""
  i, f = rng.normal(size=shape), rng.normal(size=shape)
  signs = rng.choice([-1, 1], size=(2, *shape))
  heads = np.linspace(3, 6, shape[-1])
  kinds = {
    "normal": (i, f + 2),
    "zero": (0 * i, 0 * f),
    "init": (i / 10 - 10, f / 10 + heads),
    "init0": (i / 10, f / 10 + heads),
    "i=50": (i + 50, f + 2),
    "i=-50": (i - 50, f + 2),
    "i=100": (i + 100, f + 2),
    "i=-100": (i - 100, f + 2),
    "f=50": (i, f + 50),
    "f=-50": (i, f - 50),
    "f=100": (i, f + 100),
    "f=-100": (i, f - 100),
    "both=-100": (i - 100, f - 100),
    "mixed=50": (i + 50 * signs[0], f + 50 * signs[1]),
    "mixed=100": (i + 100 * signs[0], f + 100 * signs[1]),
    "forget": (i, np.where(signs[0] * signs[1] > 0, -1e4, f + 6)),
    "capped": (15 * np.tanh(10 * i), 15 * np.tanh(10 * f)),
    # Few tokens write so loudly that they rule the memory long after.
    **{f"first={x}": (_loud(i, x, 1), f + 6) for x in (8, 10, 12, 15)},
    **{f"few={x}": (_loud(i, x, 3), f + 6) for x in (8, 15)},
  }
  return kinds[name]


def _loud(i, value: float, count: int):
  """The input gates i, but `value` at the first tokens, 5 apart."""
  i = i.copy()
  i[:, : 5 * count : 5] = value
  return i


RULED = ("first=8", "first=10", "first=12", "first=15", "few=8", "few=15")
GATES = (
  "normal",
  "zero",
  "init",
  "init0",
  *("i=50", "i=-50", "i=100", "i=-100"),
  *("f=50", "f=-50", "f=100", "f=-100"),
  *("both=-100", "mixed=50", "mixed=100", "forget", "capped"),
  *RULED,
)


def segments(time: int) -> np.ndarray:
  """Four rows that go on after documents 1, 3, none and 2.

  One long document; documents that start inside chunks, one of them of a
  single token; a fresh row with padding; a border between state and tokens.
  """
  cut = [int(time * share) for share in (0.3, 0.55, 0.8)]
  rows = np.ones((4, time), np.int32)
  rows[1] = 3
  rows[1, cut[0] :] += 1
  rows[1, cut[1] :] += 1
  rows[1, cut[1] + 1 :] += 1
  rows[2, cut[1] :] = 2
  rows[2, cut[2] :] = 0
  rows[3] = 3
  rows[3, cut[2] :] = 4
  return rows


BEFORE = np.array([1, 3, 0, 2], np.int32)


@functools.cache
def case(gate: str, time: int = 67, dims: tuple[int, int] = DIMS) -> Case:
  """Four rows of `time` tokens and two heads."""
  rng = np.random.default_rng(0)
  B, H, (K, V) = 4, 2, dims

  def normal(*shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype).astype(np.float64)

  narrow = functools.partial(normal, dtype=ml_dtypes.bfloat16)
  warm = (BEFORE > 0).astype(np.float64)
  i, f = (np.float64(np.float32(x)) for x in gates(gate, rng, (B, time, H)))
  tokens = [narrow(B, time, H, d) for d in (K, K, V)]
  state = State(
    warm[:, None, None, None] * normal(B, H, K, V),
    warm[:, None, None] * normal(B, H, K),
    warm[:, None] * normal(B, H),
    BEFORE,
  )
  return Case(
    *tokens,
    i,
    f,
    segments(time),
    state,
    narrow(B, time, H, V),
    (normal(B, H, K, V), normal(B, H, K), normal(B, H)),
    last_m(i, f, segments(time), state),
  )


def last_m(i_BTH, f_BTH, segments_BT, state: State) -> np.ndarray:
  """m after the last token, as float32 can hold it."""
  m, segment = state.m_BH, state.segment_B
  for t, now in enumerate(segments_BT.T):
    past = np.where((now == segment)[:, None], m, 0)
    past = past - np.logaddexp(0, -f_BTH[:, t])
    m = np.where((now > 0)[:, None], np.maximum(past, i_BTH[:, t]), m)
    segment = np.where(now > 0, now, segment)
  return np.float64(np.float32(m))


def run(
  form: Form,
  case: Case,
  dtype: str,
  options: Options = Options(),
) -> dict[str, np.ndarray]:
  """h, the last state and the gradients of everything, all as float64.

  The gradient of the first m is there twice: "dm" sums C dC and n dn, which
  all but cancel, so that it means little where it is rounded; "dm_alone" is
  that while C exp(m) and n exp(m) stay as they are, and means little where it
  is not: it is eps's alone where the last state does not depend on it.
  """
  if options.input_gate == "sigmoid":  # m is no part of its state: it is 0
    no_m = np.zeros_like(case.state.m_BH)
    case = case._replace(
      state=case.state._replace(m_BH=no_m),
      dstate=(*case.dstate[:2], no_m),
      gauge_BH=no_m,
    )
  with jax.enable_x64(dtype == "float64"):
    wide = jnp.promote_types(dtype, jnp.float32)
    narrow = [x.astype(dtype) for x in (*case[:3], case.dh_BTHV)]
    floats = (*narrow[:3], *(x.astype(wide) for x in case[3:5]))
    state = tuple(x.astype(wide) for x in case.state[:3])
    dstate = tuple(x.astype(wide) for x in case.dstate)
    with jax.set_mesh(sequence_mesh(form.devices, dtype)):
      results = program(form, options)(
        floats,
        state,
        np.zeros_like(state[2]),
        case.segments_BT,
        case.state.segment_B,
        narrow[3],
        dstate,
        case.gauge_BH.astype(wide),
      )
    if options.input_gate == "sigmoid":
      del results["dm"], results["dm_alone"]
  return {name: np.asarray(x, np.float64) for name, x in results.items()}


def sequence_mesh(count: int, dtype: str) -> jax.sharding.Mesh:
  """Devices along time; of the host in float64, which TPUs do not have."""
  on_host = dtype == "float64" and jax.default_backend() == "tpu"
  devices = jax.devices("cpu" if on_host else None)
  cfg = sharding.MeshConfig(data=1, sequence=count)
  return sharding.make_mesh(cfg, devices[:count])


@functools.cache
def program(form: Form, options: Options):
  """The compiled program of `run`; shapes and types are up to its cache."""

  def cell(q, k, v, i, f, segments_BT, state, *, axis_name):
    return mlstm(
      q,
      k,
      v,
      i_BTH=i,
      f_BTH=f,
      segments_BT=segments_BT,
      state=state,
      chunk=form.chunk,
      backend=form.backend,
      input_gate=options.input_gate,
      normalize=options.normalize,
      eps=options.eps,
      axis_name=axis_name,
    )

  def loss(
    floats, state, shift, segments_BT, segment_B, dh_BTHV, dstate, gauge_BH
  ):
    first = State(*state, segment_B=segment_B)
    h, last = on_mesh(
      functools.partial(cell, axis_name=time_axis(segments_BT.shape[1])),
      *floats,
      segments_BT,
      rescale(first, first.m_BH + shift),
      axes=(*INPUTS, STATE),
      out_axes=(INPUTS[0], STATE),
    )
    wide = floats[-1].dtype
    past = (*rescale(last, gauge_BH)[:2], last.m_BH)
    parts = [jnp.vdot(h.astype(wide), dh_BTHV.astype(wide))]
    parts += [jnp.vdot(*pair) for pair in zip(past, dstate, strict=True)]
    return sum(parts), (h, *past)

  def results_and_gradients(*args):
    grads, results = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
    names = ("h", "C", "n", "m", "dq", "dk", "dv", "di", "df")
    names += ("dC", "dn", "dm", "dm_alone")
    values = (*results, *grads[0], *grads[1], grads[2])
    return dict(zip(names, values, strict=True))

  return compiled.jit(results_and_gradients)


@functools.cache
def truth(
  gate: str,
  time: int = 67,
  options: Options = Options(),
  dims: tuple[int, int] = DIMS,
) -> dict[str, np.ndarray]:
  """`run` for the definition in float64."""
  return run(_exact(dims), case(gate, time, dims), "float64", options)


@functools.cache
def rounded_definition(
  gate: str, time: int, options: Options, dtype: str, dims: tuple[int, int]
) -> dict[str, np.ndarray]:
  """`run` for the definition in less than float64."""
  return run(TRUTH, case(gate, time, dims), dtype, options)


def _exact(dims: tuple[int, int]) -> Form:
  """What in float64 is the truth for such heads.

  For its gradient the definition keeps C of every token, 100 MB at heads of
  1280. The parallel form, which is held to it in float64, does not.
  """
  return TRUTH if math.prod(dims) < 2**14 else Form("parallel")


@functools.cache
def moved(
  gate: str, time: int, options: Options, dtype: str, dims: tuple[int, int]
) -> tuple[dict[str, np.ndarray], ...]:
  """Truths for inputs each of which is an ulp of its type away.

  Gates and states are float32 wherever tokens are bfloat16.
  """
  rng = np.random.default_rng(2)
  x = case(gate, time, dims)

  def move(x, dtype):
    signs = rng.choice([-1, 1], size=x.shape)
    return x * (1 + signs * float(ml_dtypes.finfo(dtype).eps))

  def other() -> Case:
    narrow = [move(y, dtype) for y in (*x[:3], x.dh_BTHV)]
    wide = [move(y, "float32") for y in (*x[3:5], *x.state[:3], *x.dstate)]
    return x._replace(
      q_BTHK=narrow[0],
      k_BTHK=narrow[1],
      v_BTHV=narrow[2],
      dh_BTHV=narrow[3],
      i_BTH=wide[0],
      f_BTH=wide[1],
      state=State(*wide[2:5], segment_B=BEFORE),
      dstate=tuple(wide[5:]),
    )

  exact = _exact(dims)
  return tuple(run(exact, other(), "float64", options) for _ in range(4))


def check_float64(
  form: Form,
  gate: str,
  time: int = 67,
  options: Options = Options(),
) -> None:
  """In float64 all forms agree to 1e-9; the worst measured is 2e-10."""
  check(float64_shares(form, gate, time, options))


def float64_shares(
  form: Form,
  gate: str,
  time: int,
  options: Options = Options(),
) -> dict[str, float]:
  """The error of every result as a share of what `check_float64` allows."""
  expected = truth(gate, time, options, form.dims)
  results = run(form, case(gate, time, form.dims), "float64", options)
  results.pop("dm_alone", None)
  return {
    name: relative(value, expected[name]) / 1e-9
    for name, value in results.items()
  }


def relative(value: np.ndarray, truth: np.ndarray) -> float:
  """The relative L2 error; no error of what is 0 is none."""
  error = np.linalg.norm(value - truth)
  return float(error / max(np.linalg.norm(truth), np.finfo(np.float64).tiny))


def check_rounded(
  form: Form,
  gate: str,
  time: int = 67,
  options: Options = Options(),
  *,
  dtype: str,
) -> None:
  """Everything is finite and within the bounds of `rounded_shares`."""
  check(rounded_shares(form, gate, time, options, dtype=dtype))


def rounded_shares(
  form: Form,
  gate: str,
  time: int,
  options: Options = Options(),
  *,
  dtype: str,
) -> dict[str, float]:
  """The error of every result as a share of what it may be.

  It may be twice the sum of what the definition loses in the same type and
  of what an ulp in the inputs changes, and 4 ulp of the largest on top; of
  its logarithm where all are small, as gates are summed in exponents. In
  bfloat16 the kernel bound holds as well: native is the chunkwise form at the
  same chunk, or at T for a form without chunks. Of the gradients of gates
  and of the first state a kernel may lose what decision 5 says.

  The definition is no measure of itself: its own loss allows it nothing, so
  that the rest is an absolute bound, which holds at the default `time` (at 301
  the scale of C and n takes more at gates of -100). Its kernel bound allows
  what an ulp of float32 changes, which is the type of its states.
  """
  x = case(gate, time, form.dims)
  expected = truth(gate, time, options, form.dims)
  results = run(form, x, dtype, options)
  results.pop("dm", None)
  definition = expected
  if form != TRUTH:
    definition = rounded_definition(gate, time, options, dtype, form.dims)
  others = moved(gate, time, options, dtype, form.dims)
  # "dm_alone" is "dm" without these.
  C_terms = np.abs(x.state.C_BHKV * expected["dC"])
  n_terms = np.abs(x.state.n_BHK * expected["dn"])
  terms = C_terms.sum((2, 3)) + n_terms.sum(2)
  largest = {"dm_alone": float(np.max(terms))}
  factors, rounded = {}, ()
  if form.backend in REFUSALS:
    slope = np.max(1 / (1 + np.exp(x.f_BTH)))
    dlog_i = expected["di"]
    if options.input_gate == "sigmoid":
      dlog_i = dlog_i * (1 + np.exp(x.i_BTH))
    inside = 4 * np.max(np.sum(np.abs(dlog_i), axis=1))
    states = np.max(np.sqrt(np.sum(C_terms**2, (2, 3)))) * 2**-8.5
    floor = inside + states / (4 * np.finfo(np.float32).eps)
    largest["df"] = float(slope * floor)
    factors = dict.fromkeys(("di", "df", "dC"), 2 * np.sqrt(3))
    rounded = ("di", "dn", "C", "dC")
  shares = {
    name: excess(
      value,
      definition[name],
      expected[name],
      moved=[other[name] for other in others],
      largest=largest.get(name),
      ulps=4 * max(1.0, -np.log(np.max(np.abs(expected[name])) or 1.0)),
    )
    for name, value in results.items()
  }
  native = Form("chunkwise", form.chunk or time)
  if dtype == "bfloat16" and str(form) != str(native):
    natives = run(native, x, dtype, options)
    own = []
    if form == TRUTH:
      own = moved(gate, time, options, "float32", form.dims)
    elif factors:
      own = [
        {name: expected[name].astype(ml_dtypes.bfloat16) for name in rounded}
      ]
    for name, value in results.items():
      kernel = excess(
        value,
        natives[name],
        expected[name],
        moved=[other[name] for other in own if name in other],
        largest=largest.get(name),
        factor=factors.get(name, 2.0),
      )
      shares[name] = max(shares[name], kernel)
  return shares


def check(shares: dict[str, float]) -> None:
  """Every error is within its bound."""
  for name, share in shares.items():
    # NaN is not below 1 either.
    assert share <= 1, (name, share)
