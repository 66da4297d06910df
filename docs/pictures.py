"""Pictures of every layer's memory at work, for the pages of the layers.

    python docs/pictures.py                    # all layers of the registry; twenty minutes on two cores
    python docs/pictures.py DeltaNet Mamba     # some of them
    python docs/pictures.py Yaad --steps 400 --rates 0.01

For each layer a small model is trained on recall: six pairs of a key and a value, then each key once, which asks for its value.
`memzoo.zoo.inspect` then reads an example with it. The pictures are kept in `docs/pictures/` because training them takes longer
than the rest of the site; `pictures.json` there says what each shows and how well its model answers.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from memzoo.train.compare import Budget, VmappedRuns, enter
from memzoo.train.config import groups_of
from memzoo.train.runtime import start_quietly
from memzoo.zoo import inspect
from memzoo.zoo import inspect_figures as figures
from memzoo.zoo.registry import LAYERS

FOLDER = Path(__file__).parent / "pictures"
VOCABULARY, PAIRS = 32, 6
SETTINGS = [
  "MultiQueryRecall.filler=False",
  f"MultiQueryRecall.vocabulary={VOCABULARY}",
  f"MultiQueryRecall.pairs={PAIRS}",
  f"MultiQueryRecall.tokens={4 * PAIRS}",
  "heads=1",
  "size=32",
  "Gating.step_bias=0.0",  # keys are distinct: memories that learn at test time may take longer steps
  "Optimizer.warmup_steps=40",
  # Only a few tokens of attention where it stands beside a memory, so that the memory has work to do.
  "Based.window=None",
  "MemoryAsGate.window=8",
  "MemoryAsLayer.window=8",
  "MemoryAsContext.segment=8",
]
STEPS, RATES = 800, "0.003,0.01"  # at most; the better of the learning rates is shown
PICTURES = 3  # of each layer, at most


class Kind(NamedTuple):
  """A kind of picture.

  Attributes:
    name: part of the file's name.
    caption: what it shows.
    draw: (model, params, example) -> a figure; raises `ValueError` for a model without what it shows.
  """

  name: str
  caption: str
  draw: Callable[[Any, Any, Any], Figure]


def draw_inner_losses(found: dict[str, inspect.InnerLoss]) -> Figure:
  """The mean error of memories that learn at test time on each token, before and after they write it, at each position."""
  figure = Figure(figsize=(7.5, 1.9 * len(found) + 0.7), layout="constrained")
  for ax, (name, loss) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True):
    for label, error in zip(("before", "after"), loss, strict=True):
      mean = np.asarray(error).mean(axis=(0, 2))
      if np.isfinite(mean).all():
        ax.plot(1 + np.arange(mean.size), mean, label=f"{label} the token is written")
    ax.set(title=name, xlabel="tokens read", ylabel="inner loss", xlim=(1, None), ylim=(0, None))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
  return figure


def _read(function: Callable, draw: Callable, rows: int = 8) -> Callable[[Any, Any, Any], Figure]:
  """Draws what `function` finds in the example's first `rows`."""

  def picture(model, params, example):
    return draw(function(model, params, example.tokens[:rows], segment_ids=example.segment_ids[:rows]))

  return picture


def _retention(model, params, example):
  tokens = np.asarray(example.tokens[0])
  labels = [f"{'key' if token < VOCABULARY // 2 else 'value'} {token % (VOCABULARY // 2)}" for token in tokens]
  found = inspect.retention(model, params, example.tokens[:1], segment_ids=example.segment_ids[:1])
  return figures.draw_retention(found, labels=labels)


def _recall(model, params, example):
  return figures.draw_recall(inspect.recall(model, params, example), chance=1 / PAIRS)


# A layer gets the first of these that apply to it; all can have the last one.
KINDS = [
  Kind("routing", "The share of tokens that each memory gets.", _read(inspect.routing, figures.draw_routing)),
  Kind(
    "inner_losses",
    "The error of the memory on each token, before and after it learns the token.",
    _read(inspect.inner_losses, draw_inner_losses, rows=64),
  ),
  Kind(
    "retention",
    "How much of each written value its key still reads, later in one example.",
    _retention,
  ),
  Kind("distances", "How far queries lie from the keys that they attend to.", _read(inspect.distances, figures.draw_gates)),
  Kind(
    "curves",
    "How much the memory stores, and how many directions it spans.",
    _read(lambda *args, **options: inspect.curves_over_time(*args, every=1, **options), figures.draw_curves),
  ),
  Kind("gates", "The values that its gates take.", _read(inspect.gates, figures.draw_gates)),
  Kind("recall", "Right answers by the distance from a written value to the query.", _recall),
]


def pictures(model: Any, params: Any, example: Any) -> Iterator[tuple[Kind, Figure]]:
  """The first `PICTURES` kinds that apply to a model."""
  left = PICTURES
  for kind in KINDS:
    try:
      figure = kind.draw(model, params, example)
    except ValueError:  # the model has none of what this kind shows
      continue
    yield kind, figure
    left -= 1
    if not left:
      return


def trained(name: str, budget: Budget) -> tuple[Any, Any, Any, float, int]:
  """A model with the layer `name`: model, parameters, an example of 256 rows, its share of right answers, steps."""
  (entrant,) = enter("mqar", [name], [line for line in SETTINGS if _concerns(line, name)])
  runs, task = VmappedRuns(entrant, budget), max(entrant.task.tests().values(), key=lambda test: test.pairs)
  while runs.step < budget.steps:
    runs.train(runs.step + budget.evaluate_every)
    if runs.score(task).max() >= budget.stop_at:
      break
  scores = runs.score(task).ravel()
  params = jax.tree.map(lambda leaf: leaf[int(scores.argmax())], runs.state.params)
  return entrant.experiment.model, params, task.batch(jax.random.key(7), 256), float(scores.max()), runs.step


def _concerns(setting: str, name: str) -> bool:
  """Whether a setting is for every model, or for this layer or a group of its options."""
  bound = setting.partition(".")[0]
  groups = {group for layer in LAYERS.values() for group in groups_of(layer)}
  return bound not in LAYERS.keys() | groups or bound in {name, *groups_of(LAYERS[name])}


def save(figure: Figure, path: Path) -> None:
  """Writes a PNG of few colours, which takes a quarter of the bytes."""
  from PIL import Image

  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=100)
  image = Image.open(buffer).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
  image.save(path, optimize=True)


def main() -> None:
  """Draws and saves the pictures of the layers on the command line, of all without names."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("layers", nargs="*", default=list(LAYERS), metavar="LAYER")
  parser.add_argument("--steps", type=int, default=STEPS, help="the largest number of training steps")
  parser.add_argument("--rates", default=RATES, help="learning rates, separated by commas")
  given = parser.parse_args()
  if unknown := [name for name in given.layers if name not in LAYERS]:
    parser.error(f"LAYER is {unknown[0]!r}; expected some of {', '.join(LAYERS)}.")
  start_quietly()
  rates = tuple(float(rate) for rate in given.rates.split(","))
  budget = Budget(rates, seeds=1, steps=given.steps, batch_size=32, stop_at=0.98, evaluate_every=50)
  changed = [f"--steps {given.steps}"] if given.steps != STEPS else []
  changed += [f"--rates {given.rates}"] if given.rates != RATES else []
  for name in given.layers:
    draw(name, budget, " ".join([f"python docs/pictures.py {name}", *changed]))


def draw(name: str, budget: Budget, command: str) -> None:
  """Trains a layer, and writes its pictures and its entry in the index."""
  model, params, example, score, steps = trained(name, budget)
  for old in FOLDER.glob(f"{name}-*.png"):
    old.unlink()
  shown = {}
  for kind, figure in pictures(model, params, example):
    save(figure, FOLDER / f"{name}-{kind.name}.png")
    shown[kind.name] = kind.caption
  index = FOLDER / "pictures.json"
  known = json.loads(index.read_text()) if index.exists() else {}
  known[name] = {"right": round(score, 2), "steps": steps, "command": command, "pictures": shown}
  index.write_text(json.dumps({each: known[each] for each in LAYERS if each in known}, indent=1) + "\n")
  print(f"{name}: {score:.2f} right after {steps} steps; {', '.join(shown)}", flush=True)


if __name__ == "__main__":
  main()
