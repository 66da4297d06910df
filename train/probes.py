"""Probes of a trained model: perplexity by position, a needle by length and depth, speed by length, lifetime of its memory.

`memzoo evaluate RUN --task NAME` runs one of them. A probe returns a table of numbers; `table` and `draw` show it.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.table import Table

from ..zoo import formats
from .data import Corpus, stack_rows
from .files import save_figure, write_text
from .keys import new_key
from .step import score_targets
from .tasks import Needle
from .tasks.data import TaskCorpus
from .tasks.needle import haystack
from .vmapped_runs import score_answers, summed


@dataclass(frozen=True)
class Probe:
  """The result of a probe.

  Attributes:
    name: name of the probe.
    title: a description of the numbers.
    rows, columns: their names.
    values: [rows, columns]; nan where nothing could be measured.
  """

  name: str
  title: str
  rows: list[str]
  columns: list[str]
  values: list[list[float]]

  def save(self, path: Path) -> None:
    """Writes it as JSON."""
    write_text(path, json.dumps(vars(self), indent=1) + "\n")


def perplexity(model: nn.Module, params: Any, corpus: Corpus, *, factor: int = 4, rows: int = 32) -> Probe:
  """Bits per byte of the validation text by position in the document, up to `factor` times the training length.

  If the memory helps, later positions are easier to predict than earlier ones, also beyond the training length.
  """
  length = corpus.data.sequence_length
  split = replace(corpus.validation, sequence_length=factor * length)
  whole = [split[row] for row in range(max(1, len(split) - 1))]
  longest = sorted(whole, key=lambda row: -_longest_document(row["segment_ids"]))[:rows]
  edges = _doublings(factor * length)

  @jax.jit
  def sums(params: Any, row: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits, _ = model.apply(params, row["tokens"], segment_ids=row["segment_ids"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), row["targets"])
    bucket = jnp.searchsorted(jnp.asarray(edges[1:]), row["position"], side="right")
    weights = jnp.where(bucket < len(edges) - 1, row["weights"], 0)
    empty = jnp.zeros(len(edges) - 1, jnp.float32)
    return empty.at[bucket].add(nats * weights, mode="drop"), empty.at[bucket].add(weights, mode="drop")

  nats, tokens = summed(sums(params, stack_rows([row | {"position": _positions(row["segment_ids"])}])) for row in longest)
  with np.errstate(invalid="ignore"):
    bits = nats / tokens / math.log(2) / corpus.validation.bytes_per_token
  names = [f"{low:,} to {high:,}" for low, high in pairwise(edges)]
  values = [[float(b), int(n)] for b, n in zip(bits, tokens, strict=True)]
  title = f"Bits per byte by position in the document (trained on rows of {length:,})"
  return Probe("perplexity", title, names, ["bits per byte", "tokens"], values)


def needle(model: nn.Module, params: Any, data: Any, *, factor: int = 4, examples: int = 32) -> Probe:
  """The share of a pass key's digits that the model predicts right, by length of the text and depth of the key in it."""
  length = max(128, data.sequence_length // 2)
  tests = [Needle(tokens=size) for size in _doublings(factor * data.sequence_length) if size >= length]
  score = jax.jit(partial(score_answers, model, len(tests[0].kinds)))
  columns = {}
  for test in tests:
    keys = jax.random.split(new_key(test.tokens), max(1, examples * test.tokens // 16384))
    make = jax.jit(partial(test.batch, size=math.ceil(examples / len(keys))))
    right, asked = summed(score(params, make(key)) for key in keys)
    columns[f"{test.tokens:,}"] = np.where(asked > 0, right / np.maximum(asked, 1), np.nan)
  values = np.stack(list(columns.values()), axis=1).tolist()
  title = "Digits of a pass key predicted right, by length of the text and depth of the key in it (chance 0.10)"
  return Probe("needle", title, list(tests[0].kinds), list(columns), values)


def speed(model: nn.Module, params: Any, data: Any, *, factor: int = 16) -> Probe:
  """Tokens per second for one sequence, in one pass and token by token, and bytes of its state, by length."""
  from ..pallas_kernels.measure import seconds_per_call

  call = jax.jit(model.apply)
  values, lengths = [], [size for size in _doublings(factor * data.sequence_length) if size >= data.sequence_length]
  for length in lengths:
    tokens = jnp.zeros((1, length), jnp.int32)
    whole = seconds_per_call(partial(call, params, tokens), seconds=1.0, at_least=1)
    _, state = call(params, tokens)
    single = seconds_per_call(partial(call, params, tokens[:, :1], state), seconds=0.3)
    values.append([length / whole, 1 / single, float(model.state_bytes(1, length))])
  columns = ["tokens/s in one pass", "tokens/s one by one", "bytes of state"]
  return Probe("speed", "Speed and state of one sequence by length", [f"{length:,}" for length in lengths], columns, values)


def lifetime(
  model: nn.Module,
  params: Any,
  corpus: Corpus | TaskCorpus,
  *,
  before: Sequence[int] = (0, 500, 5_000, 50_000),
  rows: int = 16,
  piece: int = 500,
) -> Probe:
  """The score on the last tokens of a document by the number of tokens `before` them, which are text or random tokens.

  For a run on text the score is bits per byte of 256 tokens of validation text, for a run on a task the share of right answers
  to its first test (pass keys have text before them, other tasks random tokens only). The last tokens are the same in every
  row. Where a memory learns less after many tokens, scores get worse from row to row.

  Args:
    before: numbers of tokens; text too short for a number leaves its place empty.
    rows: number of documents. A document is one to the model, whatever the text is made of.
    piece: tokens read in one call, which bounds the memory in use.
  """
  make = _answers if isinstance(corpus, TaskCorpus) else _end_of_text
  prefixes, end, score, measure = make(model, corpus, rows, max(before))
  prefixes["random tokens"] = np.random.default_rng(0).integers(0, corpus.data.vocab_size, (rows, max(before)), np.int32)
  read, score = jax.jit(lambda params, tokens, state: model.apply(params, tokens, state)[1]), jax.jit(score)

  def after(prefix: np.ndarray, count: int) -> float:
    longest, state = prefix.shape[1], model.apply(params, rows, method="initial_state")
    if count > longest:
      return math.nan
    for start in range(longest - count, longest, piece):
      state = read(params, prefix[:, start : start + piece], state)
    return float(score(params, end, state))

  values = [[after(prefix, count) for prefix in prefixes.values()] for count in before]
  title = f"{measure}, by the number of tokens of the same document before"
  return Probe("lifetime", title, [f"{count:,}" for count in before], [f"after {name}" for name in prefixes], values)


# Prefixes by name, [rows, at most `before`] each; what follows; its score by params, itself and a state; the score's name.
_Lifetime = tuple[dict[str, np.ndarray], Any, Callable[[Any, Any, Any], jax.Array], str]


def _end_of_text(model: nn.Module, corpus: Corpus, rows: int, before: int) -> _Lifetime:
  text = corpus.validation.tokens
  last = min(256, text.size - 1)
  windows = _windows(text, rows, min(before + last + 1, text.size))
  text, end = np.split(windows, [windows.shape[1] - last - 1], axis=1)

  def bits(params: Any, end: jax.Array, state: Any) -> jax.Array:
    logits, _ = model.apply(params, end[:, :-1], state)
    return score_targets(logits, end[:, 1:])[0].mean() / math.log(2) / corpus.validation.bytes_per_token

  return {"text": text}, end, bits, f"Bits per byte of {last} tokens of text"


def _answers(model: nn.Module, corpus: TaskCorpus, rows: int, before: int) -> _Lifetime:
  task = next(iter(corpus.data.task.tests().values()))
  if task.continuous:
    raise ValueError(f"{task} maps vectors to vectors; expected a run on tokens for --task lifetime.")
  copies = max(1, 16384 // (rows * task.length))  # examples after each document
  example = jax.jit(partial(task.batch, size=rows * copies))(new_key(2**31))
  prefixes = {}
  if isinstance(task, Needle):
    text = haystack(task.sources, task.text_bytes)
    prefixes["text"] = _windows(text, rows, min(before, text.size))

  def right(params: Any, example: Any, state: Any) -> jax.Array:
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), state)
    outputs, _ = model.apply(params, example.tokens, state, example.segment_ids)
    return example.weights.sum(where=score_targets(outputs, example.targets)[1]) / example.weights.sum()

  return prefixes, example, right, f"Share of right answers to {task}"


def _windows(text: np.ndarray, rows: int, length: int) -> np.ndarray:
  """int32 [rows, length], from places spread evenly over the text."""
  starts = np.linspace(0, text.size - length, rows).astype(int)
  return np.stack([text[start : start + length] for start in starts]).astype(np.int32)


PROBES: dict[str, Callable[..., Probe]] = {"perplexity": perplexity, "needle": needle, "speed": speed, "lifetime": lifetime}


def probe(name: str, directory: str | Path, *, best: bool = False, say: Callable[[str], None] = print) -> tuple[Probe, int]:
  """Probes a run's newest or best checkpoint; returns the result and the checkpoint's step.

  Raises:
    ValueError: if there is no such probe, or it is not for a run on such data.
  """
  from .evaluation import load_run, load_run_and_text

  if name not in PROBES:
    raise ValueError(f"--task is {name!r}; expected one of {', '.join(PROBES)}.")
  if name in ("perplexity", "lifetime"):
    experiment, params, step, corpus = load_run_and_text(directory, best=best, say=say)
  else:
    (experiment, params, step), corpus = load_run(directory, best=best, say=say), None
  if name != "lifetime" and not hasattr(experiment.data, "sources"):
    raise ValueError(f"{directory} was trained on {experiment.data.task}; expected a run on text for --task {name}.")
  if name == "needle" and experiment.data.tokenizer != "bytes":
    raise ValueError(f"TextData.tokenizer is {experiment.data.tokenizer!r}; expected 'bytes' for --task needle.")
  return PROBES[name](experiment.model, params, corpus or experiment.data), step


def table(found: Probe) -> Table:
  """The result as a table for the screen."""
  rows = [(name, *map(_cell, found.columns, values)) for name, values in zip(found.rows, found.values, strict=True)]
  return formats.table(found.title, ("", *found.columns), rows)


def _cell(column: str, value: float) -> str:
  if math.isnan(value):
    return ""
  if column == "bytes of state":
    return formats.binary(int(value))
  return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def draw(found: Probe, path: Path) -> None:
  """Draws the result: a map for needles, otherwise a curve for each column that is not a count."""
  from matplotlib.figure import Figure

  values = np.array(found.values)
  figure = Figure(figsize=(8, 4), layout="constrained")
  if found.name == "needle":
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(found.columns)), found.columns)
    axes.set_yticks(range(len(found.rows)), found.rows)
    axes.set(xlabel="bytes of text")
    figure.colorbar(image, label="digits right")
  else:
    shown = [i for i, name in enumerate(found.columns) if name != "tokens"]
    for axes, column in zip(np.ravel(figure.subplots(1, len(shown), squeeze=False)), shown, strict=True):
      axes.plot(range(len(found.rows)), values[:, column], "o-", markersize=4)
      axes.set_xticks(range(len(found.rows)), found.rows, rotation=60, size=7)
      axes.set(ylabel=found.columns[column])
      axes.grid(alpha=0.25)
  figure.suptitle(found.title, size=10)
  save_figure(figure, path)


def _doublings(end: int) -> list[int]:
  """0, 16, 32, ..., doubling up to `end`, which comes last."""
  return [0, *(16 * 2**i for i in range(64) if 16 * 2**i < end), end]


def _positions(segment_ids: np.ndarray) -> np.ndarray:
  """The position of each token within its document in the row, int32 [T]."""
  starts = np.flatnonzero(np.diff(segment_ids, prepend=-1))
  return (np.arange(len(segment_ids)) - np.repeat(starts, np.diff([*starts, len(segment_ids)]))).astype(np.int32)


def _longest_document(segment_ids: Sequence[int]) -> int:
  return int(np.bincount(segment_ids)[1:].max(initial=0))
