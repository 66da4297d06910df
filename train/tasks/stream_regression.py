"""Regression at test time, without training: what attention and two linear models make of a stream whose map changes.

    python -m memzoo.train.tasks.stream_regression --out runs/stream_regression

The operations read the tokens of `Regression` themselves: keys and values so far are the data, the next key is the query. Each
method is local linear attention in a limit: without a slope it is softmax attention, with equal weights a global linear model.
The scale of the weights and the ridge are chosen on other streams. Source of the experiment: Zuo et al. 2025, arXiv:2510.01450,
section 5. Its text leaves the keys open; here those of a piece lie around a centre of their own, see `Regression.centre`.
"""

import argparse
import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...pallas_kernels.local_linear import local_linear_attention
from ...zoo.formats import markdown
from ..files import save_figure
from ..keys import new_key
from .regression import Regression

STREAM = Regression(tokens=1024, piece=128, key_dim=16, value_dim=16, centre=1.0)
PIECES, WIDTHS, SEEDS, ROWS = (64, 128, 256, 1024), (8, 16, 32), 3, 8
_SCALES, _RIDGES = (4.0, 8.0, 16.0, 32.0, 64.0), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Method:
  """A way to predict values: local linear attention with one of these scales and ridges, of unit keys."""

  name: str
  scales: tuple[float, ...]
  ridges: tuple[float, ...]
  slope: bool = True


METHODS = (
  Method("softmax attention", _SCALES, (1.0,), slope=False),
  Method("global linear model", (0.0,), _RIDGES),
  Method("local linear attention", _SCALES, _RIDGES),
)


def errors(task: Regression, method: Method, seed: int, scale: float, ridge: float, rows: int = ROWS) -> np.ndarray:
  """Mean squared error [pieces, piece - 1] of each answer over `rows` streams; the last token of a piece asks nothing."""
  return np.asarray(_errors(task, method.slope, rows, new_key(seed), scale, ridge))[:, :-1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _errors(task: Regression, slope: bool, rows: int, key: jax.Array, scale: jax.Array, ridge: jax.Array) -> jax.Array:
  example = task.batch(key, rows)
  cuts = task.key_dim, task.key_dim + task.value_dim
  k, v, q = (x[:, :, None] for x in jnp.split(example.tokens, cuts, axis=-1))
  root = jnp.sqrt(jnp.maximum(scale, 1e-6))  # by the lengths of keys, because the operation's own scale is static
  solver = {} if slope else {"solver": "cg", "iterations": 0}
  y = local_linear_attention(root * q, root * k, v, jnp.full(1, ridge * root**2), scale=1.0, **solver)[:, :, 0]
  return jnp.mean((y - example.targets) ** 2, axis=(0, -1)).reshape(-1, task.piece)


def tuned(task: Regression, method: Method, rows: int = ROWS) -> tuple[float, float]:
  """The scale and the ridge with the least error on streams of their own."""
  return min(
    itertools.product(method.scales, method.ridges), key=lambda setting: errors(task, method, 1000, *setting, rows).mean()
  )


def measure(task: Regression, seeds: int = SEEDS, rows: int = ROWS) -> dict[str, np.ndarray]:
  """Errors [seeds, pieces, piece - 1] of each method."""
  found = {}
  for method in METHODS:
    setting = tuned(task, method, rows)
    found[method.name] = np.stack([errors(task, method, seed, *setting, rows) for seed in range(seeds)])
  return found


def table(found: dict[int, dict[str, np.ndarray]]) -> str:
  """Markdown: errors in the first piece and the later ones, over the places of a piece, mean of the seeds."""
  rows = []
  for piece, by_method in found.items():
    for name, error in by_method.items():
      parts = [error[:, :1], error[:, 1:]] if error.shape[1] > 1 else [error]
      cells = [f"{part.mean():.3f}" for part in parts for part in (part[..., : piece // 8], part[..., piece // 2 :])]
      rows.append([str(piece), name, *cells])
  columns = ["piece", "method", "first piece, first eighth", "last half", "later pieces, first eighth", "last half"]
  return markdown(columns, rows, words=2)


def ratios(found: dict[int, dict[str, np.ndarray]]) -> str:
  """Markdown: the error of each method as a multiple of local linear attention's, with the range over seeds."""
  names, rows = [method.name for method in METHODS[:-1]], []
  for width, by_method in found.items():
    total = {name: error.mean(axis=(1, 2)) for name, error in by_method.items()}
    by_seed = [total[name] / total[METHODS[-1].name] for name in names]
    rows.append([str(width), *(f"{ratio.mean():.1f} ± {np.ptp(ratio) / 2:.1f}" for ratio in by_seed)])
  return markdown(["channels", *names], rows, words=0)


def draw(found: dict[int, dict[str, np.ndarray]]) -> Any:
  """A panel for each length of pieces: errors over the places of a piece; dashed in the first piece, with bands over seeds."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(3.2 * len(found) + 1, 3.4), layout="constrained")
  panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
  for axes, (piece, by_method) in zip(panels, found.items(), strict=True):
    places = np.arange(1, piece)
    for i, (name, error) in enumerate(by_method.items()):
      axes.plot(places, _smooth(error[:, 0].mean(axis=0)), "--", color=f"C{i}", linewidth=1)
      if error.shape[1] > 1:
        later = error[:, 1:].mean(axis=1)
        axes.plot(places, _smooth(later.mean(axis=0)), color=f"C{i}", label=name)
        axes.fill_between(places, _smooth(later.min(axis=0)), _smooth(later.max(axis=0)), color=f"C{i}", alpha=0.2, linewidth=0)
    axes.set(title=f"a new map every {piece} tokens", xlabel="tokens since the change", xscale="log", yscale="log")
    axes.grid(alpha=0.25)
  panels[0].set_ylabel("squared error")
  figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, title="dashed: first piece")
  return figure


def _smooth(values: np.ndarray) -> np.ndarray:
  """Means over neighbours, about an eighth of the distance from the start, so that a logarithmic axis shows even noise."""
  total = np.concatenate([[0.0], np.cumsum(values)])
  place = np.arange(values.size)
  low, high = np.maximum(0, place - place // 16), np.minimum(values.size, place + place // 16 + 1)
  return (total[high] - total[low]) / (high - low)


def main() -> None:
  """Prints both tables and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", type=Path, default=Path("runs/stream_regression"), help="folder of the picture")
  out = parser.parse_args().out
  by_piece = {}
  for piece in PIECES:
    by_piece[piece] = measure(replace(STREAM, piece=piece))
  print(table(by_piece), flush=True)
  print(ratios({width: measure(replace(STREAM, key_dim=width, value_dim=width)) for width in WIDTHS}))
  out.mkdir(parents=True, exist_ok=True)
  save_figure(draw(by_piece), out / "errors.png")
  print(f"\nwritten: {out / 'errors.png'}")


if __name__ == "__main__":
  main()
