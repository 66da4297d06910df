"""Pictures of the results of `inspect.py` and `fidelity.py`.

Each function returns a `matplotlib.figure.Figure`; nothing is shown or saved. Figures are made without pyplot, which keeps
global state. `figure.savefig("memory.png")` writes one; a notebook shows one that is the last value of a cell, after
`%matplotlib inline`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .fidelity import LayerFidelity, TokenFidelity
from .inspect import Curves, Recall, Retention, by_distance, by_lag

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_COLOURS = "viridis"


def draw_curves(curves: Curves) -> "Figure":
  """Norm and effective rank of each memory against tokens read: the mean over rows and heads, and faint lines for heads."""
  figure, axes = _figure(1, 2, (11, 3.6), sharex=True)
  titles = ("how much is stored", "how many directions it spans")
  for ax, values, title, label in zip(axes[0], curves[1:], titles, ("Frobenius norm", "effective rank"), strict=True):
    for (name, value), colour in zip(values.items(), _shades(len(values)), strict=True):
      heads = np.asarray(value).mean(axis=1)
      ax.plot(curves.times, heads, color=colour, alpha=0.25, linewidth=0.8)
      ax.plot(curves.times, heads.mean(axis=1), color=colour, label=name)
    ax.set(title=title, xlabel="tokens read", ylabel=label, xlim=(0, curves.times[-1]), ylim=(0, None))
    ax.grid(alpha=0.25)
  _name_lines(figure, axes[0, 1])
  return figure


def draw_gates(values: dict[str, np.ndarray], bins: int = 40) -> "Figure":
  """A histogram for each gate over tokens and heads: a row of panels for each place, a column for each kind of gate."""
  split = {name: name.rpartition("/") for name in values}
  places = list(dict.fromkeys(place for place, _, _ in split.values()))
  kinds = list(dict.fromkeys(kind for _, _, kind in split.values()))
  figure, axes = _figure(len(places), len(kinds), (3.2 * len(kinds) + 0.6, 1.7 * len(places) + 0.3))
  for ax in axes.flat:
    ax.set_visible(False)
  for name, (place, _, kind) in split.items():
    ax, gate = axes[places.index(place), kinds.index(kind)], np.asarray(values[name], np.float64).ravel()
    ax.set_visible(True)
    ax.hist(gate, bins=np.linspace(0, max(1.0, gate.max()), bins + 1), weights=np.full(gate.size, 1 / gate.size))
    ax.axvline(gate.mean(), color="0.2", linewidth=1, linestyle="--")
    ax.set_title(f"{name}, mean {gate.mean():.2f}", fontsize="medium")
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
  return figure


def draw_routing(values: dict[str, np.ndarray]) -> "Figure":
  """A bar for the share of tokens that each memory or expert gets, the mean over rows; a dashed line for even shares."""
  figure, axes = _figure(len(values), 1, (6, 1.7 * len(values) + 0.3))
  for ax, (name, value) in zip(axes[:, 0], values.items(), strict=True):
    shares = np.asarray(value).mean(axis=0)
    ax.bar(np.arange(shares.size), shares)
    ax.axhline(shares.mean(), color="0.2", linewidth=1, linestyle="--")
    ax.set_title(f"{name}, largest {shares.max():.2f}, smallest {shares.min():.2f}", fontsize="medium")
    ax.set(xticks=np.arange(shares.size), ylim=(0, 1))
    ax.spines[["right", "top"]].set_visible(False)
  return figure


def draw_retention(found: dict[str, Retention], row: int = 0, labels: Sequence[str] | None = None) -> "Figure":
  """A map for each memory: the cosine between each written value and what its key reads later on, averaged over heads.

  Args:
    found: the result of `retention`.
    row: row of the batch.
    labels: labels of the tokens, which name the writes; readable for a few dozen tokens.
  """
  maps = {name: np.asarray(one.cosine[:, row]).mean(axis=(-2, -1)).T for name, one in found.items()}
  lowest, tokens = min(0.0, *(np.nanmin(cosine) for cosine in maps.values())), max(map(len, maps.values()))
  height = 4.8 if labels is None else 0.17 * tokens + 1.2
  figure, axes = _figure(1, len(maps), (4.8 * len(maps) + 1.4, height), sharey=True)
  for ax, (name, cosine), one in zip(axes[0], maps.items(), found.values(), strict=True):
    edges = np.concatenate([one.times - np.diff(one.times, prepend=0), one.times[-1:]])
    image = ax.pcolormesh(edges, np.arange(tokens + 1), cosine, cmap=_COLOURS, vmin=lowest, vmax=1)
    ax.set(title=name, xlabel="tokens read")
  axes[0, 0].set(ylabel="written by token", ylim=(tokens, 0))
  if labels is not None:
    axes[0, 0].set_yticks(np.arange(tokens) + 0.5, labels, fontsize="small", family="monospace")
  figure.suptitle("how much of a written value its key still reads")
  figure.colorbar(image, ax=axes, label="cosine of read and written value")
  return figure


def draw_fading(found: dict[str, Retention]) -> "Figure":
  """Mean cosine and mean share of what is read back against the tokens since its write, a line for each memory.

  Dotted lines show the floor, the mean cosine to the values of all tokens. Lags above 3/4 of the length are left out.
  """
  figure, axes = _figure(1, 2, (11, 3.6), sharex=True)
  same, left = axes[0]
  for (name, one), colour in zip(found.items(), _shades(len(found)), strict=True):
    lags, *means = by_lag(one)
    seen = lags < 0.75 * one.cosine.shape[2]
    cosine, share, floor = (mean[seen].mean(axis=1) for mean in means)
    same.plot(1 + lags[seen], cosine, color=colour, label=name)
    same.plot(1 + lags[seen], floor, color=colour, linestyle=":", label="floor: cosine to any value")
    left.plot(1 + lags[seen], share, color=colour, label=name)
  same.set(title="is it still the same value?", ylabel="cosine of read and written value")
  left.set(title="how much of it is left?", ylabel="share of the written value")
  for ax in axes[0]:
    ax.set(xlabel="tokens since the write, its own included", xscale="log", ylim=(min(0, ax.get_ylim()[0]), 1.02))
    ax.grid(alpha=0.25)
  _name_lines(figure, same)
  return figure


def draw_recall(found: Recall, chance: float | None = None, bins: int = 8) -> "Figure":
  """Share of right answers against the distance from write to query, with the standard error of each share."""
  shares = by_distance(found, bins)
  error = np.sqrt(shares.share * (1 - shares.share) / shares.count)
  figure, axes = _figure(1, 1, (6, 3.6))
  (ax,) = axes.flat
  ax.errorbar(shares.distance, shares.share, error, marker="o", capsize=2, label=f"{shares.count.sum()} answers")
  if chance is not None:
    ax.axhline(chance, color="0.35", linestyle=":", label="without a memory")
  ax.set(title="recall by distance", xlabel="tokens between write and query", ylabel="right answers")
  ax.set_ylim(-0.02, 1.05)
  ax.grid(alpha=0.25)
  ax.legend(frameon=False)
  return figure


def draw_etmf(found: TokenFidelity) -> "Figure":
  """ETMF against the lag, a line for each layer, with its floor (dotted) and its ceiling, the value at lag 0 (dashed)."""
  figure, axes = _figure(1, 1, (7.5, 3.6))
  (ax,) = axes.flat
  order = np.argsort(found.lags)
  lags, count = found.lags[order], len(found.layers)
  layers = zip(found.layers, found.cosine, found.floor, found.ceiling, _shades(count), strict=True)
  for i, (name, cosine, floor, ceiling, colour) in enumerate(layers, start=1):
    faint = {"color": colour, "alpha": 0.5, "linewidth": 0.8}
    ax.plot(lags, cosine[order], color=colour, marker="o", markersize=3, label=name)
    ax.plot(lags, floor[order], linestyle=":", label="floor: shuffled pairs" if i == count else "_", **faint)
    ax.axhline(ceiling, linestyle="--", label="ceiling: the token itself" if i == count else "_", **faint)
  ax.set(title="can a token be read from later vectors?", xlabel="tokens since then", xscale="log")
  ax.set(ylabel="cosine of embedding and reading", ylim=(min(0, ax.get_ylim()[0]), 1.02))
  ax.set_xticks(lags, lags)
  ax.minorticks_off()
  ax.grid(alpha=0.25)
  _name_lines(figure, ax)
  return figure


def draw_eclmf(found: LayerFidelity) -> "Figure":
  """ECLMF against the gap, a line for each layer that has higher ones, with its floor (dotted)."""
  figure, axes = _figure(1, 1, (7.5, 3.6))
  (ax,) = axes.flat
  order = np.argsort(found.gaps)
  gaps = found.gaps[order]
  layers = zip(found.layers, found.share, found.floor, _shades(len(found.layers)), strict=True)
  known = [layer for layer in layers if not np.isnan(layer[1]).all()]
  for i, (name, share, floor, colour) in enumerate(known, start=1):
    label = "floor: shuffled pairs" if i == len(known) else "_"
    ax.plot(gaps, share[order], color=colour, marker="o", markersize=3, label=name)
    ax.plot(gaps, floor[order], color=colour, alpha=0.5, linewidth=0.8, linestyle=":", label=label)
  ax.set(title="can a layer be read from higher ones?", xlabel="layers above", xticks=gaps)
  ax.set(ylabel="share of its variance", ylim=(min(0, ax.get_ylim()[0]), 1.02))
  ax.grid(alpha=0.25)
  _name_lines(figure, ax)
  return figure


def _figure(rows: int, columns: int, size: tuple[float, float], **options):
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _name_lines(figure: "Figure", ax) -> None:
  """Places the legend beside the panels, where it hides no line."""
  figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)


def _shades(count: int) -> np.ndarray:
  from matplotlib import colormaps

  return colormaps[_COLOURS](np.linspace(0, 0.85, count))
