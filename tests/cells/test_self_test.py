"""A wrong kernel is found before it trains."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from xlstm_jax.cells.backends import Backend
from xlstm_jax.cells.mlstm import BACKENDS, parallel, self_test
from xlstm_jax.cells.mlstm.chunkwise import chunkwise
from xlstm_jax.cells.precision import multiplied
from xlstm_jax.errors import UserError

SHAPE = self_test.Shape(B=2, T=96, H=2, K=16, V=32)


def check(*args, **options):
  self_test.prepared(*args, **options)()


@pytest.fixture
def kernel(monkeypatch):
  """Makes the native form with a defect a kernel of the table."""

  def install(defect):
    def form(q, k, v, i, f, documents, state, **options):
      def run(*tokens):
        return chunkwise(*tokens, documents, state, **options)

      return defect(run, q, k, v, i, f)

    name = defect.__name__
    kernel = Backend(name, form, platform="cpu")
    monkeypatch.setitem(BACKENDS.backends, name, kernel)
    return name

  return install


def sound(run, q, k, v, i, f):
  return run(q, k, v, i, f)


def test_a_sound_kernel_passes(kernel):
  check(kernel(sound), SHAPE, dtype="bfloat16")


def test_gates_that_are_computed_twice_have_a_gradient(kernel):
  # At this size XLA draws the gates once more, with other rounding, where the
  # gradient looks for the largest of them.
  shape = self_test.Shape(B=1, T=32, H=2, K=16, V=16)
  check(kernel(sound), shape, dtype="float32")


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["recurrent", "parallel"])
def test_other_forms_pass(backend, dtype):
  check(backend, SHAPE, dtype=dtype)


def wrong_head(run, q, k, v, i, f):
  h, state = run(q, k, v, i, f)
  return h.at[:, :, 1].multiply(1.1), state


def not_a_number(run, q, k, v, i, f):
  h, state = run(q, k, v, i, f)
  return h.at[0, 3, 0, 0].set(jnp.nan), state


def wrong_gradient(run, q, k, v, i, f):
  return run(q, k, v + 0.1 * (v - jax.lax.stop_gradient(v)), i, f)


def no_gradient(run, q, k, v, i, f):
  return run(q, k, v, jax.lax.stop_gradient(i), f)


def rounded_memory(run, q, k, v, i, f):
  """C is read in 8 bits, and n in more."""

  def in_one_part(*args, parts):
    del parts
    return multiplied(*args)

  with mock.patch.object(parallel, "multiplied", in_one_part):
    return run(q, k, v, i, f)


@pytest.mark.parametrize(
  ("defect", "named"),
  [
    (rounded_memory, "dk is off by"),
    (wrong_head, "h is off by"),
    (not_a_number, "h is off by nan"),
    (wrong_gradient, ": dv is off by"),
    (no_gradient, ": di is off by"),
  ],
)
def test_a_defect_is_a_sentence_with_the_figures(kernel, defect, named):
  with pytest.raises(UserError, match=named) as error:
    check(kernel(defect), SHAPE, dtype="bfloat16")
  assert "Train with --config.compute.mlstm_backend=chunkwise" in str(error)


def doubled(run, q, k, v, i, f):
  h, state = run(q, k, v, i, f)
  return 2 * h, state


def test_variants_of_the_cell_are_tested_as_they_run(kernel):
  with pytest.raises(UserError, match="h is off by"):
    check(
      kernel(doubled),
      SHAPE,
      dtype="float32",
      input_gate="sigmoid",
      normalize=False,
    )


def test_a_kernel_that_refuses_the_device_says_so():
  with pytest.raises(UserError, match="pallas_gpu' cannot run"):
    check("pallas_gpu", SHAPE, dtype="bfloat16")
