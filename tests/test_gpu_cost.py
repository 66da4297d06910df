"""What a program costs a GPU: kernels, and the bytes that they read and write."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from memzoo.pallas_kernels import gpu_cost, hlo

# A loop of four steps, each of which reads a slice of an array, and writes one of another in place.
LOOP = """HloModule jit_f, is_scheduled=true

%cut (a: f32[4,256], i: s32[]) -> f32[1,256] {
  %a = f32[4,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %flat = f32[4,1,256]{2,1,0} bitcast(%a)
  ROOT %slice = f32[1,1,256]{2,1,0} dynamic-slice(%flat, %i, %zero, %zero), dynamic_slice_sizes={1,1,256}
}

%put (b: f32[4,256], x: f32[1,256], i: s32[]) -> f32[4,256] {
  %b = f32[4,256]{1,0} parameter(0)
  %x = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = f32[4,256]{1,0} dynamic-update-slice(%b, %x, %i, %zero)
}

%body (t: (s32[], f32[4,256], f32[4,256])) -> (s32[], f32[4,256], f32[4,256]) {
  %t = (s32[], f32[4,256]{1,0}, f32[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[4,256]{1,0} get-tuple-element(%t), index=1
  %b = f32[4,256]{1,0} get-tuple-element(%t), index=2
  %x = f32[1,256]{1,0} fusion(%a, %i), kind=kLoop, calls=%cut
  %c = f32[4,256]{1,0} fusion(%b, %x, %i), kind=kLoop, calls=%put, metadata={op_name="jit(f)/put"}
  ROOT %next = (s32[], f32[4,256]{1,0}, f32[4,256]{1,0}) tuple(%i, %a, %c)
}

%condition (t: (s32[], f32[4,256], f32[4,256])) -> pred[] {
  %t = (s32[], f32[4,256]{1,0}, f32[4,256]{1,0}) parameter(0)
  ROOT %go_on = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[4,256], f32[4,256])) -> f32[4,256] {
  %p = (s32[], f32[4,256]{1,0}, f32[4,256]{1,0}) parameter(0)
  %loop = (s32[], f32[4,256]{1,0}, f32[4,256]{1,0}) while(%p), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %b = f32[4,256]{1,0} get-tuple-element(%loop), index=2
  ROOT %out = f32[4,256]{1,0} custom-call(%b), custom_call_target="kernel"
}
"""


def test_launches_count_with_their_loops_and_slices_count_as_what_they_move():
  found = {each.name: (each.times, each.bytes) for each in gpu_cost.launches(hlo.parse(LOOP))}
  index, row, whole = 4, 4 * 256, 4 * 4 * 256
  assert found == {"x": (4, row + index + row), "c": (4, row + index + row), "out": (1, 2 * whole)}
  assert gpu_cost.Cost(gpu_cost.launches(hlo.parse(LOOP)), 0).count == 9


@pytest.mark.skipif(find_spec("jax_cuda12_plugin") is not None, reason="the compiler for GPUs is installed")
def test_without_the_compiler_the_error_says_what_to_install():
  with pytest.raises(ImportError, match="expected jax-cuda12-plugin and jax-cuda12-pjrt"):
    gpu_cost.measure(jnp.sin, jax.ShapeDtypeStruct((), jnp.float32))


def test_without_the_compiler_for_gpus_the_command_says_what_is_missing(monkeypatch, capsys):
  monkeypatch.setattr(gpu_cost, "find_spec", lambda name: None)
  monkeypatch.setattr("sys.argv", ["gpu_cost"])
  with pytest.raises(SystemExit, match="2"):
    gpu_cost.main()
  assert "expected jax-cuda12-plugin" in capsys.readouterr().err
