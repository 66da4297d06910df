"""Schedules of kernels for TPUs: the reader on texts written by hand, and figures of kernels compiled with libtpu."""

import pytest
from machine import needs_libtpu
from memzoo.pallas_kernels import tpu_schedule
from memzoo.pallas_kernels.workloads import Shape

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
# Bundles per token and head on a v5e that were committed; a kernel may take a twentieth more.
COMMITTED = {"gated delta rule, packed documents": 4.58}


def test_the_bundles_of_a_step_are_those_in_the_loop_over_the_grid_and_not_in_inner_loops():
  schedule = tpu_schedule.parse("kernel", BUNDLES, SLOTS)
  assert schedule[:3] == ("kernel", 3, 3)
  assert schedule.slots == {"MATMUL": 0, "VALU": 1 / 12, "VLOAD": 2 / 9, "VSTORE": 1 / 3}


def test_slots_of_another_schedule_are_refused():
  with pytest.raises(ValueError, match="has 6 bundles, but slots of 5"):
    tpu_schedule.parse("kernel", BUNDLES, SLOTS.rsplit("0 0 0 0", 1)[0])


@pytest.mark.parametrize(("arguments", "message"), [({"chips": ["v5"]}, "chip is 'v5'"), ({"kernels": ["x"]}, "kernel is 'x'")])
def test_unknown_names_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    next(tpu_schedule.figures(**arguments))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kernel", COMMITTED)
def test_a_kernel_takes_no_more_bundles_than_were_committed(kernel):
  """If one has to be slower, change the committed figure and the table in `pallas_kernels/README.md`."""
  (figure,) = tpu_schedule.figures([kernel], shape=Shape(1, 256, 16))
  assert figure.bundles < 1.05 * COMMITTED[kernel]
  text = tpu_schedule.table([figure])
  assert "static" in text
  assert f"| {figure.bundles:.2f} |" in text
