"""Checkpoints: saved by Orbax while training continues, and used only if they are complete and undamaged.

`RUN/checkpoints/STEP/` holds the train state, the position in the data, the config as gin text, the dtype, shape and checksum
of every array, and a digest of all the rest. Orbax writes to a temporary folder and renames it at the end, so a run killed
while saving leaves nothing that looks like a checkpoint. A checkpoint damaged later does not load, or does not match its
checksums. It is moved to `RUN/unreadable/`, with a message, and the one before it is used.

A checkpoint whose arrays are not those of the model is not damaged. It is refused with the first difference, and so is one that
this process may not read; the folder stays as it is.
"""

import errno
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PolicyCheckpointInfo, PreservationPolicy

from .processes import any_process, together
from .run_folder import complete_checkpoints
from .step import TrainState

_NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
# Failures of the process or the network, which say nothing about the files.
_NO_ACCESS = tuple(
  os.strerror(number)
  for number in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
)
_DAMAGED = "an array does not match its checksum"
_PARAMS = "['params']"  # the path of a dict's key; the path of TrainState's field is ".params"


class Restored(NamedTuple):
  """A checkpoint that was read.

  Attributes:
    state: the train state, with the shardings of the abstract state.
    data: the iterator's position, for `set_state`.
    facts: what else was saved; see `Checkpoints.save`.
  """

  state: TrainState
  data: Any
  facts: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for a save in progress.

  Args:
    directory: folder of the run, created if missing.
    kept: how many of the newest stay on disk, in addition to the one with the lowest validation loss.
    say: called with messages about checkpoints that cannot be read.
  """

  def __init__(self, directory: str | Path, *, kept: int = 2, say: Callable[[str], None] = print):
    self._directory, self._say = Path(directory).absolute(), say
    self._losses: dict[int, float] = {}
    self._failed = False
    with quiet_orbax():
      self._manager = ocp.CheckpointManager(
        self.path,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=AnyPreservationPolicy([LatestN(kept), _Best(self._losses)]), cleanup_tmp_directories=True
        ),
        item_names=("state", "data", "facts"),
      )
      self._losses.update(_validation_losses(self._manager))

  @property
  def path(self) -> Path:
    """The folder that holds a folder for each checkpoint."""
    return self._directory / "checkpoints"

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, readable or not."""
    return self._manager.latest_step()

  @property
  def saving(self) -> bool:
    """Whether a save is still in progress."""
    return self._manager.is_saving_in_progress()

  @property
  def best_loss(self) -> float:
    """The lowest validation loss of the checkpoints on disk; infinity if none was evaluated."""
    return min(self._losses.values(), default=math.inf)

  def save(
    self, step: int, state: TrainState, data: Any, facts: dict[str, Any], validation_loss: float | None = None
  ) -> None:
    """Begins to save. Returns once `state` is copied, so it may be donated then.

    Args:
      step: batches that `state` has seen.
      state: the train state.
      data: the iterator's `get_state()` after those batches.
      facts: other values to save with the run, as JSON.
      validation_loss: the validation loss of `state`, if it was evaluated. One that is not finite is not the best.
    """
    facts = facts | {"checksums": checksums(state), "arrays": arrays(state), "position": _digest(data)}
    if validation_loss is not None and math.isfinite(validation_loss):
      facts["validation_loss"] = self._losses[step] = validation_loss
    facts["digest"] = _digest(facts)
    with self._told_of_failure(), quiet_orbax():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), facts=ocp.args.JsonSave(facts)
        ),
      )

  def wait(self) -> None:
    """Returns when everything is on disk. Raises `OSError` if a save has failed, as the next `save` does."""
    with self._told_of_failure(), quiet_orbax():
      self._manager.wait_until_finished()

  def restore(self, abstract_state: TrainState) -> Restored | None:
    """The newest undamaged checkpoint, or None. Newer ones are set aside, with a message for each.

    Args:
      abstract_state: shapes, dtypes and shardings, as in `Program.abstract_state`. The shardings may differ from those of
        the state that was saved.

    Raises:
      ValueError: if the arrays of the newest undamaged one are not those of `abstract_state`.
      OSError: if this process may not read one, or cannot at present. Nothing is set aside then.
    """
    wanted = arrays(abstract_state)
    for step in sorted(self._manager.all_steps(), reverse=True):
      with together():
        found, damage = _attempt(lambda step=step: _read_facts_and_arrays(self._manager, step, self.path))
        if found is not None:
          _check_fit(found[1], wanted, self.path / str(step))
      if not any_process(damage is not None):
        restored, damage = _attempt(lambda step=step, facts=found[0]: self._restore(step, abstract_state, facts))
        if not any_process(damage is not None):
          return restored
      damage = damage or "in another process"
      self._say(f"Checkpoint {step} cannot be read and is now {self._set_aside(step)} ({damage}).")
    return None

  def _restore(self, step: int, abstract_state: TrainState, facts: dict[str, Any]) -> Restored:
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
    with quiet_orbax():
      found = self._manager.restore(step, args=arguments)
    if checksums(found.state) != facts["checksums"]:
      raise ValueError(_DAMAGED)
    if facts.get("position") not in (None, _digest(found.data)):
      raise ValueError("the position in the data does not match its digest")
    own = ("arrays", "checksums", "digest", "position", "validation_loss")
    return Restored(found.state, found.data, {name: value for name, value in facts.items() if name not in own})

  def _set_aside(self, step: int) -> Path:
    target = self._directory / "unreadable" / str(step)
    if jax.process_index() == 0:
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      shutil.move(self.path / str(step), target)
    multihost_utils.sync_global_devices("a checkpoint was set aside")
    self._losses.pop(step, None)
    self._manager.reload()
    return target

  @contextmanager
  def _told_of_failure(self) -> Iterator[None]:
    """Turns what Orbax raises for a failed save (usually one in the background) into one line."""
    try:
      yield
    except Exception as error:
      self._failed = True
      whole = max(complete_checkpoints(self._directory), default=None)
      raise OSError(
        f"a checkpoint could not be saved in {self.path} ({_in_short(error)}). "
        + ("None was saved before; " if whole is None else f"The one of step {whole} is complete; ")
        + ("make room" if any(words in str(error) for words in _NO_ROOM) else "fix that")
        + ", and the same command "
        + ("starts anew." if whole is None else "resumes from it.")
      ) from None

  def __enter__(self) -> "Checkpoints":
    _abandoned.ignore()
    return self

  def __exit__(self, kind: type | None, *_: Any) -> None:
    try:
      with quiet_orbax(), self._told_of_failure():
        self._manager.close()
    except OSError:
      if kind is None:
        raise
    finally:
      self._leave_quietly()

  def _leave_quietly(self) -> None:
    """Stops filtering messages, unless a save failed: the writes that Orbax abandons then print messages at any later time."""
    if not self._failed:
      _abandoned.let_through()
      return
    warnings.filterwarnings("ignore", message="coroutine 'async_serialize.*was never awaited")
    with quiet_orbax():
      gc.collect()
      time.sleep(0.2)


def restore_params(
  directory: str | Path,
  abstract_params: Any,
  *,
  best: bool = False,
  check: Callable[[dict[str, Any]], None] = lambda facts: None,
  say: Callable[[str], None] = print,
) -> tuple[Any, int]:
  """The parameters of a run's newest undamaged checkpoint, for evaluation and generation, and its step.

  Args:
    directory: folder of the run; it is not changed.
    abstract_params: shapes and dtypes, as `jax.eval_shape` gives them, without boxes. Those without a sharding are placed on
      the first device.
    best: take the checkpoint with the lowest validation loss instead of the newest.
    check: called with the checkpoint's facts; raises `ValueError` if they do not fit.
    say: called with messages about checkpoints that cannot be read.

  Raises:
    ValueError: if the run has no checkpoint that can be read, its parameters are not those of `abstract_params`, or `check`
      raises it.
  """
  path = Path(directory).absolute() / "checkpoints"
  if not path.is_dir():
    raise ValueError(f"{directory} holds no checkpoint; expected the folder of a run that has saved one.")
  here = SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), abstract_params
  )
  with quiet_orbax(), ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    steps = sorted(manager.all_steps(), reverse=True)
    if best:
      losses = _validation_losses(manager)
      if not losses:
        raise ValueError(f"{directory} holds no checkpoint that was evaluated; take the newest one instead of the best.")
      steps = sorted(losses, key=losses.get)
    wanted = arrays({"params": target})
    for step in steps:
      found, damage = _attempt(lambda step=step: _read_facts_and_arrays(manager, step, path))
      if found is not None:
        facts, saved = found
        check(facts)
        _check_fit({name: saved[name] for name in saved if name.startswith("params/")}, wanted, path / str(step))
        params, damage = _attempt(lambda step=step, facts=facts: _restore_params(manager, step, target, facts))
        if damage is None:
          return params, step
      say(f"Checkpoint {step} of {directory} cannot be read ({damage}).")
  raise ValueError(f"{directory} holds no checkpoint that can be read; expected the folder of a run that has saved one.")


def _restore_params(manager: ocp.CheckpointManager, step: int, target: Any, facts: dict[str, Any]) -> Any:
  arguments = ocp.args.PyTreeRestore(
    item={"params": target},
    restore_args={"params": ocp.checkpoint_utils.construct_restore_args(target)},
    partial_restore=True,
  )
  found = manager.restore(step, args=ocp.args.Composite(state=arguments))
  state, saved = {"params": found.state["params"]}, facts["checksums"]
  if any(saved[f".params{name.removeprefix(_PARAMS)}"] != value for name, value in checksums(state).items()):
    raise ValueError(_DAMAGED)
  return state["params"]


def _read_facts(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """The facts of a checkpoint. Earlier versions saved no digest."""
  with quiet_orbax():
    facts = dict(manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts)
  if facts.get("digest") not in (None, _digest({name: value for name, value in facts.items() if name != "digest"})):
    raise ValueError("the facts do not match their digest")
  return facts


def _read_facts_and_arrays(manager: ocp.CheckpointManager, step: int, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
  """The facts of a checkpoint in the folder `path`, and `arrays` of its state. Earlier versions left those to Orbax."""
  facts = _read_facts(manager, step)
  if "arrays" in facts:
    return facts, facts["arrays"]
  with quiet_orbax():
    saved = ocp.StandardCheckpointHandler().metadata(path / str(step) / "state")
  return facts, arrays(getattr(saved, "tree", saved))


def arrays(tree: Any) -> dict[str, str]:
  """The dtype and shape of each array by its name, such as "float32 [3, 4]"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): f"{jnp.dtype(leaf.dtype).name} {list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_fit(saved: dict[str, str], wanted: dict[str, str], path: Path) -> None:
  """Raises `ValueError` with the first difference between the arrays of the checkpoint `path` and those of the model."""
  for name in (*wanted, *saved):
    there, here = (found.get(name, "absent") for found in (saved, wanted))
    if there != here:
      raise ValueError(
        f"{path} does not fit this model and optimizer: {name} is {there} there, {here} here. It is not damaged and was left "
        "as it is; expected the code and JAX settings of the run, or a new directory."
      )


def _digest(value: Any) -> str:
  """A digest of a value as JSON."""
  plain = json.loads(json.dumps(value))  # tuples become lists, and keys strings
  return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


# Not Orbax's BestN: it reads the metrics of all checkpoints when a manager is made, and raises if one of the files is damaged.
@dataclass
class _Best(PreservationPolicy):
  """Keeps the checkpoint with the lowest of `losses`, which are given by step."""

  losses: dict[int, float]

  def should_preserve(self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: Any) -> Sequence[bool]:
    best = min((info.step for info in checkpoints if info.step in self.losses), key=self.losses.get, default=None)
    return [info.step == best for info in checkpoints]


def _validation_losses(manager: ocp.CheckpointManager) -> dict[int, float]:
  """The validation losses, by step, of the checkpoints that were evaluated and can be read."""
  facts = {step: _attempt(lambda step=step: _read_facts(manager, step))[0] for step in manager.all_steps()}
  return {step: found["validation_loss"] for step, found in facts.items() if found and "validation_loss" in found}


def _attempt(load: Callable[[], Any]) -> tuple[Any, str | None]:
  """`load()` and None, or None and what is wrong with the files that it read.

  A damaged file raises any of a dozen types of exception. All are caught, except those with other causes. A file that this
  process may not read raises `OSError`.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
  try:
    try:
      return load(), None
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      damage = _in_short(error)
      barred = any(words in str(error) for words in _NO_ACCESS)
    # Orbax abandons the reads of the other arrays, and each prints a long message when it is collected or finishes. Most are
    # collected here, now that no exception refers to them.
    gc.collect()
    time.sleep(0.2)
  finally:
    sys.unraisablehook = hook
  _abandoned.ignore()  # for good, since the other reads may finish at any time
  if barred:
    raise OSError(f"a checkpoint cannot be read here ({damage}). Nothing was changed; make it readable, and try again.")
  return None, damage


def _in_short(error: Exception) -> str:
  """An exception's type and first sentence; for a file that could not be written, only the system's message."""
  reason, *details = re.split(r" \[(?=\w+=)", " ".join(str(error).split()))  # TensorStore's details, in any order
  if any(detail.startswith("os_error_code=") for detail in details):
    return reason.rpartition(": ")[2]
  return f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0][:200]}"


class _Abandoned:
  """Silences the writes and reads that Orbax abandons when one of them fails. (The first failure is raised.)

  They fail in other threads, where no caller can catch the exception, and print long tracebacks.
  """

  def __init__(self):
    self._requests = 0
    self._undo: Callable[[], None] = lambda: None

  def ignore(self) -> None:
    """Silences them until `let_through` has been called as often as this."""
    if not self._requests:
      self._undo = _filter_complaints()
    self._requests += 1

  def let_through(self) -> None:
    """Takes back one call of `ignore`."""
    self._requests -= 1
    if not self._requests:
      self._undo()


_abandoned = _Abandoned()


def _filter_complaints() -> Callable[[], None]:
  """Filters what Python prints about abandoned writes and reads. Returns a function that undoes this."""
  hook, logger = sys.unraisablehook, logging.getLogger("asyncio")

  def filtered(unraisable):
    words = str(unraisable.exc_value)
    write = isinstance(unraisable.exc_value, RuntimeError) and words == "Event loop is closed"
    if not (write or words.startswith("Encountered error while reading array index")):
      hook(unraisable)

  def is_of_interest(record):
    return not record.getMessage().startswith("Task exception was never retrieved")

  def undo():
    if sys.unraisablehook is filtered:  # and nobody has replaced it since
      sys.unraisablehook = hook
    logger.removeFilter(is_of_interest)

  sys.unraisablehook = filtered
  logger.addFilter(is_of_interest)
  return undo


def checksums(tree: Any) -> dict[str, int]:
  """A checksum of each array, which changes with any flipped bit. It is computed on the array's own devices."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = _checksums([leaf for _, leaf in leaves])
  return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, jax.device_get(sums), strict=True)}


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(array) for array in arrays]


def _checksum(array: jax.Array) -> jax.Array:
  """The sum, modulo 2^32, of the words of `array`, each times an odd number that depends on its position."""
  word = jnp.dtype(f"uint{8 * min(4, array.dtype.itemsize)}")
  bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
  factors = jnp.ones(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    factors = factors * (2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + 1)
  return jnp.sum(bits * factors, dtype=jnp.uint32)


@contextmanager
def quiet_orbax() -> Iterator[None]:
  """Silences Orbax's log, which goes through absl's logger. Errors are still raised."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)
