"""What is counted in the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xlstm_jax.plan.collectives import Traffic, collectives, traffic

# A loop of 3 with one all-reduce of 8 float32 behind it, one inside, and a
# gather that is started and awaited.
LOOP = """
HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %p = (s32[], f32[4,2]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,2]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %start = (f32[4,2]{1,0}, f32[16,2]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[16,2]{1,0} all-gather-done(%start)
  ROOT %t = (s32[], f32[4,2]) tuple(%n, %y)
}

%condition (p: (s32[], f32[4,2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %p = (s32[], f32[4,2]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

ENTRY %main (x: f32[4,2]) -> bf16[1,2] {
  %x = f32[4,2] parameter(0)
  %loop = (s32[], f32[4,2]{1,0}) while(%t), condition=%condition, body=%body
  %y = f32[4,2] get-tuple-element(%loop), index=1
  %all = f32[4,2] all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %small = bf16[4,2] convert(%all)
  ROOT %part = bf16[1,2] reduce-scatter(%small), dimensions={0}, to_apply=%add
}
"""
OF_LOOP = {
  "all-gather": Traffic(3, 3 * 16 * 2 * 4),
  "all-reduce": Traffic(1, 4 * 2 * 4),
  "reduce-scatter": Traffic(1, 4 * 2 * 2),
}


def test_a_loop_counts_as_often_as_it_runs():
  assert traffic(collectives(LOOP)) == OF_LOOP


def test_a_length_that_is_told_comes_before_the_condition():
  told = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
  found = collectives(LOOP.replace("body=%body", told))
  assert traffic(found)["all-gather"] == Traffic(5, 5 * 16 * 2 * 4)


def test_a_reduce_scatter_of_a_tpu_is_one():
  program = """
%all-reduce-scatter.1 (x: f32[16,2]) -> f32[4,2] {
  %x = f32[16,2] parameter(0)
  %sum = f32[16,2] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = f32[4,2] dynamic-slice(%sum, %at), dynamic_slice_sizes={4,2}
}

ENTRY %main (x: f32[16,2]) -> f32[4,2] {
  %x = f32[16,2] parameter(0)
  ROOT %f = f32[4,2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
  assert traffic(collectives(program)) == {
    "reduce-scatter": Traffic(1, 16 * 2 * 4)
  }


def test_a_program_without_communication():
  program = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
  assert collectives(program.as_text()) == []


@pytest.mark.parametrize("repeats", [1, 6])
def test_a_real_program(repeats):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("x"))

  def sums(x_BD):
    def body(total, _):
      return total + jnp.sin(x_BD + total).sum(0), None

    start = jnp.zeros(x_BD.shape[1])
    return jax.lax.scan(body, start, length=repeats)[0]

  x = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=split)
  program = jax.jit(sums).lower(x).compile()
  found = traffic(collectives(program.as_text()))
  assert found == {"all-reduce": Traffic(repeats, repeats * 128 * 4)}
