"""Measures how fast models generate, and how large their states are, by the number of tokens that attention reaches back.

    python -m memzoo.train.bench_decoding models/attention_10m models/mamba_10m --lengths 1024,4096,16384

Prints a table and draws `decoding.png`: tokens per second for one sequence, and bytes of its state. Each model makes the call
that generation makes, one token with a state for that length. The call reads all of an attention's cache, however much of it
is filled, so nothing is read before. The floor is the time to read parameters and state once from this machine's memory.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from ..pallas_kernels.measure import reading_rate
from ..zoo.formats import binary, table, thousands
from .config import build
from .files import save_figure
from .keys import new_key
from .runtime import start_quietly


class Speed(NamedTuple):
  """Generation by one model: context in tokens, tokens per second, bytes of state and of parameters."""

  name: str
  context: int
  rate: float
  state_bytes: int
  parameter_bytes: int


class Generation:
  """A model that generates token after token; models that are equal share their compiled programs."""

  def __init__(self, config: str, context: int):
    self.name, self.context = config, context
    self.model = build(config, [f"length={context}"]).model
    self.token = jnp.zeros((1, 1), jnp.int32)
    self.params = _init(self.model, self.token)
    self.state = self.model.apply(self.params, 1, method="initial_state")
    self.step(), self.step()

  def step(self) -> float:
    """Seconds of one token."""
    began = time.perf_counter()
    _, self.state = jax.block_until_ready(_step(self.model, self.params, self.token, self.state))
    return time.perf_counter() - began

  def measure(self, seconds: float) -> Speed:
    """Generates tokens for `seconds`, and at least 20."""
    times, began = [], time.perf_counter()
    while len(times) < 20 or time.perf_counter() - began < seconds:
      times.append(self.step())
    sizes = self.model.state_bytes(1, self.context), sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
    return Speed(self.name, self.context, 1 / statistics.median(times), *sizes)


@partial(jax.jit, static_argnums=0)
def _init(model: Any, tokens: jax.Array) -> Any:
  return model.init(new_key(0), tokens)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(model: Any, params: Any, token: jax.Array, state: Any) -> Any:
  return model.apply(params, token, state)


def draw(found: list[Speed], path: Path) -> None:
  """Draws tokens per second and bytes of state, a curve for each model."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), layout="constrained")
  panels, contexts = figure.subplots(1, 2), sorted({each.context for each in found})
  for name in dict.fromkeys(each.name for each in found):
    own = [each for each in found if each.name == name]
    for axes, values in zip(panels, ([each.rate for each in own], [each.state_bytes for each in own]), strict=True):
      axes.plot([each.context for each in own], values, "o-", markersize=4, label=name.rpartition("/")[2])
  for axes, label in zip(panels, ("tokens per second", "bytes of state"), strict=True):
    axes.set(xlabel="tokens of context", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.tick_params(axis="y", which="minor", left=False)
    axes.grid(alpha=0.25)
  panels[0].legend(fontsize=8)
  save_figure(figure, path)


def _row(each: Speed, rate: float) -> tuple[str, ...]:
  floor = rate / (each.parameter_bytes + each.state_bytes)
  return each.name, f"{each.context:,}", f"{each.rate:,.0f}", f"{floor:,.0f}", binary(each.state_bytes)


def main(arguments: Any = None) -> None:
  """Measures, prints and draws."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  default = ["models/attention_10m", "models/mamba_10m", "models/mamba2_10m", "models/mem_mamba_10m"]
  parser.add_argument("configs", nargs="*", default=default, help="models of one size")
  parser.add_argument("--lengths", default="1024,4096,16384,65536", help="tokens of context")
  parser.add_argument("--seconds", type=float, default=5.0, help="how long each is measured")
  parser.add_argument("--out", type=Path, default=Path("decoding.png"), help="the picture")
  given = parser.parse_args(arguments)
  start_quietly()
  console, prepared = Console(), []
  for config in given.configs:
    for length in map(int, given.lengths.split(",")):
      print(f"Compiling {config} for {length:,} tokens", flush=True)
      prepared.append(Generation(config, length))
  rate, found = reading_rate(), [each.measure(given.seconds) for each in prepared]
  title = f"Generation, one sequence, memory at {thousands(rate, 'B')}/s"
  columns = "model", "context", "tokens/s", "floor, tokens/s", "state"
  console.print(table(title, columns, (_row(each, rate) for each in found)))
  draw(found, given.out)
  print(f"Wrote {given.out}.")


if __name__ == "__main__":
  main()
