"""Counts: FLOPs of a jaxpr, parameters and bytes of a model, bytes of a training step."""

import io
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from memzoo.layers import Attention, GatedDeltaNet
from memzoo.pallas_kernels.measure import count_flops, flops_by_scope
from memzoo.train.config import build
from memzoo.train.experiment_report import abstract_batch, bytes_on_a_device, predicted_peak, render
from memzoo.train.sharding import MeshShape, put_batch
from memzoo.zoo.describe import describe, forward_flops
from memzoo.zoo.formats import binary, clock, milliseconds, thousands
from memzoo.zoo.language_model import LanguageModel
from rich.console import Console
from tiny_run import program_of, tiny_experiment

pytestmark = pytest.mark.xdist_group("describe")

A = jax.ShapeDtypeStruct((3, 5), jnp.float32)
B = jax.ShapeDtypeStruct((5, 7), jnp.float32)
PRODUCT = 2 * 3 * 5 * 7


@pytest.fixture
def model():
  mixers = (GatedDeltaNet(num_heads=2, key_dim=8, value_dim=8), Attention(num_heads=2, head_dim=8, window=16))
  return LanguageModel(vocab_size=64, width=32, depth=3, mixers=mixers)


@pytest.mark.compat
def test_a_product_counts_two_per_multiply_add():
  assert count_flops(jnp.dot, A, B) == PRODUCT
  assert count_flops(lambda a, b: jnp.einsum("...ij,...jk->...ik", a, b), batched(A), batched(B)) == 4 * PRODUCT
  assert count_flops(lambda a: a + a, A) == 0


def batched(x):
  return jax.ShapeDtypeStruct((4, *x.shape), x.dtype)


def test_a_scan_counts_every_iteration():
  def scanned(a, b):
    return jax.lax.scan(lambda carry, _: (carry + jnp.dot(a, b).sum(), None), jnp.float32(0), None, length=11)

  assert count_flops(scanned, A, B) == 11 * PRODUCT
  assert count_flops(lambda a, b: jax.lax.map(lambda _: scanned(a, b), jnp.arange(3)), A, B) == 33 * PRODUCT


def test_a_cond_counts_its_most_expensive_branch():
  def either(a, b):
    return jax.lax.cond(a.sum() > 0, lambda: jnp.dot(a, b) + jnp.dot(a, b), lambda: jnp.dot(a, b))

  assert count_flops(either, A, B) == 2 * PRODUCT


def test_flops_inside_jit_remat_and_custom_gradients_are_counted():
  @jax.custom_vjp
  def product(a, b):
    return jnp.dot(a, b)

  product.defvjp(lambda a, b: (jnp.dot(a, b), None), lambda _, g: (g @ g.T @ g, g))
  assert count_flops(product, A, B) == PRODUCT
  assert count_flops(jax.jit(jax.checkpoint(product)), A, B) == PRODUCT


def test_a_pallas_kernel_counts_every_grid_point():
  def kernel(a, b, out):
    out[...] = jnp.dot(a[...], b[...])

  def call(a, b):
    whole = [pl.BlockSpec(x.shape, lambda i: (0, 0)) for x in (a, b)]
    specs = {"in_specs": whole, "out_specs": pl.BlockSpec((3, 7), lambda i: (i, 0))}
    return pl.pallas_call(kernel, jax.ShapeDtypeStruct((24, 7), jnp.float32), grid=(8,), **specs)(a, b)

  assert count_flops(call, A, B) == 8 * PRODUCT


def test_flops_are_counted_by_scope():
  def scoped(a, b):
    with jax.named_scope("outer"):
      return jax.jit(lambda: jnp.dot(a, b))() + jnp.dot(a, b)

  assert sum(flops_by_scope(scoped, A, B).values()) == 2 * PRODUCT
  assert all(scope.startswith("outer") for scope in flops_by_scope(scoped, A, B))


@pytest.mark.compat
def test_the_parts_add_up_to_the_model(model):
  length = 64
  description = describe(model, length)
  params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
  assert description.parameters == sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))
  assert description.flops * length == pytest.approx(forward_flops(model, 1, length))
  assert description.state_bytes == model.state_bytes(1, length)
  assert set(description.state_bytes_by_kind()) == {"GatedDeltaNet", "Attention"}
  assert all(row.flops > 0 for row in description.rows if row.kind)


def test_a_model_far_too_large_for_this_machine_can_be_described():
  mixer = GatedDeltaNet(num_heads=128, key_dim=128, value_dim=128)
  huge = LanguageModel(vocab_size=128_000, width=65536, depth=3, mixers=(mixer,))
  assert describe(huge, 64).parameters > 1e11


described = cache(describe)


def two_blocks(*overrides: str):
  """The quickstart config with two blocks."""
  return build("quickstart", ["LanguageModel.depth=2", *overrides])


def shown_of(experiment, *rest) -> str:
  console = Console(width=160, record=True, file=io.StringIO())
  for part in render(experiment, described(experiment.model, 512), *rest):
    console.print(part)
  return console.export_text()


def test_a_description_is_shown_with_its_sums():
  experiment = build("quickstart")
  shown = shown_of(experiment)
  assert "EraseThenDelta" in shown
  assert f"{described(experiment.model, 512).parameters:,}" in shown


def test_memory_is_that_of_a_device_of_the_mesh_or_of_one_device_alone():
  parameters = 4 * described(two_blocks().model, 512).parameters
  whole = f"{binary(parameters)} of parameters, {binary(2 * parameters + 8)} of moments, on "
  assert whole + "each of 4 devices" in shown_of(two_blocks())
  assert whole + "one device alone: MeshShape(data=1, fsdp=1, tensor=64) does not fit the 4 here" in shown_of(
    two_blocks("MeshShape.data=1", "MeshShape.tensor=64")
  )
  shared = shown_of(two_blocks("MeshShape.data=2", "MeshShape.fsdp=2", "Optimizer.accumulate_steps=2"))
  memory = next(line for line in shared.splitlines() if line.lstrip().startswith("memory"))
  assert "of moments and accumulated gradients, on each of 4 devices" in memory
  assert 0.5 < float(memory.split()[1]) * 2**20 / parameters < 0.6, "all but what fsdp does not split"


def test_the_parts_of_a_peak_are_what_a_device_holds(tmp_path):
  experiment = tiny_experiment(tmp_path, mesh=MeshShape(data=1, fsdp=2, tensor=2))
  program = program_of(experiment)
  state, batch = program.create(), put_batch(next(experiment.data.load().batches()), program.batch_sharding)
  peak = predicted_peak(experiment)
  held = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state, batch)]
  assert [peak.state, peak.batch] == held
  assert bytes_on_a_device(state) == peak.state
  logits = 4 * 4 * 32 * 256 // 4
  assert logits < peak.temporaries < 50 * logits
  assert peak.total == peak.state + peak.batch + peak.temporaries
  assert f"{binary(peak.total)} per device in a training step, as compiled for cpu" in shown_of(two_blocks(), peak)
  same = abstract_batch(experiment.data, program.batch_sharding)
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), same) == jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding), batch
  )


ROWS = ["LanguageModel.width=32", "LanguageModel.mixers=[@Attention]", "Attention.head_dim=8", "Attention.window=64"]
ROWS += ["LanguageModel.depth=8", "LanguageModel.scan=True", "TextData.sequence_length=2048", "MeshShape.data=1"]


@pytest.mark.slow
def test_recomputing_takes_less_at_the_peak():
  peaks = [predicted_peak(build("quickstart", [*ROWS, f"LanguageModel.remat={remat}"])) for remat in ("none", "full")]
  assert peaks[0].state == peaks[1].state
  assert peaks[1].temporaries < peaks[0].temporaries / 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_step_takes_about_the_memory_that_was_predicted(tmp_path):
  """In a process of its own, in which nothing needs more memory than the step."""
  script = """
import re, sys, jax, memzoo
from pathlib import Path
jax.config.update("jax_compilation_cache_dir", sys.argv.pop(1))
from memzoo.train.step import build_program
from memzoo.train.experiment_report import abstract_batch, predicted_peak

def bytes_of(name):
  return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

experiment = memzoo.build("quickstart", [*sys.argv[1:], "TextData.batch_size=32"])
mesh = experiment.mesh.build()
program = build_program(experiment.model, experiment.optimizer, mesh, steps=10, batch_size=32)
peak = predicted_peak(experiment)
batch = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), abstract_batch(experiment.data, program.batch_sharding))
step = program.train.lower(program.abstract_state, batch).compile()
state = jax.block_until_ready(program.create())
before = bytes_of("VmRSS")
assert bytes_of("VmHWM") - before < peak.temporaries / 2, "so that the peak is the step's"
jax.block_until_ready(step(state, batch))
print((bytes_of("VmHWM") - before) / (peak.temporaries))
"""
  command = [sys.executable, "-c", script, str(tmp_path), *ROWS, "LanguageModel.depth=2"]
  found = subprocess.run(command, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  assert 0.5 < float(found.stdout) < 2


def test_numbers_are_shown_with_three_digits_and_a_unit():
  assert [thousands(n) for n in (7, 999, 1234, 999_499, 999_500, 2.5e13)] == ["7", "999", "1.23k", "999k", "1M", "25T"]
  assert [thousands(n, "B") for n in (999, 1_340_000)] == ["999 B", "1.34 MB"]
  assert [clock(seconds) for seconds in (5, 65, 3725.2)] == ["0:05", "1:05", "1:02:05"]
  assert [milliseconds(seconds) for seconds in (0.00123, 0.0123, 0.123, 1.5)] == ["1.23", "12.3", "123", "1,500"]
  assert [binary(n) for n in (999, 1536, 5 * 2**20, 3 * 2**40)] == ["999 bytes", "1.5 KiB", "5.0 MiB", "3.0 TiB"]
