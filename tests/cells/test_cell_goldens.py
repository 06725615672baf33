"""The cells against the public implementations' numbers, gradients included."""

import functools

import cell_goldens
import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.cells import mlstm, slstm
from xlstm_jax.cells.mlstm import parallel

FORMS = {
  "recurrent": ("recurrent", None),
  "parallel": ("parallel", None),
  "chunkwise": ("chunkwise", 7),
}


@functools.cache
def mlstm_program(form: str, eps: float):
  """Results and gradients; tensors are [B, H, T, ...] as in the goldens."""
  backend, chunk = FORMS[form]

  def loss(x, cotangents):
    segment_B = jnp.zeros(len(x["m_initial"]), jnp.int32)
    q, k, v, i, f = (x[name].swapaxes(1, 2) for name in "qkvif")
    state = mlstm.State(
      x["c_initial"], x["n_initial"], x["m_initial"][..., 0], segment_B
    )
    h, last = mlstm.mlstm(
      q,
      k,
      v,
      i_BTH=i,
      f_BTH=f,
      state=state,
      eps=eps,
      backend=backend,
      chunk=chunk,
    )
    out = {"h": h.swapaxes(1, 2), "c": last.C_BHKV, "n": last.n_BHK}
    loss = sum(jnp.vdot(out[name], cotangents[name]) for name in out)
    return loss, out | {"m": last.m_BH[..., None]}

  return compiled.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("path", cell_goldens.cases("cells_mlstm"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mlstm(dtype, form, path):
  golden = cell_goldens.load(path)
  x = cell_goldens.inputs(golden)
  batch, heads, _, key_dim = x["k"].shape
  given = "c_initial" in x
  empty = {
    "c_initial": np.zeros((batch, heads, key_dim, x["v"].shape[-1])),
    "n_initial": np.zeros((batch, heads, key_dim)),
    "m_initial": np.zeros((batch, heads, 1)),
  }
  cotangents = {
    "h": x.pop("grad_h"),
    "c": x.pop("grad_c_last"),
    "n": x.pop("grad_n_last"),
  }
  no_state = cotangents | {"c": 0 * cotangents["c"], "n": 0 * cotangents["n"]}

  def run(cotangents, eps=1e-6):
    with jax.enable_x64(dtype == "float64"):
      args = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (empty | x, cotangents)
      )
      grads, out = mlstm_program(form, eps)(*args)
    grads = {name: grads[name] for name in (x if given else "qkvif")}
    return jax.tree.map(np.float64, (out, grads))

  # The gradient of m sums C dC and n dn, which all but cancel.
  cancel = sum(
    np.sum(np.abs(x[name] * golden[f"fp64/grad_hstate/{name}"]))
    for name in ("c_initial", "n_initial")
    if given
  )
  slack = {"m_initial": 8 * np.finfo(dtype).eps * cancel}
  # That of f is from a chunkwise form, this far from the recurrent one.
  forget = golden["fp64/grad_h/f"] - golden["fp64/grad_h_rec/f"]
  chunked = slack | {"f": 2 * np.linalg.norm(forget)}
  check = functools.partial(cell_goldens.check, tensors=golden, dtype=dtype)
  out, grads = run(no_state)
  check(out, group="rec", error="rec")
  kept = {g: grads[g] for g in grads if f"fp64/grad_h_rec/{g}" in golden}
  assert {"i", "f"} <= set(kept)
  check(kept, group="grad_h_rec", error="grad_h", slack=slack)
  grads = run(cotangents)[1]
  check(grads, group="grad_hstate", error="grad_hstate", slack=chunked)
  if dtype == "float64":
    grads = run(no_state, eps=0.0)[1]
    kept = {g: grads[g] for g in grads if f"fp64/grad_h_eps0/{g}" in golden}
    assert {"i", "f"} <= set(kept)
    check(kept, group="grad_h_eps0", error="", slack=chunked)


def test_a_mutation_is_caught(monkeypatch):
  """The normaliser counts as a constant, as in other kernels."""

  def readout(C, n, m, *, readout=parallel.readout, **options):
    return readout(C, jax.lax.stop_gradient(n), m, **options)

  monkeypatch.setattr(parallel, "readout", readout)
  mlstm_program.cache_clear()
  path = cell_goldens.REDUCED / "cells_mlstm" / "normal.safetensors"
  try:
    with pytest.raises(AssertionError, match="grad_h_rec"):
      test_mlstm("float64", "chunkwise", path)
  finally:
    mlstm_program.cache_clear()


@functools.cache
def sigmoid_program(form: str, normalize: bool):
  backend, chunk = FORMS[form]

  def run(x):
    q, k, v, i, f = (x[name].swapaxes(1, 2) for name in "qkvif")
    h, _ = mlstm.mlstm(
      q,
      k,
      v,
      i_BTH=i,
      f_BTH=f,
      input_gate="sigmoid",
      normalize=normalize,
      backend=backend,
      chunk=chunk,
    )
    return h.swapaxes(1, 2)

  return compiled.jit(run)


@pytest.mark.parametrize(
  "path", cell_goldens.cases("cells_mlstm", without="__")
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mlstm_sigmoid(dtype, form, path):
  golden = cell_goldens.load(path)
  x = cell_goldens.inputs(golden)
  for group in ("siging_norm0", "siging_norm1"):
    with jax.enable_x64(dtype == "float64"):
      args = {name: jnp.asarray(x[name], dtype) for name in "qkvif"}
      h = np.float64(sigmoid_program(form, group.endswith("1"))(args))
    h = h[:, :, : golden[f"fp64/{group}/h"].shape[2]]
    cell_goldens.check({"h": h}, golden, group, dtype=dtype, error=group)


@compiled.jit
def slstm_program(x, state, grad_y):
  def loss(x, state):
    batch, _, _, heads, head_dim = x["x"].shape
    units = state.reshape(4, batch, heads, head_dim)
    segment_B = jnp.zeros(batch, jnp.int32)
    y, last = slstm.slstm(
      x["x"], x["R"], x["b"], state=slstm.State(*units, segment_B=segment_B)
    )
    last = jnp.stack(last[:4]).reshape(state.shape)
    return jnp.vdot(y, grad_y), {"y": y, "last_state": last}

  return jax.grad(loss, (0, 1), has_aux=True)(x, state)


@pytest.mark.parametrize("path", cell_goldens.cases("cells_slstm"))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_slstm(dtype, path):
  golden = cell_goldens.load(path)
  x = cell_goldens.inputs(golden)
  batch, _, _, heads, head_dim = x["x"].shape
  empty = np.zeros((4, batch, heads * head_dim))
  with jax.enable_x64(dtype == "float64"):
    args = (x, x.get("state", empty), x["grad_y"])
    args = jax.tree.map(lambda x: jnp.asarray(x, dtype), args)
    (grads, dstate), out = slstm_program(
      {name: args[0][name] for name in ("x", "R", "b")}, *args[1:]
    )
  if "state" in x:
    grads["state"] = dstate
  results = {"": out, "grad": grads}
  for group, values in results.items():
    values = jax.tree.map(np.float64, values)
    cell_goldens.check(values, golden, group, dtype=dtype, error=group)
