"""The TPU kernels: their logic, what they refuse, and that they compile.

CI has no TPU. What runs here is the kernels in TPU interpret mode, which looks
for races and fills memory that was not written with NaN, and the real compiler,
libtpu, which needs no TPU.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import mlstm_contract as contract
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xlstm_jax import sharding
from xlstm_jax.cells.mlstm import backends
from xlstm_jax.cells.mlstm.tpu import backend, kernels
from xlstm_jax.errors import UserError
from xlstm_jax.plan.collectives import collectives

INTERPRET = pltpu.InterpretParams(detect_races=True, random_seed=0)


@pytest.fixture
def install(monkeypatch):
  """Makes the kernels a backend of this name that runs here, interpreted."""

  def install(name: str = "pallas_tpu"):
    rows = backends.BACKENDS.backends
    row = dataclasses.replace(
      rows["pallas_tpu"],
      name=name,
      run=functools.partial(backend.pallas_tpu, interpret=INTERPRET),
      why_not=lambda device, shapes: None,
    )
    monkeypatch.setitem(rows, name, row)
    monkeypatch.setitem(contract.REFUSALS, name, lambda: None)

  yield install
  pltpu.reset_tpu_interpret_mode_state()


def form(chunk: int, dims: tuple[int, int], backend: str = "pallas_tpu"):
  return contract.Form(backend, chunk, dtypes=("bfloat16",), dims=dims)


# Chunks of 32 tokens are none of the backend's, but the kernels know no
# difference: of 67 tokens three chunks are left, with documents that begin and
# end in each. Heads of 8 x 12 are padded, as are the last 29 tokens.
QUICK = ("normal", "i=-100", "first=12")


def test_interpreted_kernels_hold_the_contract(install):
  install()
  for gate in QUICK:
    contract.check_rounded(form(32, contract.DIMS), gate, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("chunk", "time", "dims", "options", "gates"),
  [
    (32, 67, contract.DIMS, "", contract.GATES),
    (32, 67, contract.DIMS, "sigmoid", ("normal", "capped", "forget")),
    (32, 67, contract.DIMS, "sigmoid plain", ("normal", "mixed=50")),
    (32, 67, contract.DIMS, "plain", ("normal", "init", "capped")),
    (32, 67, contract.DIMS, "eps0", ("normal", "first=15")),
    (32, 1, contract.DIMS, "", ("normal",)),
    (128, 200, (64, 128), "", ("normal", "i=-100", "first=8", "few=15")),
    (256, 301, (96, 192), "", ("normal",)),
  ],
)
def test_all_of_the_contract(chunk, time, dims, options, gates, install):
  install()
  options = contract.Options(
    input_gate="sigmoid" if "sigmoid" in options else "exp",
    normalize="plain" not in options,
    eps=0.0 if "eps0" in options else 1e-6,
  )
  for gate in gates:
    contract.check_rounded(
      form(chunk, dims), gate, time, options, dtype="bfloat16"
    )


def leak(monkeypatch):
  """Tokens of a chunk see documents before their own."""

  def weights(gates, reader, rest, first, weights=kernels._weights):
    return weights(gates, reader, rest, jnp.zeros_like(first))

  monkeypatch.setattr(kernels, "_weights", weights)


def constant_normaliser(monkeypatch):
  """The normaliser counts as a constant, as in other kernels."""

  def slopes(*args, slopes=kernels._slopes):
    sign, share = slopes(*args)
    return jnp.zeros_like(sign), share

  monkeypatch.setattr(kernels, "_slopes", slopes)


def one_part(monkeypatch):
  """C is rounded to 8 bits where few tokens rule it, too, and n is not."""

  def parts(*args, parts=backend.parts_of_states):
    return jnp.ones_like(parts(*args))

  monkeypatch.setattr(backend, "parts_of_states", parts)


def chunks_in_any_order(monkeypatch):
  """The compiler may run the chunks of a row side by side."""
  monkeypatch.setattr(kernels, "_SEQUENTIAL", ("parallel",) * 3)


@pytest.mark.parametrize(
  ("fault", "gate"),
  [
    pytest.param(leak, "normal", marks=pytest.mark.slow),
    pytest.param(constant_normaliser, "normal", marks=pytest.mark.slow),
    (one_part, "first=12"),
    pytest.param(chunks_in_any_order, "normal", marks=pytest.mark.slow),
  ],
)
def test_faults_of_the_kernels_are_found(fault, gate, install, monkeypatch):
  fault(monkeypatch)
  install(fault.__name__)
  with pytest.raises(AssertionError):
    contract.check_rounded(
      form(32, contract.DIMS, fault.__name__), gate, dtype="bfloat16"
    )


def each_row(both):
  """As `both`, one row after the other."""

  def mapped(*arrays):
    rows = jax.vmap(both)(*(x[:, None] for x in arrays))
    return [x[:, 0] for x in rows]

  return mapped


def on_a_mesh(both, *, check_vma=True):
  """As `both`, two rows on each of two devices."""
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
  )
  rows = PartitionSpec("data")
  return jax.shard_map(
    both, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "transformed",
  [each_row, on_a_mesh, functools.partial(on_a_mesh, check_vma=False)],
  ids=["vmap", "shard_map", "shard_map-unchecked"],
)
def test_transformations_change_nothing(transformed, install):
  install()
  x = contract.case("first=12")
  arrays = [jnp.asarray(y, jnp.bfloat16) for y in (*x[:3], x.dh_BTHV)]
  arrays += [jnp.asarray(y, jnp.float32) for y in (x.i_BTH, x.f_BTH)]

  def both(q, k, v, dh, i, f):
    def cell(q, k, v, i, f):
      gates = {"i_BTH": i, "f_BTH": f}
      return backends.mlstm(q, k, v, **gates, chunk=32, backend="pallas_tpu")[0]

    h, back = jax.vjp(cell, q, k, v, i, f)
    return [h, *back(dh)]

  for got, expected in zip(
    jax.jit(transformed(both))(*arrays), jax.jit(both)(*arrays), strict=True
  ):
    got, expected = np.float64(got), np.float64(expected)
    error = np.linalg.norm(got - expected)
    # A few results may be rounded the other way.
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert error <= eps * np.linalg.norm(expected)


def device(kind: str, platform: str = "tpu"):
  return types.SimpleNamespace(platform=platform, device_kind=kind)


HEADS = [
  *((64, 128), (96, 192), (128, 256), (256, 512), (384, 384), (512, 512)),
  *((768, 768), (1024, 1024), (1280, 1280)),
]
KINDS = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


@pytest.mark.parametrize("kind", KINDS)
def test_every_named_head_is_taken(kind):
  for K, V in HEADS:
    shapes = backends.Shapes(B=1, T=512, H=2, K=K, V=V, dtype="bfloat16")
    row = backends.BACKENDS.backends["pallas_tpu"]
    assert row.why_not(device(kind), shapes) is None
    assert backend.best_chunk(kind, K, V) in backend.CHUNKS


@pytest.mark.parametrize(
  ("where", "change", "message"),
  [
    (device("cpu", "cpu"), {}, "needs a TPU v5e, v5p, v6e or 7x, .* is cpu"),
    (device("TPU v4"), {}, "needs a TPU v5e, v5p, v6e or 7x, .* is TPU v4"),
    (device("TPU7x"), {"dtype": "float32"}, "the tokens are float32"),
    (device("TPU7x"), {"chunk": 64}, "chunk is 64, and it takes chunks of 128"),
    (
      device("TPU7x"),
      {"K": 1536, "V": 1536},
      "1536 keys and 1536 values in chunks of 128 tokens need 77 MiB of VMEM, "
      "and kernels may use 58 MiB of a TPU7x",
    ),
  ],
)
def test_what_is_refused_and_why(where, change, message):
  shapes = backends.Shapes(B=1, T=512, H=2, K=64, V=128, dtype="bfloat16")
  row = backends.BACKENDS.backends["pallas_tpu"]
  assert re.search(message, row.why_not(where, shapes._replace(**change)))


def test_a_machine_without_a_tpu_is_refused_with_the_reason():
  x = jnp.ones((1, 4, 1, 64), jnp.bfloat16)
  gates = {"i_BTH": x[..., 0], "f_BTH": x[..., 0]}
  with pytest.raises(UserError, match=r"needs a TPU v5e.* the device is cpu"):
    backends.mlstm(x, x, x, **gates, backend="pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("slice_", "dims"),
  [
    ("v5e:2x2", (64, 128)),
    ("v5e:2x2", (256, 512)),
    ("v5p:2x2x1", (96, 192)),
    ("v5p:2x2x1", (512, 512)),
    ("v6e:2x2", (128, 256)),
    ("v6e:2x2", (384, 384)),
    ("tpu7x:2x2x1", (256, 512)),
    # As large as heads become, where VMEM is smallest.
    ("tpu7x:2x2x1", (1280, 1280)),
  ],
)
def test_kernels_compile_for_tpus_without_one(slice_, dims, monkeypatch):
  """On a mesh, where each device computes its rows and heads from its own.

  scripts/bench_tpu_aot.py compiles all heads for all of these chips.
  """
  pytest.importorskip("libtpu")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=slice_
  ).devices
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=len(devices) // 2, tensor=2), devices
  )
  heads = ("batch", "time", "heads", None)
  axes = (heads, heads, heads, heads[:3], heads[:3])

  def cell(q, k, v, i, f):
    gates = {"i_BTH": i, "f_BTH": f}
    return backends.mlstm(q, k, v, **gates, backend="pallas_tpu")[0]

  def both(dh, *operands):
    def forward(*operands):
      return sharding.on_mesh(cell, *operands, axes=axes, out_axes=heads)

    h, backward = jax.vjp(forward, *operands)
    return h, backward(dh)

  def array(*dims, dtype=jnp.bfloat16):
    spec = PartitionSpec("data", None, "tensor", *[None] * len(dims))
    return jax.ShapeDtypeStruct(
      (len(devices), 512, 4, *dims), dtype, sharding=NamedSharding(mesh, spec)
    )

  K, V = dims
  gate = array(dtype=jnp.float32)
  with jax.set_mesh(mesh):
    program = jax.jit(both).lower(
      *(array(V), array(K), array(K), array(V), gate, gate)
    )
    text = program.compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
  assert not collectives(text)
