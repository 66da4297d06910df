"""Costs on a TPU: the parser of HLO on modules written by hand, and one real compilation with libtpu."""

import os
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from machine import needs_libtpu
from memzoo.pallas_kernels import hlo, tpu_cost
from memzoo.pallas_kernels.hlo import Product

# Five rounds of a loop, each with a loop of three rounds, a conditional and a fused product; collectives of both kinds.
LOOPS = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,4]{1,0})->f32[8]{0}}

FileNames
1 "/site/memzoo/train/step.py"
2 "/site/memzoo/pallas_kernels/delta_rule/chunked.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=1 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (p: bf16[16,8], q: bf16[8,32]) -> f32[16,32] {
  %p = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot.1 = f32[16,32]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(step)/dot_general" stack_frame_id=1}
}

%inner_body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %a = f32[4]{0} get-tuple-element(%s), index=1
  %sum = f32[4]{0} all-reduce(%a), replica_groups={}, to_apply=%add, metadata={op_name="jit(step)/inner" stack_frame_id=2}
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) custom-call(%a), custom_call_target="tpu_custom_call"
}

%inner_condition (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%cheap (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} copy(%y), backend_config={"estimated_cycles":"10"}
}

%dear (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} copy(%y), backend_config={"estimated_cycles":"1000"}
}

%outer_body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[]{:T(128)}, /*index=1*/f32[4]{0:T(128)}) parameter(0)
  %f = f32[16,32]{1,0} fusion(%s, %s), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"7"}
  %w = (s32[], f32[4]{0}) while(%s), condition=%inner_condition, body=%inner_body, backend_config={"estimated_cycles":"2"}
  ROOT %c = f32[4]{0} conditional(%s, %s, %s), branch_computations={%cheap, %dear}, backend_config={"window":[]}
}

%unknown_condition (s: (s32[], f32[4])) -> pred[] {
  ROOT %p = pred[] custom-call(%s), custom_call_target="tpu_custom_call"
}

%async (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add
}

ENTRY %main.1 (x: bf16[8,4]) -> f32[8] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = (s32[], f32[4]{0}) while(%x), condition=%c, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %u = (s32[], f32[4]{0}) while(%x), condition=%unknown_condition, body=%cheap
  %buffer = f32[4]{0} custom-call(), custom_call_target="AllocateBuffer"
  %g = (bf16[8,4]{1,0}, bf16[32,4]{1,0}, u32[]{:S(2)}) all-gather-start(%x), metadata={op_name="jit(step)/gather"}
  %gd = bf16[32,4]{1,0} all-gather-done(%g)
  %sc = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%async
  ROOT %done = f32[8]{0} fusion(%gd), kind=kLoop, calls=%dear, backend_config={"estimated_cycles":"100"}
}
"""


@pytest.fixture(scope="module")
def module():
  return hlo.parse(LOOPS)


def test_cycles_count_bodies_of_nested_loops_and_the_dearest_branch(module):
  assert module.cycles() == 100 + 10 + 5 * (7 + 2 + 1000)


def test_trip_counts_come_from_the_compiler_or_from_the_condition(module):
  assert module.trip_counts() == [5, 3, None]


def test_collectives_count_once_per_iteration_with_the_larger_of_both_sides(module):
  found = {c.kind: c for c in module.collectives()}
  assert [(kind, c.times, c.bytes) for kind, c in found.items()] == [
    ("all-reduce", 15, 16),
    ("all-gather", 1, 2 * 32 * 4),
    ("reduce-scatter", 1, 32),
  ]
  assert found["all-gather"].op_name == "jit(step)/gather"
  assert found["all-reduce"].files == ("/site/memzoo/pallas_kernels/delta_rule/chunked.py", "/site/memzoo/train/step.py")
  assert found["all-gather"].files == ()


def test_the_steps_of_one_collective_count_as_often_as_its_first():
  step = 'all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}'
  text = LOOPS.replace("  %sum = f32[4]", f"  %x = f32[1]{{0}} copy(%a)\n  %next = f32[99]{{0}} {step}\n  %sum = f32[4]")
  text = text.replace("  %buffer = ", f"  %first = f32[99]{{0}} {step}\n  %buffer = ")
  assert [(c.kind, c.times) for c in hlo.parse(text).collectives() if c.bytes == 396] == [("all-gather", 1)]


def test_products_inside_fusions_count_with_their_loops(module):
  files = ("/site/memzoo/train/step.py",)
  assert module.products() == [Product("bf16", "bf16", 1, 5, "jit(step)/dot_general", files)]
  assert module.flops() == 5 * 2 * 16 * 8 * 32


def test_custom_calls_count_except_those_that_compute_nothing(module):
  assert module.custom_calls() == {"tpu_custom_call": 15}


def test_attributes_may_have_lines_of_their_own(module):
  attribute = ', frontend_attributes={kernel_metadata={\n"loops":"[1, 2]"\n}}, backend_config={"estimated_cycles":"1000"}\n'
  kernel = f'  %own = f32[4]{{0}} custom-call(), custom_call_target="tpu_custom_call"{attribute}'
  text = LOOPS.replace("  %buffer = ", f"{kernel}  %buffer = ")
  assert hlo.parse(text).custom_calls() == {"tpu_custom_call": 16}
  assert hlo.parse(text).cycles() > module.cycles()


@pytest.mark.parametrize(
  ("window", "kernel", "outputs", "pairs"),
  [
    ("size=8 stride=7 lhs_dilate=8", 8, 8, 8),  # a batch of 8 products, as a TPU has them: the other taps meet gaps
    ("size=8 pad=7_7 rhs_reversal=1", 8, 15, 64),  # each of 8 inputs meets each of 8 taps
    ("size=3", 3, 6, 18),
    ("size=3 pad=1_1 rhs_dilate=2", 3, 6, 16),
  ],
)
def test_flops_of_convolutions_count_taps_that_meet_inputs(window, kernel, outputs, pairs):
  text = f"""ENTRY %main (x: f32[8,64,128]) -> f32[{outputs},64,32] {{
  %x = f32[8,64,128]{{2,1,0}} parameter(0)
  %k = f32[{kernel},128,32]{{2,1,0}} parameter(1)
  ROOT %c = f32[{outputs},64,32]{{2,1,0}} convolution(%x, %k), window={{{window}}}, dim_labels=0bf_0io->0bf, \
operand_precision={{highest,highest}}
}}
"""
  module = hlo.parse(text)
  assert module.flops() == 2 * pairs * 64 * 128 * 32
  assert module.products() == [Product("f32", "f32", 6, 1, "", ())]


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="expected an HLO module"):
    hlo.parse("module @jit_f {}")


def test_a_cpu_module_has_its_flops_and_trip_counts():
  def squares(x):
    return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=6)[0]

  module = hlo.parse(jax.jit(squares).lower(jnp.ones((16, 16))).compile().as_text())
  assert module.trip_counts() == [6]
  assert module.flops() == 6 * 2 * 16**3


@needs_libtpu
def test_a_program_is_compiled_for_a_tpu_without_one():
  def squares(x):
    return jax.lax.scan(lambda x, _: (jnp.matmul(x, x, precision="highest"), None), x, None, length=6)[0]

  before = dict(os.environ)
  cost = tpu_cost.measure(squares, jnp.ones((512, 512)))
  assert cost.trip_counts == [6]
  assert cost.flops == 6 * 2 * 512**3
  (product,) = cost.products
  assert product[:4] == ("f32", "f32", 6, 6)
  assert product.files[0] == __file__
  least = 6 * cost.flops / tpu_cost.CHIPS["v5e"].flops
  assert least < cost.seconds < 2 * least
  assert 2 * 4 * 512**2 <= cost.peak_bytes < 2**24
  assert os.environ == before, "variables for libtpu are not left behind"
  assert jax.default_backend() == "cpu"


@needs_libtpu
def test_a_program_that_does_not_fit_is_refused():
  with pytest.raises(tpu_cost.DoesNotFit, match=r"needs [\d.]+GiB of memory on a chip, which has 15.75GiB"):
    tpu_cost.measure(lambda x: jnp.sin(x) @ x, jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32))


def test_of_a_program_whose_text_is_not_given_the_memory_is_known():
  class Compiled:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: no text\nstack")

    def memory_analysis(self):
      return jax.jit(jnp.sin).lower(jnp.ones(8)).compile().memory_analysis()

  cost = tpu_cost.compile_and_read(mock.Mock(compile=Compiled), "v5e")
  assert (cost.unread, cost.cycles, cost.flops, cost.collectives) == ("INTERNAL: no text", 0, 0, [])
  assert cost.peak_bytes >= 64


def test_unknown_chips_and_topologies_are_refused():
  with pytest.raises(ValueError, match="chip is 'v5'; expected one of v4, v5e"):
    tpu_cost.measure(jnp.sin, jnp.ones(8), chip="v5")


@needs_libtpu
def test_an_unknown_topology_is_refused():
  with pytest.raises(ValueError, match="topology is 'v9:2x2'; expected one that libtpu knows"):
    tpu_cost.devices("v9:2x2")


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  tpu_cost._load_libtpu.cache_clear()
  monkeypatch.setattr(tpu_cost, "find_spec", lambda name: None)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  with pytest.raises(ImportError, match="pip install libtpu"):
    tpu_cost.devices("v5e:2x2")
