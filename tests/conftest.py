"""Eight simulated devices, and shape annotations that are executed."""

import os
import tempfile

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = (
  f"{flags} --xla_force_host_platform_device_count=8".strip()
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs of tests run once: this halves what it takes to compile them.
QUICKLY_COMPILED = os.environ["JAX_PLATFORMS"] == "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(QUICKLY_COMPILED)
# What was compiled in an earlier module or command is loaded. The folder is of
# this process, the other worker has its own: entries are not written at once.
programs = tempfile.TemporaryDirectory(prefix="test-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# These import jax, which reads the environment above.
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# A machine that is busy with others is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

install_import_hook(
  [
    "xlstm_jax.cells",
    "xlstm_jax.layers",
    "xlstm_jax.mixers",
    "xlstm_jax.models",
  ],
  "beartype.beartype",
)


def pytest_unconfigure():
  programs.cleanup()


@pytest.fixture
def optimized():
  """Programs as users have them, where a bound is that of their rounding."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", QUICKLY_COMPILED)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Every compiled program takes memory maps, of which Linux allows 65,530.

  Beyond that the compiler aborts the process.
  """
  yield
  jax.clear_caches()
