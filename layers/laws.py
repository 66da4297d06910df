"""The laws that every memory layer obeys, and `check_layer`, which tests any layer against them:

    import memzoo
    report = memzoo.check_layer(MyLayer(num_heads=4), width=64)
    print(report)                  # each law: held or broken, where, by how much, and how to fix it
    report.raise_if_broken()

Each law has one or more checks: functions of a `Trial` that yield `Violation`s. `tests/test_laws.py` runs the same checks on
every layer of the registry. A layer needs only the contract of `MemoryLayer`, and need not inherit from it: it is called as
`layer.apply(params, x, state, segment_ids)`, and has methods `initial_state(batch_size)` and `state_bytes(batch_size, length)`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from . import law_sharding
from .law_report import Report, Result, Violation
from .law_trial import CHUNK, HOSTILE, ONE, PACKED, PADDED, ROWS, TOKENS, Trial, first, has_field, masked, with_small_steps
from .tolerances import wide

TITLES = {
  1: "causality",
  2: "any split equals one call",
  3: "packed documents are separate documents",
  4: "padding is a no-op",
  5: "one call equals token by token",
  6: "batch rows are independent",
  7: "any length",
  8: "bfloat16 activations",
  9: "transformations compose",
  10: "hostile inputs stay finite",
  11: "sharded equals unsharded",
  12: "the state survives a checkpoint",
  13: "mistakes are named",
  14: "the state does not grow",
  15: "runs under flax.nnx",
  16: "stays alive",
}
# A broken law often breaks others. The first broken law in this order is the one to fix first.
_CAUSES_FIRST = (14, 6, 1, 2, 3, 4, 5, 7, 9, 12, 15, 11, 16, 10, 8, 13)

TRACED, SHARED, COMPILED = "traced", "shared", "compiled"

MANY = 50_000  # tokens after which a layer must still learn
_LEAST_RESPONSE = 0.1  # and the share of a fresh state's response that must be left


@dataclass(frozen=True)
class Check:
  """A check of a law. Called with a `Trial`, it returns violations.

  Attributes:
    law, name: the number of the law, and the name of the check.
    find: the function that yields the violations.
    cost: `TRACED` compiles nothing, `SHARED` only the programs that all laws share, `COMPILED` programs of its own.
    float32: whether it runs in float32 whatever the layer's precision.
    devices: number of devices that it needs.
  """

  law: int
  name: str
  find: Callable[[Trial], Iterator[Violation]]
  cost: str
  float32: bool = False
  devices: int = 1

  def __str__(self) -> str:
    return f"{self.law:02d}_{self.name}"

  def __call__(self, trial: Trial) -> list[Violation]:
    """Returns the violations. An exception raised by the layer counts as one."""
    with jax.enable_x64(trial.float64 and not self.float32):
      try:
        return list(self.find(trial.float32 if self.float32 else trial))
      except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return [Violation(self.law, f"the layer raises {type(error).__name__}: {lines[0]} ({self.find.__doc__.strip()})")]


CHECKS: list[Check] = []


def _check(law: int, cost: str, **options: Any) -> Callable:
  def register(find: Callable) -> Callable:
    CHECKS.append(Check(law, find.__name__, find, cost, **options))
    return find

  return register


def check_layer(layer: nn.Module, width: int = 64, *, laws: Iterable[int] | None = None) -> Report:
  """Tests a layer against the laws.

  Args:
    layer: a module with the contract of `MemoryLayer`. Its fields `chunk_size`, `window` and `segment`, if any, are set
      to small numbers if it accepts them, so that the short inputs of the laws exceed them.
    width: width of its input, [B, T, width].
    laws: numbers of the laws to try; `None` for all.

  Returns:
    A report: `report.ok`, `report.violations`, `print(report)`, `report.raise_if_broken()`. Outputs are compared in float64
    if the layer computes in the precision of its input, else in float32.

  Raises:
    ValueError: if a law does not exist, or the layer lacks the contract's methods or cannot be called.
  """
  wanted = sorted(set(TITLES if laws is None else laws))
  if unknown := set(wanted) - set(TITLES):
    raise ValueError(f"laws={sorted(unknown)} do not exist; expected some of {min(TITLES)} to {max(TITLES)}.")
  with ExitStack() as stack:
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    trial = _on_trial(layer, width)
    found: dict[Check, list[Violation] | str] = {}
    grows = False
    for check in sorted(CHECKS, key=lambda check: _CAUSES_FIRST.index(check.law)):
      if check.law not in wanted and check.law != 14:
        continue
      if grows and check.cost != TRACED:
        found[check] = "law 14 is broken"
      elif jax.device_count() < check.devices:
        found[check] = f"needs {check.devices} devices"
      else:
        found[check] = check(trial)
        if check.find is law_sharding.explicit_heads:  # a correct layer need not say how its results are split
          untyped = f"the layer raises {law_sharding.UNTYPED}"
          found[check] = [each for each in found[check] if not each.message.startswith(untyped)]
        grows = grows or (check.find is state_size and bool(found[check]))
  results = tuple(_result(law, found) for law in wanted)
  broken = {result.law for result in results if result.violations}
  first_broken = next((law for law in _CAUSES_FIRST if law in broken), None)
  return Report(type(layer).__name__, trial.dtype.name, results, first_broken)


def _on_trial(layer: nn.Module, width: int) -> Trial:
  """Returns a `Trial` of the layer if the layer can be called."""
  for method in ("initial_state", "state_bytes"):
    if not callable(getattr(layer, method, None)):
      raise ValueError(f"{type(layer).__name__} has no method {method}; see the contract in memzoo.layers.MemoryLayer.")
  problem = None
  for candidate in (with_small_steps(layer), layer):
    trial = Trial(candidate, width)
    try:
      with jax.enable_x64(trial.float64):
        trial.shapes(trial.example(ROWS, TOKENS), None, ONE)
      return trial
    except Exception as error:
      problem = error
  raise ValueError(
    f"{type(layer).__name__} cannot be called as apply(params, x [{ROWS}, {TOKENS}, {width}], None, segment_ids): "
    f"{type(problem).__name__}: {problem}"
  ) from problem


def _result(law: int, found: dict[Check, list[Violation] | str]) -> Result:
  mine = [outcome for check, outcome in found.items() if check.law == law]
  violations = tuple(violation for outcome in mine if not isinstance(outcome, str) for violation in outcome)
  skipped = [outcome for outcome in mine if isinstance(outcome, str)]
  return Result(law, TITLES[law], violations, skipped[0] if skipped else None)


def _rows(tree: Any, rows: Any) -> Any:
  return jax.tree.map(lambda a: a[rows] if np.ndim(a) else a, tree)


def _dtypes(tree: Any) -> Any:
  return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@_check(1, SHARED)
def causality(trial: Trial) -> Iterator[Violation]:
  """The output at a token does not depend on later tokens."""
  starts = (0, 3, 4, 11, 21)
  x, state = (jax.tree.map(lambda a: np.repeat(a[:1], ROWS, axis=0), tree) for tree in (trial.x, trial.used))
  for row, start in enumerate(starts):  # the last row is unchanged
    x[row, start:] = trial.other[0, start:]
  y = trial.at_once(x, state, ONE).y
  for row, start in enumerate(starts):
    message = f"the output at {{where}} changes when token {start} changes: the layer looks ahead. A convolution needs "
    message += "padding on its left only, a mask must exclude later tokens, a norm or mean over tokens must be a running one"
    yield from trial.differences(1, message, {"y": y[row : row + 1, :start]}, {"y": y[-1:, :start]})
    if np.allclose(y[row, start:], y[-1, start:]):
      yield Violation(1, f"no output changes when all tokens from {start} on change: the layer ignores its input", start)


@_check(2, COMPILED)
def splits(trial: Trial) -> Iterator[Violation]:
  """Calls of any lengths, each continuing the state of the one before, equal one call in outputs and final state."""
  pieces, state, ys = (3, 3, 1, 3, 1, 1, 3, 3, 1, 3), trial.used, []
  for piece in np.split(trial.x, np.cumsum(pieces)[:-1], axis=1):
    y, state = trial.run(trial.params, piece, state)
    ys.append(y)
  whole = trial.at_once(trial.x, trial.used, ONE)
  seen = trial.visible(whole.state)
  actual = {"y": np.concatenate(jax.device_get(ys), axis=1), "state": masked(jax.device_get(state), seen)}
  message = f"calls of {pieces} tokens differ from one call in {{leaf}}, first at {{where}}: the state that the call before it "
  message += "returned does not hold all that is needed to continue (the tail of a convolution, a counter, a partial chunk)"
  yield from trial.differences(2, message, actual, {"y": whole.y, "state": masked(whole.state, seen)})


@_check(3, SHARED)
def documents(trial: Trial) -> Iterator[Violation]:
  """Documents packed in a row have the values and gradients of each alone: a change of `segment_ids` forgets everything."""
  message = "{leaf} of packed documents differs from that of each document alone: where segment_ids change (at {where} or "
  message += "before it), the memory, the convolutions and the positions must start anew, in the gradient too"
  yield from _passes(trial, 3, message, "packed", trial.x, PACKED)


@_check(4, SHARED)
def padding(trial: Trial) -> Iterator[Violation]:
  """Padding left, right and between documents leaves the state untouched and yields zeros, whatever the input holds there."""
  x = trial.x if trial.takes_tokens else np.where(PADDED[..., None] == 0, 1e6, trial.x).astype(trial.x.dtype)
  if not trial.is_model:
    y = trial.at_once(x, trial.used, PADDED).y
    message = "the output at {where} is not zero although its segment id is 0: end with where(segment_ids != 0, y, 0)"
    yield from trial.differences(4, message, {"y": np.where(PADDED[..., None] == 0, y, 0)}, {"y": np.zeros_like(y)})
  message = "{leaf} of padded input (segment id 0) differs from that without padding, first at {where}: padding must not "
  message += "enter the memory, a convolution or a position"
  yield from _passes(trial, 4, message, "padded", x, PADDED)


def _passes(trial: Trial, law: int, message: str, *case: Any) -> Iterator[Violation]:
  """Differences between one call and token-by-token calls; gradients are compared only if values agree."""
  once, token = trial.both_ways(*case)
  values = list(trial.differences(law, message, *({"y": p.y, "state": p.state} for p in (once, token))))
  message = message.replace("{leaf}", "the gradient by {leaf}")
  yield from values or trial.differences(law, message, once.gradients, token.gradients, gradients=True)


@_check(4, COMPILED)
def padded_prompts(trial: Trial) -> Iterator[Violation]:
  """Prompts of different lengths, padded on the right to one batch, are continued as if each were alone."""
  lengths, more = np.array([7, 1, 4, 9, 2, 12])[:, None], 6
  state = trial.at_once(trial.x, trial.fresh, (np.arange(TOKENS) < lengths).astype(np.int32)).state
  row, columns, ys = np.arange(ROWS)[:, None], lengths + np.arange(more), []
  for token in np.split(trial.x[row, columns], more, axis=1):
    y, state = trial.run(trial.params, token, state)
    ys.append(y)
  actual, expected = np.concatenate(jax.device_get(ys), axis=1), trial.at_once(trial.x, trial.fresh, ONE).y[row, columns]
  message = (
    "after prompts padded on the right, the output decoded at {where} differs from that after the prompt alone: the state must "
  )
  message += "be the one after the last real token of each row"
  yield from trial.differences(4, message, {"y": actual}, {"y": expected})


@_check(5, SHARED)
def oracle(trial: Trial) -> Iterator[Violation]:
  """One call equals token-by-token calls of the reference form (if any), in values and all gradients, the state's too."""
  message = "{leaf} of one call differs from that of token-by-token calls, first at {where}"
  yield from _passes(trial, 5, message, "plain", trial.x, ONE)


@_check(5, SHARED)
def fresh_state(trial: Trial) -> Iterator[Violation]:
  """`state=None`, which training uses, equals `initial_state(B)` in values and gradients."""
  nothing, state = trial.from_nothing(trial.x, PACKED), trial.at_once(trial.x, trial.fresh, PACKED)
  seen = trial.visible(state.state)
  message = "{leaf} without a state differs from that with a fresh one, first at {where}: None must mean initial_state(B)"
  values = ({"y": p.y, "state": masked(p.state, seen)} for p in (nothing, state))
  yield from trial.differences(5, message, *values)
  gradients = ({name: p.gradients[name] for name in nothing.gradients} for p in (nothing, state))
  yield from trial.differences(5, f"the gradient by {message}", *gradients, gradients=True)


@_check(6, SHARED)
def rows(trial: Trial) -> Iterator[Violation]:
  """A row of the batch does not depend on the others, in outputs, state and gradients."""
  x, others = trial.x.copy(), np.delete(np.arange(ROWS), 1)
  x[1] = trial.other[1]
  base, changed = trial.at_once(trial.x, trial.used, PACKED), trial.at_once(x, trial.used, PACKED)
  message = "{leaf} of a row changes when row 1 of the batch changes: nothing may be shared, sorted or averaged over axis 0"
  yield from _row_differences(trial, message, others, *({"y": p.y, "state": p.state} for p in (changed, base)))
  gradients = ({k: v for k, v in p.gradients.items() if k != "params"} for p in (changed, base))
  yield from _row_differences(trial, f"the gradient by {message}", others, *gradients, gradients=True)
  if np.allclose(changed.y[1], base.y[1]):
    yield Violation(6, "the output of row 1 does not change when its input does: the layer ignores its input", None, 1)


def _row_differences(trial: Trial, message: str, others: Any, changed: Any, base: Any, **kind: bool) -> Iterator[Violation]:
  for violation in trial.differences(6, message, _rows(changed, others), _rows(base, others), **kind):
    row = None if violation.row is None else int(others[violation.row])
    yield Violation(6, violation.message, violation.token, row, violation.error, violation.tolerance)


@_check(7, TRACED)
def length_shapes(trial: Trial) -> Iterator[Violation]:
  """An input of any length gives one output per token."""
  chunk = getattr(trial.layer, "chunk_size", None) or CHUNK
  for tokens in (1, 3 * chunk + 5):
    x, (y, _) = trial.example(ROWS, tokens), trial.shapes_of(tokens)
    if y.shape[:2] != x.shape[:2]:
      yield Violation(7, f"y has shape {list(y.shape)} for an input {list(x.shape)}; expected one output per token", tokens - 1)


@_check(7, COMPILED)
def lengths(trial: Trial) -> Iterator[Violation]:
  """Calls shorter than a chunk, or of exactly one, without state and segment ids, equal the start of a longer call."""
  for tokens in (2, CHUNK):
    y, state = jax.device_get(trial.run(trial.params, trial.x[:, :tokens]))
    whole = trial.at_once(trial.x, trial.fresh, first(tokens))
    seen = trial.visible(whole.state)
    message = f"{{leaf}} of a call of {tokens} tokens differs from that of the same tokens in a longer call, first at {{where}}"
    actual, expected = {"y": y, "state": masked(state, seen)}, {"y": whole.y[:, :tokens], "state": masked(whole.state, seen)}
    yield from trial.differences(7, message, actual, expected)


@_check(8, COMPILED, float32=True)
def bfloat16(trial: Trial) -> Iterator[Violation]:
  """With bfloat16 activations the output equals float32's within rounding, and the state keeps its dtypes."""
  tokens, long = 17, trial.inputs(2, HOSTILE)
  params, has_dtype = trial.params_of(0.25), has_field(trial.layer, "dtype")
  narrow = trial.layer.clone(dtype=jnp.bfloat16) if has_dtype else trial.layer
  x = long[:, :tokens] if trial.takes_tokens else long[:, :tokens].astype(jnp.bfloat16)
  y, state = jax.jit(narrow.apply)(params, x)
  long[:, :tokens] = x
  expected, *_ = trial.at_length(params, long, trial.fresh_of(2), np.arange(HOSTILE)[None].repeat(2, 0) < tokens)
  message = "{leaf} at {where} differs from float32's by more than rounding: keep sums, norms and memories in float32"
  yield from trial.differences(8, message, {"y": wide(y)}, {"y": wide(expected)[:, :tokens]}, dtype=jnp.bfloat16)
  began = jax.eval_shape(lambda: narrow.apply(params, 2, method="initial_state"))
  if has_dtype and _dtypes(state) != _dtypes(began):
    yield Violation(8, f"the state comes back as {_dtypes(state)}; expected {_dtypes(began)}, as in initial_state")


@_check(9, TRACED)
def equal_shapes(trial: Trial) -> Iterator[Violation]:
  """A second call of equal shapes does not compile again: a returned state has the dtypes and weak types of a fresh one."""
  once = trial.shapes_of(1)[1]
  twice = trial.shapes(trial.example(ROWS, 1), once)[1]
  for before, after in ((trial.fresh_shapes(ROWS), once), (once, twice)):
    for (path, a), b in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(before), strict=True):
      if (a.dtype, a.weak_type) != (b.dtype, b.weak_type):
        kinds = [f"{'weakly typed ' * leaf.weak_type}{leaf.dtype}" for leaf in (b, a)]
        message = f"state{jax.tree_util.keystr(path)} goes in as {kinds[0]} and comes out as {kinds[1]}"
        yield Violation(9, f"{message}: cast it to the dtype that it has in initial_state")
        return


@_check(9, SHARED)
def transformations(trial: Trial) -> Iterator[Violation]:
  """`jit`, `vmap`, `scan`, `checkpoint` and `grad` compose around the layer, which is called on each token."""
  found = trial.both_ways("plain", trial.x, ONE)[1].gradients
  for name, gradient in found.items():
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)):
      yield Violation(9, f"the gradient by {name} through vmap, scan and checkpoint is not finite")


@_check(10, COMPILED, float32=True)
def hostile(trial: Trial) -> Iterator[Violation]:
  """Zero, equal and huge inputs, and strong gates, over 70 tokens give finite outputs and gradients in float32."""
  x, state = trial.inputs(2, HOSTILE), trial.fresh_of(2)
  kinds = {"strong": x, "zero": 0 * x}  # the kinds after "strong" start from the state it left: a full memory
  if not trial.takes_tokens:
    kinds |= {"repeated": x[:, :1] + 1e-3 * x, "huge": 1e4 * x}
  for kind, inputs in kinds.items():
    out = trial.at_length(trial.params_of(30.0 if kind == "strong" else 4.0), inputs, state, np.ones((2, HOSTILE), bool))
    broken = [path for path, leaf in jax.tree.leaves_with_path(out._asdict()) if not np.all(np.isfinite(wide(leaf)))]
    if broken:
      message = f"{jax.tree_util.keystr(broken[0])} is not finite for {kind} inputs: bound the argument of every exp, divide"
      yield Violation(10, f"{message} by a norm plus a small number, and keep memories from growing without bound")
    state = out.state if kind == "strong" and not broken else state


_check(11, COMPILED, devices=4)(law_sharding.automatic_axes)
_check(11, COMPILED, devices=4)(law_sharding.explicit_and_manual_axes)
_check(11, TRACED, devices=4)(law_sharding.explicit_heads)


@_check(12, TRACED)
def numpy_state(trial: Trial) -> Iterator[Violation]:
  """A call accepts a state of NumPy arrays, such as a restored one."""
  state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), trial.fresh_shapes(ROWS))
  jax.eval_shape(lambda params, x: trial.apply(params, x, state), trial.param_shapes, trial.example(ROWS, 3))
  yield from ()


@_check(12, SHARED)
def checkpoint(trial: Trial) -> Iterator[Violation]:
  """A state that Orbax saves and restores is bitwise the same."""
  import orbax.checkpoint as ocp

  with TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "state", trial.used)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "state", trial.used)
  if jax.tree.structure(restored) != jax.tree.structure(trial.used):
    yield Violation(12, f"the state is restored as {jax.tree.structure(restored)}; expected a tree of arrays only")
  elif not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(trial.used), strict=True)):
    yield Violation(12, "the restored state has other values than the saved one")


@_check(13, TRACED)
def mistakes(trial: Trial) -> Iterator[Violation]:
  """A caller's mistake raises a `ValueError` that names the argument, its value and what is expected."""
  x, shape = trial.example(ROWS, TOKENS), jax.ShapeDtypeStruct
  fresh = trial.fresh_shapes(ROWS)
  empty = shape((ROWS, 0, *x.shape[2:]), x.dtype)
  mistakes = [
    ("x without its last axis", trial.input_name, "6", (shape(x.shape[:-1], x.dtype),)),
    ("no tokens", rf"x|{trial.input_name}", "token|0", (empty,)),
    ("segment_ids for 4 tokens", "segment_ids", "6, 4.*6, 22", (x, None, shape((ROWS, 4), np.int32))),
    ("segment_ids of floats", "segment_ids", "float.*int", (x, None, shape((ROWS, TOKENS), np.float32))),
    ("a state of 6 rows for 3", "state", "6.*3", (trial.example(3, TOKENS), fresh)),
    ("another layer's state", "state", "", (x, (shape((ROWS, 3), np.float32),) * 9)),
  ]
  if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(fresh)):
    integers = jax.tree.map(lambda a: shape(a.shape, np.int32), fresh)
    mistakes.append(("a state of integers", "state", "int32", (x, integers)))
  for mistake, name, value, args in mistakes:
    wanted = f"expected a ValueError that names {name.split('|')[-1]}, its value and what is expected"
    try:
      trial.shapes(*args)
      yield Violation(13, f"{mistake}: nothing is raised; {wanted}")
    except Exception as error:
      said = str(error)
      if not isinstance(error, ValueError):
        yield Violation(13, f"{mistake}: {type(error).__name__} is raised; {wanted}")
      elif not all(re.search(p, said) for p in (rf"\b({name})\b", value, "want|expect|must|need|should|use|at least")):
        yield Violation(13, f"{mistake}: the ValueError says {said!r}; {wanted}")


@_check(14, TRACED)
def state_size(trial: Trial) -> Iterator[Violation]:
  """The structure, shapes and dtypes of the state never change, and every leaf has a leading batch axis."""
  few, fresh = trial.fresh_shapes(ROWS - 1), trial.fresh_shapes(ROWS)
  for (path, leaf), other in zip(jax.tree.leaves_with_path(fresh), jax.tree.leaves(few), strict=True):
    if leaf.shape[:1] != (ROWS,) or other.shape != (ROWS - 1, *leaf.shape[1:]):
      name = f"initial_state({ROWS}){jax.tree_util.keystr(path)}"
      yield Violation(14, f"{name} has shape {list(leaf.shape)}; every leaf must have a leading batch axis, of {ROWS} here")
  for tokens in (1, 3 * CHUNK + 5):
    state = trial.shapes_of(tokens)[1]
    if _dtypes(state) != _dtypes(fresh):
      message = f"after {tokens} tokens the state is {_dtypes(state)}, before them {_dtypes(fresh)}: its structure, shapes and"
      yield Violation(14, f"{message} dtypes must not change from call to call; a cache is a ring of a fixed number of slots")
      return


@_check(14, TRACED, float32=True)
def state_bytes(trial: Trial) -> Iterator[Violation]:
  """`state_bytes` returns the size of the state, in the layer's usual dtypes."""
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trial.fresh_shapes(ROWS)))
  for length in (17, 1_000_000):
    said = trial.layer.state_bytes(ROWS, length)
    if said != held:
      yield Violation(14, f"state_bytes({ROWS}, {length}) is {said}; a state of {ROWS} rows takes {held} bytes")
      return


@_check(15, TRACED)
def nnx_shapes(trial: Trial) -> Iterator[Violation]:
  """The layer initialises and runs as a Flax NNX module, twice in a row."""
  from flax import nnx

  def run(x):
    module = nnx.bridge.ToNNX(trial.layer, rngs=nnx.Rngs(0)).lazy_init(x)
    y, state = module(x)
    return y, module(x, state)[0]

  y, more = jax.eval_shape(run, trial.example(2, 5))
  if y.shape != more.shape:
    yield Violation(15, f"under flax.nnx the second call returns shape {list(more.shape)}, the first {list(y.shape)}")


@_check(15, COMPILED)
def nnx_values(trial: Trial) -> Iterator[Violation]:
  """As a Flax NNX module with the same parameters, the layer gives the same outputs."""
  from flax import nnx

  def run(params, x):
    module = nnx.bridge.ToNNX(trial.layer, rngs=nnx.Rngs(0)).lazy_init(x)
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, params["params"])
    nnx.update(module, state)
    return module(x)[0]

  tokens = CHUNK + 1
  y = jax.device_get(jax.jit(run)(trial.params, trial.x[:, :tokens]))
  message = "the output under flax.nnx differs, first at {where}: keep nothing outside the parameters and the state"
  expected = trial.at_once(trial.x, trial.fresh, first(tokens)).y[:, :tokens]
  yield from trial.differences(15, message, {"y": y}, {"y": expected})


@_check(16, COMPILED)
def plasticity(trial: Trial) -> Iterator[Violation]:
  """After `MANY` random tokens of one document, new ones change later outputs as in a fresh one, at initial parameters.

  A layer whose output starts at zero is tried at random parameters.
  """
  if getattr(trial.layer, "fills_up", False):
    return
  half = TOKENS // 2
  other = np.concatenate([trial.other[:, :half], trial.x[:, half:]], axis=1)

  def response(params, state):
    """The change of the outputs of the second half when the tokens of the first half change."""
    y, changed = (trial.at_length(params, x, state, ONE).y[:, half:] for x in (trial.x, other))
    return float(np.sqrt(np.mean(np.square(changed - y))))

  tried = ((params, response(params, trial.fresh)) for params in (trial.initial, trial.params))
  params, fresh = next((each for each in tried if each[1] > 0), (trial.initial, 0.0))
  worn = response(params, trial.after_random(params, MANY))
  if not worn > _LEAST_RESPONSE * fresh:
    message = f"after {MANY:,} random tokens the response to new ones is {worn:.1e}, that of a fresh state {fresh:.1e}: the "
    message += "memory must neither fade to where nothing is learned nor fill up; let it decay towards its start, or bound it, "
    message += "or say that it never forgets, with fills_up = True in its class"
    yield Violation(16, message, None, None, worn, _LEAST_RESPONSE * fresh)
