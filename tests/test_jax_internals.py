"""Each private or experimental name of JAX and Orbax is there and works.

A test that fails here names what a new version of either renamed.
"""

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax import jax_internals
from xlstm_jax.cells.gpu_internals import plgpu

ROOT = Path(__file__).parents[1]
SOURCES = [
  path
  for folder in ("xlstm_jax", "scripts", "experiments")
  for path in sorted((ROOT / folder).rglob("*.py"))
]
# These are documented; others with an underscore are private.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
HIDDEN = ("experimental", "extend", "interpreters", "jaxlib")


def test_the_module_that_starts_backends():
  module = importlib.import_module(jax_internals.STARTS_BACKENDS)
  code = inspect.getsource(module)
  assert "Unable to initialize backend" in code


def test_the_barriers_of_a_save():
  module = importlib.import_module(
    "orbax.checkpoint._src.checkpointers.async_checkpointer"
  )
  code = inspect.getsource(module)
  found = [code.index(f"'{name}'") for name in jax_internals.WRITING_BARRIERS]
  assert found == sorted(found)


SERVICE = """
import socket, jax
from xlstm_jax import jax_internals
assert jax_internals.coordination_client() is None
assert not jax_internals.is_coordinator()
with socket.socket() as free:
  free.bind(("localhost", 0))
  port = free.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
assert jax_internals.is_coordinator()
client = jax_internals.coordination_client()
client.key_value_set("a/b", "1")
client.key_value_set("a/b", "2", allow_overwrite=True)
assert client.key_value_dir_get("a/") == [("a/b", "2")]
client.wait_at_barrier("here", 10_000)
jax.distributed.shutdown()
"""


def test_the_client_of_the_coordination_service():
  subprocess.run([sys.executable, "-c", SERVICE], check=True)


def test_the_processes_of_a_launcher(monkeypatch):
  monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.0.0.1:34")
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
  monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
  monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
  found = jax_internals.detect_processes(timeout_seconds=1)
  assert found[0]
  assert found[0].startswith("10.0.0.1:")
  assert found[1:] == (4, 3)


def test_a_broadcast():
  assert jax_internals.broadcast_from_first(np.int32(3)) == 3


def test_a_mesh():
  one = jax.devices()[:1]
  assert jax_internals.device_mesh((1, 1), one).tolist() == [one]


def test_a_mesh_of_several_nodes():
  one = jax.devices()[:1]
  grid = jax_internals.hybrid_device_mesh(
    (1, 1), (1, 1), one, process_is_granule=True
  )
  assert grid.tolist() == [one]


def test_the_devices_of_a_topology():
  from jax.experimental import topologies

  call = inspect.signature(topologies.get_topology_desc)
  call.bind(platform="tpu", topology_name="v5e:2x2", num_slices=1)
  assert topologies.TopologyDescription(["device"]).devices == ["device"]


def kernel_names() -> dict[str, set[str]]:
  """What the cells use of the modules that their `*_internals.py` name."""
  found: dict[str, set[str]] = {}
  for path in sorted((ROOT / "xlstm_jax" / "cells").rglob("*.py")):
    tree = ast.parse(path.read_text())
    modules = {
      alias.asname or alias.name: f"{node.module}:{alias.name}"
      for node in ast.walk(tree)
      if isinstance(node, ast.ImportFrom)
      and str(node.module).endswith("_internals")
      for alias in node.names
    }
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute):
        root, _, names = ast.unparse(node).partition(".")
        if root in modules and names.replace(".", "_").isidentifier():
          found.setdefault(modules[root], set()).add(names)
  return found


@pytest.mark.parametrize(
  ("module", "name"),
  [
    (module, name)
    for module, names in kernel_names().items()
    for name in sorted(names)
  ],
)
def test_a_name_that_kernels_use(module: str, name: str):
  file, _, member = module.partition(":")
  start = getattr(importlib.import_module(file), member)
  functools.reduce(getattr, name.split("."), start)


def test_a_kernel_is_lowered():
  def twice(x_gmem, y_gmem, x_smem, barrier):
    plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
    plgpu.barrier_wait(barrier)
    x_smem[...] = x_smem[...] * 2
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, y_gmem)
    plgpu.wait_smem_to_gmem(0)

  kernel = plgpu.kernel(
    twice,
    out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
    scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
  )
  traced = jax.jit(kernel).trace(jnp.zeros(128))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text


def hidden_names(source: str) -> Iterator[str]:
  """Private and experimental names of other packages in a module."""
  tree = ast.parse(source)
  foreign = set()
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
      root, *parts = name.split(".")
      if root in ("xlstm_jax", "__future__"):
        continue
      foreign |= {(a.asname or a.name).split(".")[0] for a in node.names}
      private = any(part.startswith("_") for part in parts)
      if private or (root.startswith("jax") and {root, *parts} & {*HIDDEN}):
        yield name
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      root, *parts = ast.unparse(node).split(".")
      private = node.attr.startswith("_") and not node.attr.startswith("__")
      hidden = private or (root == "jax" and {*parts} & {*HIDDEN})
      if root in foreign and hidden and node.attr not in DOCUMENTED:
        yield ast.unparse(node)
    elif isinstance(node, ast.Constant) and "._src." in str(node.value):
      yield str(node.value)


@pytest.mark.parametrize(
  ("source", "name"),
  [
    ("from jax._src import distributed", "jax._src.distributed"),
    ("import jax._src.clusters", "jax._src.clusters"),
    ("def f():\n  from jax.extend import core", "jax.extend.core"),
    ("from jaxlib.mlir import ir", "jaxlib.mlir.ir"),
    ("import jax\njax.experimental.io_callback", "jax.experimental"),
    ("import orbax.checkpoint as ocp\nocp._src", "ocp._src"),
    ("NAME = 'jax._src.xla_bridge'", "jax._src.xla_bridge"),
  ],
)
def test_a_hidden_name_is_seen(source, name):
  assert name in hidden_names(source)


def test_hidden_names_stand_in_their_files_alone():
  found = {
    str(path.relative_to(ROOT)): names
    for path in SOURCES
    if not path.stem.endswith("_internals")
    and (names := [*hidden_names(path.read_text())])
  }
  assert not found
