"""Schedules of kernels for TPUs: the reader on texts written by hand, and figures of kernels compiled with libtpu."""

import sys

import jax
import jax.numpy as jnp
import pytest
from machine import needs_libtpu
from memzoo.pallas_kernels import tpu_bench, tpu_schedule
from memzoo.pallas_kernels.selective_scan import selective_scan
from memzoo.pallas_kernels.workloads import Shape, make_inputs

BUNDLES = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.vmem [shape: f32[8]] }
   0x1 LB: > { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x2   : > { %v2 = vadd.f32 %v1, %v1  ;;  %v3 = vld [vmem:[%s1] sm:$0xff] }
   0x3 LB: >> { %v4 = vmul.f32 %v2, %v2 }
   0x4 PF: > { %5 = vst [vmem:[%s1] sm:$0xff] /*vst_source=*/%v2 }
   0x5   :  { %6 = vsyncpa [#allocation3], 1 }
"""
NESTED = """
     0   :  { %s1 = inlined_call_operand.vmem [shape: f32[8]] }
   0x1 LB: > { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x2 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x3 LB: >>> { %v4 = vmul.f32 %v2, %v2 }
   0x4   :  { %7 = vsyncpa [#allocation3], 1 }
   0x4 PF: >> { %v5 = vmul.f32 %v2, %v2 }
   0x5 LB: >> { %v6 = vmul.f32 %v2, %v2 }
"""
SLOTS = """== CAPACTIY:
MATMUL, VALU, VLOAD, VSTORE
    4     4     3     1
== UTILIZATION:
0 0 0 0
0 0 1 0
0 1 1 0
0 1 0 0
0 0 0 1
0 0 0 0
"""
ALLOCATIONS = """
  #allocation2 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 'internal scratch']
  #allocation3 [shape = 'u8[16]{0}', space=vmem, size = 0x10, scoped]  %v = vld [vmem:[#allocation3 + $0x8]]
  #allocation3 [shape = 'u8[16]{0}', space=vmem, size = 0x10, scoped]
  #allocation4 [shape = 's32[1]{0}', space=sflag, size = 0x4, scoped]
"""
# Bundles per token and head on a v5e that were committed, of documents that are packed; a kernel may take a twentieth more.
COMMITTED = {"delta_rule_forward": 5.08, "delta_rule_backward": 12.87}


def test_the_bundles_of_a_step_are_those_in_the_loop_over_the_grid_and_in_inner_loops_as_often_as_these_run():
  schedule = tpu_schedule.parse("kernel", BUNDLES, SLOTS, ALLOCATIONS, trips=[2])
  assert schedule[:4] == ("kernel", 5, 2, 0x9010)
  assert schedule.slots == {"MATMUL": 0, "VALU": 3 / 20, "VLOAD": 2 / 15, "VSTORE": 1 / 5}


def test_the_grid_of_a_kernel_and_its_longest_loop_are_read_from_the_program():
  args = make_inputs("selective_scan", Shape(2, 256, 5), dtype=jnp.bfloat16)
  program = jax.make_jaxpr(selective_scan)(*args)
  assert dict(tpu_schedule.grids(program.jaxpr)) == {"selective_scan_forward": (2 * 5 * 2, (8,))}


def test_loops_may_have_numbers_of_their_own():
  schedule = tpu_schedule.parse("kernel", NESTED, "\n".join([*SLOTS.splitlines()[:4], *["0 1 0 0"] * 7]), "", trips=[3, 2.5, 4])
  assert schedule[:3] == ("kernel", 1 + 3 + 3 * 2.5 + 3 + 4, 2)
  with pytest.raises(ValueError, match="kernel has 3 loops in a step; expected 2"):
    tpu_schedule.parse("kernel", NESTED, "\n".join([*SLOTS.splitlines()[:4], *["0 1 0 0"] * 7]), "", trips=[3, 2])


def test_slots_of_another_schedule_are_refused():
  with pytest.raises(ValueError, match="has 6 bundles, but slots of 5"):
    tpu_schedule.parse("kernel", BUNDLES, SLOTS.rsplit("0 0 0 0", 1)[0], "")


@needs_libtpu
def test_a_failure_in_the_other_process_is_its_last_line():
  with pytest.raises(RuntimeError, match=r"^ZeroDivisionError: division by zero$"):
    tpu_schedule.run([sys.executable, "-c", "1 / 0"])


@needs_libtpu
@pytest.mark.slow
def test_kernels_take_no_more_bundles_than_were_committed():
  """If one has to be slower, change the committed figure and the table in `pallas_kernels/README.md`."""
  case = ["gated_delta_rule_packed"], ["v5e"], [Shape(1, 512, 16)], ["gradient"]
  (found,) = tpu_bench.estimates(*case, implementations=[tpu_bench.KERNELS])
  bundles = {kernel.name: kernel.bundles for kernel in found.kernels}
  assert bundles.keys() == COMMITTED.keys()
  assert all(bundles[name] < 1.05 * COMMITTED[name] for name in COMMITTED), bundles
  assert all(0 < kernel.vmem_bytes < 16 * 2**20 for kernel in found.kernels)
  assert found.ns > sum(bundles.values()) / 1.5  # gates are prepared by XLA
