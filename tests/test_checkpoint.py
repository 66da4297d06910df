"""A checkpoint restores what was saved, on any mesh; a damaged one is never used, and one that does not fit is kept."""

import errno
import gc
import json
import logging
import os
import shutil
import sys

import chex
import jax
import numpy as np
import pytest
from damage import empty_every_file, flip_bits, lose_the_facts, lose_the_position, lose_the_state, truncate
from memzoo.train import checkpoint as module
from memzoo.train.checkpoint import Checkpoints, checksums, restore_params
from memzoo.train.sharding import MeshShape
from tiny_run import program_of, tiny_experiment

pytestmark = pytest.mark.xdist_group("checkpoint")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with checkpoints 1, 2 and 3 of a state sharded over four devices; and that state, on the host."""
  directory = tmp_path_factory.mktemp("run")
  program = program_of(tiny_experiment(directory, mesh=MeshShape(data=1, fsdp=2, tensor=2)))
  state = program.create()
  with Checkpoints(directory, kept=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state, {"next_index": step}, {"note": "kept"})
  return directory, jax.device_get(state)


@pytest.fixture
def run(saved, tmp_path):
  """A copy of that run, to be damaged."""
  return shutil.copytree(saved[0], tmp_path / "run")


@pytest.fixture(scope="module")
def target(saved):
  return program_of(tiny_experiment(saved[0])).abstract_state


@pytest.mark.compat
def test_state_saved_on_four_devices_is_restored_on_one_and_on_two(saved):
  directory, state = saved
  for mesh in (MeshShape(data=1), MeshShape(data=1, tensor=2)):
    program = program_of(tiny_experiment(directory, mesh=mesh))
    with Checkpoints(directory) as checkpoints:
      restored = checkpoints.restore(program.abstract_state)
    chex.assert_trees_all_equal(jax.device_get(restored.state), state)
    chex.assert_trees_all_equal(
      jax.tree.map(lambda leaf: leaf.sharding, restored.state),
      jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state),
    )
    assert (restored.data, restored.facts) == ({"next_index": 3}, {"note": "kept"})


def test_a_new_directory_has_nothing_to_restore(tmp_path, target):
  with Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.latest_step is None
    assert checkpoints.restore(target) is None


def test_only_the_newest_are_kept(tmp_path, saved):
  with Checkpoints(tmp_path, kept=2) as checkpoints:
    for step in range(5):
      checkpoints.save(step, saved[1], {}, {})
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_the_best_is_kept_beside_the_newest(tmp_path, saved, target):
  with Checkpoints(tmp_path, kept=2) as checkpoints:
    assert checkpoints.best_loss == float("inf")
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 4.0]):
      checkpoints.save(step, saved[1], {}, {}, loss)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3", "4"]
  with Checkpoints(tmp_path, kept=2) as checkpoints:
    assert checkpoints.best_loss == 1.0
  assert [restore_params(tmp_path, target.params, best=best)[1] for best in (False, True)] == [4, 1]


def test_a_best_checkpoint_that_is_damaged_is_the_best_no_longer(tmp_path, saved, target):
  with Checkpoints(tmp_path, kept=3) as checkpoints:
    for step, loss in enumerate([3.0, 2.0, 1.0], start=1):
      checkpoints.save(step, saved[1], {}, {}, loss)
  flip_bits(tmp_path / "checkpoints" / "3")
  with Checkpoints(tmp_path, say=lambda line: None) as checkpoints:
    assert checkpoints.best_loss == 1.0, "its facts can be read"
    checkpoints.restore(target)
    assert checkpoints.best_loss == 2.0


def test_without_an_evaluation_there_is_no_best(saved, target):
  with pytest.raises(ValueError, match="no checkpoint that was evaluated"):
    restore_params(saved[0], target.params, best=True)


def test_a_state_donated_during_a_save_is_saved_whole(tmp_path):
  """The next step overwrites the buffers of a donated state, while Orbax may still be writing."""
  make = jax.jit(lambda: {"params": {f"{i}": jax.numpy.full((512, 512), i, "float32") for i in range(8)}})
  advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 100, tree), donate_argnums=0)
  state = make()
  with Checkpoints(tmp_path, kept=9) as checkpoints:
    for step in range(5):
      checkpoints.save(step, state, {}, {})
      state = advance(state)
    checkpoints.wait()
    found = checkpoints.restore(jax.eval_shape(make))
  np.testing.assert_array_equal(found.state["params"]["3"], 403)


DAMAGES = (truncate, flip_bits, empty_every_file, lose_the_position, lose_the_state, lose_the_facts)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(run, target, saved, damage):
  damage(run / "checkpoints" / "3")
  said = []
  with Checkpoints(run, say=said.append) as checkpoints:
    restored = checkpoints.restore(target)
    assert restored.data == {"next_index": 2}
    chex.assert_trees_all_equal(jax.device_get(restored.state), saved[1])
    assert len(said) == 1
    assert said[0].startswith(f"Checkpoint 3 cannot be read and is now {run / 'unreadable' / '3'} (")
    if damage is truncate:
      checkpoints.save(3, restored.state, {"next_index": 3}, {})
      assert checkpoints.restore(target).data == {"next_index": 3}


def test_a_state_that_reads_well_but_is_not_what_was_saved_is_set_aside(run, target, saved):
  other = jax.tree.map(lambda leaf: leaf + 1, saved[1])
  with Checkpoints(run, kept=4) as checkpoints:
    checkpoints.save(4, other, {}, {})
  shutil.rmtree(run / "checkpoints" / "3" / "state")
  shutil.move(run / "checkpoints" / "4" / "state", run / "checkpoints" / "3")
  said = []
  assert restore_params(run, target.params, say=said.append)[1] == 2
  assert said[1] == f"Checkpoint 3 of {run} cannot be read (ValueError: an array does not match its checksum)."
  said.clear()
  with Checkpoints(run, say=said.append) as checkpoints:
    assert checkpoints.restore(target).data == {"next_index": 2}
  assert [line.partition(" cannot")[0] for line in said] == ["Checkpoint 4", "Checkpoint 3"]
  assert said[1].endswith("(ValueError: an array does not match its checksum).")


def test_if_all_are_damaged_nothing_is_restored_and_no_late_error_is_shown(run, target, monkeypatch):
  said, later = [], []
  monkeypatch.setattr(module, "_abandoned", module._Abandoned())
  monkeypatch.setattr(sys, "unraisablehook", later.append)
  for step in (1, 2, 3):
    flip_bits(run / "checkpoints" / str(step))
  with Checkpoints(run, say=said.append) as checkpoints:
    assert checkpoints.restore(target) is None
  assert len(said) == 3
  gc.collect()
  assert later == []


def contents(folder) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_parameter(tree, make):
  """The state, or its abstract form, of a model with one more parameter."""
  params = {"params": tree.params["params"] | {"gate": make((3,), np.float32)}}
  return tree._replace(params=params)


def narrower(abstract):
  embedding = jax.ShapeDtypeStruct((256, 8), np.float32)
  return abstract._replace(params={"params": abstract.params["params"] | {"embedding": embedding}})


def of_bfloat16(abstract):
  embedding = jax.ShapeDtypeStruct((256, 16), jax.numpy.bfloat16)
  return abstract._replace(params={"params": abstract.params["params"] | {"embedding": embedding}})


MISFITS = {
  "name": (lambda state: with_parameter(state, jax.ShapeDtypeStruct), r"params/params/gate is absent there, .* \[3\] here"),
  "shape": (narrower, r"params/params/embedding is float32 \[256, 16\] there, float32 \[256, 8\] here"),
  "dtype": (of_bfloat16, r"params/params/embedding is float32 \[256, 16\] there, bfloat16 \[256, 16\] here"),
}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_touched(run, target, name, earlier):
  change, words = MISFITS[name]
  if earlier:
    forget_arrays(run)
  before, said = contents(run), []
  with Checkpoints(run, say=said.append) as checkpoints:
    with pytest.raises(ValueError, match=f"{run}/checkpoints/3 does not fit this model and optimizer: {words}") as refusal:
      checkpoints.restore(change(target))
    assert "\n" not in str(refusal.value)
  with pytest.raises(ValueError, match=f"checkpoints/3 does not fit .*: {words}"):
    restore_params(run, change(target).params, say=said.append)
  assert (contents(run), said) == (before, [])


def forget_arrays(run) -> None:
  """Makes the checkpoints those of an earlier version, which saved neither the arrays' shapes nor a digest."""
  for step in (1, 2, 3):
    path = run / "checkpoints" / str(step) / "facts" / "metadata"
    facts = json.loads(path.read_text())
    for name in ("arrays", "digest", "position"):
      del facts[name]
    path.write_text(json.dumps(facts))


def test_a_checkpoint_with_one_parameter_too_many_does_not_fit(tmp_path, saved, target):
  state = with_parameter(saved[1], np.zeros)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
    with pytest.raises(ValueError, match=r"params/params/gate is float32 \[3\] there, absent here"):
      checkpoints.restore(target)


def test_a_checkpoint_of_an_earlier_version_is_restored(run, target, saved):
  forget_arrays(run)
  with Checkpoints(run) as checkpoints:
    restored = checkpoints.restore(target)
  chex.assert_trees_all_equal(jax.device_get(restored.state), saved[1])
  assert (restored.data, restored.facts) == ({"next_index": 3}, {"note": "kept"})


def test_a_damaged_checkpoint_is_passed_over_before_an_older_one_that_does_not_fit(run, target):
  flip_bits(run / "checkpoints" / "3")
  (run / "checkpoints" / "3" / "facts" / "metadata").write_text("{")
  with Checkpoints(run, say=lambda line: None) as checkpoints, pytest.raises(ValueError, match="checkpoints/2 does not fit"):
    checkpoints.restore(narrower(target))
  assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
  ("file", "old", "new"),
  [("facts", "kept", "kepu"), ("data", '"next_index": 3', '"next_index": 7'), ("facts", "float32 [256", "float32 [254")],
)
def test_facts_and_position_with_a_flipped_bit_are_damaged(run, target, file, old, new):
  path = run / "checkpoints" / "3" / file / "metadata"
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new))
  said = []
  with Checkpoints(run, say=said.append) as checkpoints:
    assert checkpoints.restore(target).data == {"next_index": 2}
  assert len(said) == 1
  assert "digest" in said[0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_checkpoint_that_this_process_may_not_read_is_not_damaged(run, target, monkeypatch, number):
  before = contents(run)

  def refuse(*_, **__):
    raise OSError(number, os.strerror(number))

  with Checkpoints(run) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(OSError, match=rf"a checkpoint cannot be read here \(.*{os.strerror(number)}.*Nothing was changed"):
      checkpoints.restore(target)
  assert contents(run) == before


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path, saved):
  with Checkpoints(tmp_path, kept=1) as checkpoints:
    for step, loss in enumerate([float("nan"), 2.0, float("nan"), None]):
      checkpoints.save(step, saved[1], {}, {}, loss)
    assert checkpoints.best_loss == 2.0
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


def test_a_save_cut_short_leaves_no_checkpoint(run, target):
  shutil.move(run / "checkpoints" / "3", run / "checkpoints" / "3.orbax-checkpoint-tmp")
  said = []
  with Checkpoints(run, say=said.append) as checkpoints:
    assert checkpoints.restore(target).data == {"next_index": 2}
  assert said == []


@pytest.fixture
def filters(monkeypatch):
  """Counts the filters of late errors: on the hook for unraisable exceptions, and in asyncio's logger."""
  logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
  monkeypatch.setattr(module, "_abandoned", module._Abandoned())
  monkeypatch.setattr(sys, "unraisablehook", hook)
  monkeypatch.setattr(logger, "filters", [])
  return lambda: (sys.unraisablehook is not hook, len(logger.filters))


def leave(directory, state, error: Exception) -> None:
  """Saves a checkpoint, then raises an unrelated error."""
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, state, {}, {})
    raise error


def fail(directory, state, number: int) -> None:
  """Makes a save fail with the error number `number`."""

  def save(*_, **__):
    raise OSError(number, os.strerror(number))

  with Checkpoints(directory, kept=3) as checkpoints:
    checkpoints._manager.save = save
    checkpoints.save(4, state, {}, {})


def test_late_errors_are_filtered_only_inside_unless_a_save_failed(tmp_path, saved, filters):
  with Checkpoints(tmp_path / "a"):
    with Checkpoints(tmp_path / "b"):
      assert filters() == (True, 1)
    assert filters() == (True, 1)
  assert filters() == (False, 0)
  for _ in range(2):
    with pytest.raises(KeyError):
      leave(tmp_path / "a", saved[1], KeyError())
    assert filters() == (False, 0)
  for _ in range(2):
    with pytest.raises(OSError, match="None was saved before; fix that, and the same command starts anew"):
      fail(tmp_path / "b", saved[1], errno.EIO)
    assert filters() == (True, 1)


@pytest.mark.parametrize(
  ("number", "remedy"),
  [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EFBIG, "make room"), (errno.EACCES, "fix that")],
)
def test_a_failed_save_says_what_to_do(run, saved, filters, number, remedy):
  words = rf"{os.strerror(number)}.*The one of step 3 is complete; {remedy}, and the same command resumes from it"
  with pytest.raises(OSError, match=words):
    fail(run, saved[1], number)


def test_checksums_depend_on_every_bit_and_every_position():
  values = np.arange(12, dtype=np.float32).reshape(3, 4)
  before = checksums({"a": jax.numpy.asarray(values)})
  for place in np.ndindex(values.shape):
    for bit in (0, 15, 31):
      changed = values.copy()
      changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
      assert checksums({"a": jax.numpy.asarray(changed)}) != before
  assert checksums({"a": jax.numpy.asarray(values[:, ::-1].copy())}) != before
  assert list(before) == ["['a']"]


def test_parameters_alone_are_restored_for_evaluation(saved, run, target):
  want = saved[1].params
  params, step = restore_params(run, target.params)
  assert step == 3
  chex.assert_trees_all_equal(jax.device_get(params), want)
  truncate(run / "checkpoints" / "3")
  flip_bits(run / "checkpoints" / "2")
  said = []
  params, step = restore_params(run, target.params, say=said.append)
  assert (step, len(said)) == (1, 2)
  chex.assert_trees_all_equal(jax.device_get(params), want)
  assert (run / "checkpoints" / "3").exists()


def test_restoring_parameters_without_a_checkpoint_is_an_error(tmp_path, run, target):
  with pytest.raises(ValueError, match="holds no checkpoint; expected"):
    restore_params(tmp_path, target.params)
  for step in (1, 2, 3):
    lose_the_state(run / "checkpoints" / str(step))
  with pytest.raises(ValueError, match="holds no checkpoint that can be read"):
    restore_params(run, target.params, say=lambda message: None)


@pytest.mark.parametrize("order", [1, -1])
def test_a_failed_write_is_told_by_the_system_s_message(order):
  details = ("[os_error_code='27']", """[tensorstore_spec='{"a: b": [c=1]}']""")[::order]
  error = ValueError(f'UNKNOWN: Error writing "a/b": Failed to write to file: File too large {" ".join(details)}')
  assert module._in_short(error) == "File too large"
  assert module._in_short(ValueError("no such leaf: x. Further on")) == "ValueError: no such leaf: x"
