"""What a run's memories do over one document, as a section of a report: computed from a checkpoint and the validation text.

Each picture is made from one function of `zoo/inspect.py` and shows every layer that the function knows; a table says for each
kind of layer which pictures show it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..layers.mixture_of_memories import MixtureOfMemories
from ..layers.swiglu import SwiGLU
from ..zoo import inspect
from ..zoo.generate import as_text
from ..zoo.stack import sublayer_names
from .data import stack_rows
from .evaluation import load_run_and_text
from .html_figures import Line, heatmap, panel
from .html_parts import Section, grid, heading, note, paragraph, shaded_text, table

TOKENS = 512  # the longest document
_ROWS = 64  # of the validation text, among which the longest document is taken
_LOOKS = 32  # at the matrices over a document
_BLOCKS = 8  # the most lines in a panel
_GATE_ROWS = 48  # the most rows of a map of gates; with more, heads are averaged

_LABELS = 12  # the most blocks that such a map names

_GATES = {
  "beta": "write strength",
  "write_gate": "write strength",
  "theta": "step size of a write",
  "decay": "share kept",
  "keep": "share kept",
  "gamma": "erase strength",
  "erase_gate": "erase strength",
}
_WRITES = ("/beta", "/write_gate", "/theta")


class Document(NamedTuple):
  """A document of the validation text, or an example of the task: [1, T] each."""

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray


class Seen(NamedTuple):
  """What a function of `inspect` has found: pictures, and the names ("block 0/memory", ...) of what they show."""

  pictures: list[str]
  names: list[str]


def memory_section(directory: Path, best: bool = False) -> Section:
  """The section of a run. What keeps it from being made is a line in it."""
  messages: list[str] = []
  try:
    experiment, params, step, corpus = load_run_and_text(directory, best=best, say=messages.append)
  except (ValueError, OSError) as error:
    return Section("Memory over a document", [*map(note, messages), note(f"Nothing is drawn: {error}")])
  document = longest_document(corpus.validation_batches(max(1, _ROWS // experiment.data.batch_size)))
  length = document.tokens.shape[1]
  intro = f"The checkpoint of step {step} reads {length} tokens of a document of the validation data, with a fresh memory."
  found = _draw_all(messages, experiment.model, params, jnp.asarray(document.tokens))
  figures = [picture for seen in found.values() for picture in seen.pictures]
  parts = [paragraph(intro), *map(note, messages), _who_is_drawn(experiment.model, found), grid(figures)]
  return Section("Memory over a document", [*parts, *_text(experiment, params, document)])


def longest_document(batches: list[dict[str, np.ndarray]], most: int = TOKENS) -> Document:
  """The longest document in a row of `batches`, cut to `most` tokens."""
  rows = stack_rows([row for batch in batches for row in _rows(batch)])
  ids = rows["segment_ids"]
  best = (0, 0, 0)  # length, row, start
  for row, own in enumerate(ids):
    edges = np.flatnonzero(np.diff(own, prepend=-1, append=-1))
    best = max(best, *((int(end - start), row, int(start)) for start, end in pairwise(edges) if own[start]), best)
  length, row, start = best
  part = slice(start, start + min(length, most))
  return Document(*(rows[name][row : row + 1, part] for name in ("tokens", "targets", "weights")))


def _rows(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
  return ({name: values[i] for name, values in batch.items()} for i in range(len(batch["tokens"])))


def _draw_all(messages: list[str], *call: Any) -> dict[str, Seen]:
  """What each function has found; a failure is a line in `messages`."""
  found = {}
  for name, draw in _DRAWN.items():
    try:
      found[name] = draw(*call)
    except Exception as error:  # layers of the user's own may raise anything
      found[name] = Seen([], [])
      messages.append(f"Not drawn: {name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
  return found


def _found(look: Callable[[], Any]) -> Any:
  """`look()`, or nothing if the model has no layer that it is about."""
  try:
    return look()
  except ValueError as error:
    if " has no " not in str(error):
      raise
    return None


def _draw_matrices(model: Any, params: Any, tokens: jax.Array) -> Seen:
  every = max(1, tokens.shape[1] // _LOOKS)
  curves = _found(lambda: inspect.curves_over_time(model, params, tokens, every=every))
  if curves is None:
    return Seen([], [])
  what = (("how much is stored", "Frobenius norm"), ("directions in use", "effective rank"))
  pictures = []
  for (title, label), values in zip(what, curves[1:], strict=True):
    for name, by_block in _merged(values).items():
      lines = [Line(place, curves.times, y, colour) for colour, (place, y) in _spread(by_block)]
      labels = {"xlabel": "tokens read", "ylabel": label}
      pictures.append(panel(f"{name}: {title}", lines, **labels, ylim=(0, None), caption=_left(by_block)))
  return Seen(pictures, list(curves.norm))


def _merged(values: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
  """Curves [N] by name of the matrix and by block: means over rows and heads, and over matrices that differ in a number."""
  found: dict[str, dict[str, list[np.ndarray]]] = {}
  for name, value in values.items():
    place, _, own = name.rpartition("/")
    stem, _, number = own.rpartition("_")
    key = f"{stem}, mean of all" if stem and number.isdigit() else own
    found.setdefault(key, {}).setdefault(place, []).append(np.asarray(value, np.float64).mean(axis=(1, 2)))
  return {key: {place: np.mean(curves, axis=0) for place, curves in by_block.items()} for key, by_block in found.items()}


def _spread(by_block: dict[str, Any]) -> list[tuple[int, tuple[str, Any]]]:
  """At most `_BLOCKS` of the lines, evenly spread over the depth, each with the number of its colour."""
  names = list(by_block)
  chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), _BLOCKS)).round().astype(int))
  return list(enumerate((names[i], by_block[names[i]]) for i in chosen))


def _left(by_block: dict[str, np.ndarray]) -> str:
  return f"{_BLOCKS} of {len(by_block)} blocks." if len(by_block) > _BLOCKS else ""


def _draw_gates(model: Any, params: Any, tokens: jax.Array) -> Seen:
  gates = _found(lambda: inspect.gates(model, params, tokens)) or {}
  kinds: dict[str, dict[str, np.ndarray]] = {}
  for name, value in gates.items():
    place, _, kind = name.rpartition("/")
    by_head = np.asarray(value[0], np.float64)
    kinds.setdefault(kind, {})[place] = by_head.reshape(*by_head.shape[:2], -1).mean(axis=-1).T  # [H, T]
  pictures, layers = [], (layer for i in range(model.depth) for layer in model.block(i))
  heads = "head of each memory" if any(isinstance(layer, MixtureOfMemories) for layer in layers) else "head"
  for kind, by_block in kinds.items():
    averaged = sum(map(len, by_block.values())) > _GATE_ROWS
    if averaged:
      by_block = {place: value.mean(axis=0, keepdims=True) for place, value in by_block.items()}
    every = -(-len(by_block) // _LABELS)
    rows = [place * (i == 0 and n % every == 0) for n, (place, value) in enumerate(by_block.items()) for i in range(len(value))]
    caption = f"A row for each {'block, the mean over its heads' if averaged else heads}."
    title = f"{_GATES[kind]} ({kind})" if kind in _GATES else f"gate {kind}"
    pictures.append(heatmap(title, np.concatenate([*by_block.values()]), rows, xlabel="token", caption=caption))
  return Seen(pictures, list(gates))


def _draw_retention(model: Any, params: Any, tokens: jax.Array) -> Seen:
  every = max(1, tokens.shape[1] // _LOOKS)
  found = _found(lambda: inspect.retention(model, params, tokens, every=every)) or {}
  if not found:
    return Seen([], [])
  lines, floors = [], []
  for colour, (name, one) in _spread(found):
    lags, cosine, _, floor = inspect.by_lag(one)
    seen = lags < 0.75 * one.cosine.shape[2]  # there are few writes of a greater age
    lines.append(Line(name.rpartition("/")[0], *_by_age(1 + lags[seen], cosine[seen].mean(axis=1)), colour))
    label = "floor: any value" if not floors else ""
    floors.append(Line(label, *_by_age(1 + lags[seen], floor[seen].mean(axis=1)), colour, "dotted"))
  caption = "Cosine of what a token's key reads later and of what the token wrote. Only what lies above the floor is memory."
  labels = {"xlabel": "tokens since the write", "ylabel": "cosine"}
  return Seen([panel("how long a write lasts", [*lines, *floors], **labels, caption=caption, xscale="log")], list(found))


def _by_age(ages: np.ndarray, values: np.ndarray, count: int = 24) -> tuple[np.ndarray, np.ndarray]:
  """Means of the values of similar age, in at most `count` groups whose ages grow by a factor."""
  edges = np.unique(np.geomspace(1, ages[-1] + 1, count + 1).astype(int))
  group = np.searchsorted(edges, ages, side="right")
  in_groups = [(ages[group == g].mean(), values[group == g].mean()) for g in np.unique(group)]
  return np.array([age for age, _ in in_groups]), np.array([value for _, value in in_groups])


def _draw_routing(model: Any, params: Any, tokens: jax.Array) -> Seen:
  found = _found(lambda: inspect.routing(model, params, tokens)) or {}
  if not found:
    return Seen([], [])
  widest = max(value.shape[-1] for value in found.values())
  shares = np.full((len(found), widest), np.nan)
  for row, value in zip(shares, found.values(), strict=True):
    row[: value.shape[-1]] = np.asarray(value, np.float64).mean(axis=0)
  columns = [str(i) for i in range(widest)] if widest <= 16 else []
  rows, caption = [name.rpartition("/")[0] for name in found], "The share of tokens that each gets."
  labels = {"xlabel": "memory or expert", "columns": columns, "caption": caption}
  return Seen([heatmap("where tokens are sent", shares, rows, **labels)], list(found))


def _draw_inner_losses(model: Any, params: Any, tokens: jax.Array) -> Seen:
  found = _found(lambda: inspect.inner_losses(model, params, tokens)) or {}
  if not found:
    return Seen([], [])
  lines, width = [], max(1, tokens.shape[1] // 32)
  for colour, (place, one) in _spread(found):
    before, after = (_moving_mean(np.asarray(values[0], np.float64).mean(axis=-1), width) for values in one)
    x = np.arange(len(before)) + width
    lines.append(Line(f"{place}, before", x, before, colour))
    if np.isfinite(after).any():
      lines.append(Line("after the write" if colour == 0 else "", x, after, colour, "dashed"))
  caption = f"The memory's own error on each token, before and after it learns the token; means over {width} tokens."
  labels = {"xlabel": "token", "ylabel": "inner loss"}
  return Seen([panel("learning at test time", lines, **labels, caption=caption, ylim=(0, None))], list(found))


def _draw_distances(model: Any, params: Any, tokens: jax.Array) -> Seen:
  found = _found(lambda: inspect.distances(model, params, tokens)) or {}
  if not found:
    return Seen([], [])
  width = max(1, tokens.shape[1] // 32)
  lines = []
  for colour, (name, value) in _spread(found):
    y = _moving_mean(np.asarray(value[0], np.float64).mean(axis=-1), width)
    lines.append(Line(name.rpartition("/")[0], np.arange(len(y)) + width, y, colour))
  caption = f"Squared Mahalanobis distance of each query from the keys that it attends to; means over {width} tokens."
  labels = {"xlabel": "token", "ylabel": "squared distance"}
  return Seen([panel("how far queries are from keys", lines, **labels, caption=caption, ylim=(0, None))], list(found))


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
  return np.convolve(values, np.full(width, 1 / width), mode="valid")


_DRAWN: dict[str, Callable[[Any, Any, jax.Array], Seen]] = {
  "matrices": _draw_matrices,
  "gates": _draw_gates,
  "writes": _draw_retention,
  "routing": _draw_routing,
  "learning": _draw_inner_losses,
  "distances": _draw_distances,
}


def _text(experiment: Any, params: Any, document: Document) -> list[str]:
  """The document, shaded where the model finds it hard to predict, and where memories write most."""
  if not np.issubdtype(document.tokens.dtype, np.integer):
    return []
  decode = getattr(experiment.data, "decode", None)
  pieces = list(_pieces(document.tokens[0].tolist(), decode))
  bits, most = _bits(experiment.model, params, document), math.log2(experiment.model.vocab_size)
  if decode:
    bits = np.concatenate([[0.0], bits[:-1]])  # of each token, not of the one after it
  parts = [
    heading("What the model finds hard to predict"),
    paragraph(f"A background is the stronger the more bits the token takes: none at 0, the strongest at {most:.3g}.", "faint"),
    shaded_text((text, float(bits[part].max()) / most) for text, part in pieces),
  ]
  gates = _found(lambda: inspect.gates(experiment.model, params, jnp.asarray(document.tokens))) or {}
  strengths = [np.asarray(value[0], np.float64).mean(axis=-1) for name, value in gates.items() if name.endswith(_WRITES)]
  if strengths:
    mean = np.mean(strengths, axis=0)
    low, high = mean.min(), mean.max()
    parts += [
      heading("Where memories write most"),
      paragraph(f"Mean write strength of all heads, from {low:.3g} (no background) to {high:.3g} (the strongest).", "faint"),
      shaded_text((text, float(mean[part].mean() - low) / (high - low or 1)) for text, part in pieces),
    ]
  return parts


def _bits(model: Any, params: Any, document: Document) -> np.ndarray:
  """Bits of the target at each position, [T]; 0 where there is none."""
  logits, _ = jax.jit(model.apply)(params, jnp.asarray(document.tokens))
  nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.asarray(document.targets))
  return np.asarray(nats[0], np.float64) * document.weights[0] / math.log(2)


def _pieces(tokens: list[int], decode: Callable[[list[int]], str] | None) -> Iterator[tuple[str, slice]]:
  """The text of `tokens` in pieces of whole characters, each with its tokens; without `decode` their numbers."""
  if decode is None:
    yield from ((f"{token} ", slice(i, i + 1)) for i, token in enumerate(tokens))
    return
  taken = 0

  def counted() -> Iterator[int]:
    nonlocal taken
    for token in tokens:
      taken += 1
      yield token

  start = 0
  for text in as_text(counted(), decode):
    yield text, slice(start, taken)
    start = taken


def _who_is_drawn(model: Any, found: dict[str, Seen]) -> str:
  """A table of the kinds of layers, with the pictures that show them."""
  blocks: dict[str, list[int]] = {}
  drawn: dict[str, set[str]] = {}
  for i in range(model.depth):
    layers = dict(zip(sublayer_names(model.block(i)), model.block(i), strict=True))
    for name, layer in layers.items():
      if not isinstance(layer, SwiGLU):
        kind = type(layer).__name__
        blocks.setdefault(kind, []).append(i)
        shown = {what for what, seen in found.items() if any(_owner(of, layers) == (i, name) for of in seen.names)}
        drawn.setdefault(kind, set()).update(shown)
  rows = (
    (kind, _in_short(numbers), ", ".join(what for what in found if what in drawn[kind]) or _NOTHING)
    for kind, numbers in blocks.items()
  )
  return table(("layer", "blocks", "drawn"), rows, words=3)


_NOTHING = "nothing: it has no matrix, gate or routing to show"


def _owner(name: str, sublayers: Iterable[str]) -> tuple[int, str]:
  """The block and the sublayer of "block 2/memory" (its "mixer") or of "block 2/mixer_1/beta"."""
  block, _, rest = name.partition("/")
  sublayer = rest.partition("/")[0]
  return int(block.removeprefix("block ")), sublayer if sublayer in sublayers else "mixer"


def _in_short(numbers: list[int]) -> str:
  """"0, 2, 4", or "0 to 9" for numbers that follow each other."""
  numbers = list(dict.fromkeys(numbers))
  if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
    return f"{numbers[0]} to {numbers[-1]}"
  return ", ".join(map(str, numbers))
