"""In which precision products are made on devices that would round them."""

import re

import jax
import jax.numpy as jnp
import pytest

from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.objective import cross_entropy

MODELS = {
  "paper": ModelConfig(
    vocab_size=32,
    width=16,
    num_blocks=2,
    slstm_at=(1,),
    mlstm=MLSTMConfig(num_heads=2, round_to=8),
    slstm=SLSTMConfig(num_heads=2),
  ),
  "large": ModelConfig(
    vocab_size=32,
    width=16,
    num_blocks=1,
    mlstm_block="large",
    mlstm_large=MLSTMLargeConfig(num_heads=2),
  ),
}


def products(model: str, dtype: str, platform: str) -> list[tuple[set, set]]:
  """Operand types and precisions of every product of a step's gradient."""
  definition = Definition(MODELS[model], Compute(dtype=dtype))

  def loss(params, tokens_BT):
    lm = definition.bind(params)
    x_BTD, _ = lm(tokens_BT)
    return cross_entropy(
      lm.vocabulary_weight(),
      x_BTD,
      tokens_BT,
      jnp.ones(tokens_BT.shape),
      chunk=8,
      cap=lm.cfg.logit_cap,
    )[0]

  text = (
    jax.jit(jax.grad(loss))
    .trace(definition.abstract(), jax.ShapeDtypeStruct((2, 24), jnp.int32))
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  found = []
  for line in text.splitlines():
    if "stablehlo.dot_general" in line:
      operands = re.search(r": \(tensor<(.*?)>, tensor<(.*?)>\)", line)
      precision = re.search(r"precision = \[(\w+), (\w+)\]", line)
      assert operands, line
      types = {shape.split("x")[-1] for shape in operands.groups()}
      found.append((types, set(precision.groups()) if precision else set()))
  return found


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_products_of_wide_operands_are_not_rounded(model, dtype, platform):
  found = products(model, dtype, platform)
  narrow = [types for types, _ in found if "bf16" in types]
  assert bool(narrow) == (dtype == "bfloat16")
  for types, precision in found:
    if types != {"bf16"}:
      assert precision == {"HIGHEST"}, types
