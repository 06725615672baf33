"""What the comparison of compiled programs reads, and the rule of "auto"."""

import json
import pathlib
import runpy

import pytest

from xlstm_jax.cells import tpu_costs
from xlstm_jax.cells.mlstm.tpu import backend
from xlstm_jax.errors import UserError

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench_tpu_aot.py"
SCRIPT_NAMES = runpy.run_path(str(SCRIPT))


PROGRAM = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (t: (s32[])) -> (s32[]) {
  %a = f32[8]{0} fusion(%t), backend_config={"estimated_cycles":"7"}
}

%under3 (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (t: (s32[])) -> (s32[]) {
  %b = f32[8]{0} fusion(%t), backend_config={"estimated_cycles":"100"}
  %w = (s32[]) while(%t), condition=%under3, body=%inner
}

%under5 (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"1000"}
  %r = f32[] reduce(%c), to_apply=%add, backend_config={"estimated_cycles":"4"}
  %w = (s32[]) while(%t), condition=%under5, body=%outer
}
"""


def test_cycles_of_loops_count_as_often_as_they_run():
  assert SCRIPT_NAMES["cycles"](PROGRAM) == 1004 + 5 * (100 + 3 * 7)


def test_a_loop_of_unknown_length_is_an_error():
  with pytest.raises(ValueError, match="How often"):
    SCRIPT_NAMES["cycles"](PROGRAM.replace("constant(5)", "parameter(5)"))


# Two bundles, then a loop of one bundle, a start of two, branches of four and
# of one, and a last bundle.
BUNDLES = """
= control target key start
     0   :  { %s0 = inlined }
   0x1   :  { %s1 = inlined }
   0x2 LB: > { %s2 = sld }
   0x3   : > { %9 = sbr.rel (%p6) target = $region1 }
   0x4   : > { %v1 = vld }
   0x5   : > { %v2 = vld }
   0x6 PF: > { %8 = sbr.rel (%p5) target = $region2 }
   0x7   : > { %v3 = vld }
   0x8   : > { %v4 = vld }
   0x9   : > { %v5 = vld }
   0xa   : > { %v6 = vld }
   0xb PF: > { %7 = sbr.rel (%p4) target = $region3 }
   0xc   : > { %v7 = vld }
   0xd PF: > { %s4 = sld }
"""


def test_bundles_are_counted_without_the_rare_branch():
  whole = SCRIPT_NAMES["schedule"](BUNDLES, branches=1)
  assert whole == SCRIPT_NAMES["Schedule"]((2, 12), 0)
  usual = SCRIPT_NAMES["schedule"](BUNDLES, branches=2)
  # The start of two is the shorter of the two longest.
  assert usual == SCRIPT_NAMES["Schedule"]((2, 8), 2)


FOUND = tpu_costs.Compiled(
  bundles=800_000,
  cycles=200_000,
  bytes=2 * 10**9,
  native_cycles=4_000_000,
  native_bytes=3 * 10**9,
)


@pytest.mark.parametrize(
  ("change", "kernel"),
  [
    ({}, True),
    ({"native_cycles": 3_000_000}, False),
    ({"native_cycles": 500_000, "native_bytes": 4 * 10**9}, True),
    ({"native_cycles": 499_999, "native_bytes": 4 * 10**9}, False),
  ],
)
def test_auto_takes_the_kernel_where_the_compiler_says_so(change, kernel):
  found = FOUND._replace(**change)
  reason = tpu_costs.why_native(found)
  assert (reason is None) == kernel
  if reason is not None:
    cycles = found.native_cycles / 1e6
    assert "compiled, it has 1 million bundles and cycles and 2 GB" in reason
    assert f"{cycles:.3g} million cycles" in reason


def test_heads_that_were_not_compiled_run_in_their_native_form():
  reason = tpu_costs.why_not(backend.COSTS, "TPU v5 lite", "40 x 72")
  assert reason == (
    "its cost for heads of 40 x 72 on a TPU v5 lite is not in the table of "
    "compiled programs"
  )


def test_the_table_has_what_the_rule_reads():
  for kind, rows in json.loads(backend.COSTS.read_text()).items():
    assert kind in backend.VMEM
    for heads in rows:
      reason = tpu_costs.why_not(backend.COSTS, kind, heads)
      assert reason is None or reason.startswith("compiled, ")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--cell=mlstm", "--shape=1,2"], "--shape=1,2 must be 5 positive numbers"),
    (["--jobs=0"], "--jobs=0 must be at least 1"),
  ],
)
def test_wrong_arguments_are_refused(args, message):
  with pytest.raises(UserError, match=message):
    SCRIPT_NAMES["main"](args)
