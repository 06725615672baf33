"""What a step takes of a device is said before it runs, or refused."""

import types

import jax
import jax.numpy as jnp
import pytest

from xlstm_jax.errors import UserError
from xlstm_jax.train import memory

MIB = 2**20


def program(function, *, donate=False):
  array = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  jitted = jax.jit(function, donate_argnums=0 if donate else ())
  return jitted.lower(array).compile()


@pytest.fixture
def compiled():
  """Takes 8 MiB: of its argument and its result."""
  return program(lambda x: x + 1)


@pytest.fixture
def limited(monkeypatch):
  """Gives the devices of this process these limits."""

  def limit(*sizes):
    devices = [
      types.SimpleNamespace(
        memory_stats=lambda size=size: size and {"bytes_limit": size}
      )
      for size in sizes
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)

  return limit


def test_a_program_takes_its_arguments_results_and_temporaries(compiled):
  assert 8 * MIB <= memory.taken(compiled) < 8.1 * MIB
  # A result in the place of the argument.
  donated = program(lambda x: x + 1, donate=True)
  assert 4 * MIB <= memory.taken(donated) < 4.1 * MIB
  product = program(lambda x: jnp.sin(x @ x)[0, 0])
  assert 8 * MIB <= memory.taken(product) < 13 * MIB


def test_a_step_that_fits_is_told(compiled, limited, capsys):
  limited(2**30, 2**29)
  memory.check(compiled)
  assert capsys.readouterr().out == (
    "memory    a step takes 0.01 GiB of a device's 0.50 GiB\n"
  )


def test_a_step_that_does_not_fit_is_refused(compiled, limited):
  limited(2**30, 2**22)
  with pytest.raises(UserError) as error:
    memory.check(compiled)
  message = str(error.value)
  assert message.startswith("The step does not fit: a step takes 0.01 GiB of")
  for setting in ("batch_size", "accumulation", "compute.remat", "mesh.fsdp"):
    assert f"config.{setting}" in message
  assert "xlstm_jax.plan" in message
  assert "--search" in message


def test_of_devices_without_a_limit_nothing_is_said(compiled, limited, capsys):
  limited(None)
  memory.check(compiled)
  assert not capsys.readouterr().out
