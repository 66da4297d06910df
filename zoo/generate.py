"""Generation: the prompts in a few calls, then the same call with one token at a time.

    for tokens in stream(model, params, [prompt], max_new_tokens=100): ...      # tokens [B], as they come
    generate(model, params, prompts, max_new_tokens=100)                        # all of them, as lists

The state has one size however long the text, so there is no cache to grow. Prompts of different lengths share a batch:
the shorter ones are padded on the left, and padding is a no-op by the layers' contract.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

STOPPED = -1  # stands where a row of a batch has already ended

# Prompts are padded up to a power of two between these, and longer ones to a multiple of the second and fed in pieces
# of it: so few shapes occur, and each is compiled once.
_SHORTEST_PIECE = 16
_LONGEST_PIECE = 1024


@dataclass(frozen=True)
class Sampling:
  """How a token is drawn from the model's distribution.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw among the `top_k` likeliest; None means all.
    top_p: draw among the likeliest that together have at least this probability (after temperature and `top_k`).
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature is {self.temperature}; want 0 (the likeliest token) or more.")
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k is {self.top_k}; want at least 1, or None.")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; want a probability above 0 and up to 1, or None.")


def generate(
  model: nn.Module,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int | Sequence[int] = 0,
  stop_token: int | None = None,
) -> list[list[int]]:
  """The tokens that follow each prompt, without the prompt and without the stop token. Arguments as of `stream`."""
  rows: list[list[int]] = [[] for _ in prompts]
  options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_token": stop_token}
  for tokens in stream(model, params, prompts, max_new_tokens=max_new_tokens, **options):
    for row, token in zip(rows, tokens.tolist(), strict=True):
      if token not in (STOPPED, stop_token):
        row.append(token)
  return rows


def stream(
  model: nn.Module,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int | Sequence[int] = 0,
  stop_token: int | None = None,
) -> Iterator[np.ndarray]:
  """Yields the next token of every row, as soon as it is known.

  Args:
    model: an unbound `LanguageModel`.
    params: its variables, as `model.init` returns them.
    prompts: the tokens to go on from, at least one each; lengths may differ.
    max_new_tokens: how many to generate per row.
    temperature, top_k, top_p: see `Sampling`.
    seed: row `i` draws from `seed + i`, or from `seed[i]`: what a row becomes depends on its own seed and prompt alone,
      not on the batch that it is in.
    stop_token: ends a row when it is drawn; None never does.

  Yields:
    int32 [batch]: the tokens; `STOPPED` in rows that have ended. It stops early when all have.

  Raises:
    ValueError: if an argument is not as described here.
  """
  sampling = Sampling(temperature, top_k, top_p)
  _check_prompts(prompts, model.vocab_size)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens is {max_new_tokens}; want at least 1.")
  return _stream(model, params, prompts, max_new_tokens, sampling, _row_keys(seed, len(prompts)), stop_token)


def as_text(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
  """Yields the text of `tokens` as they come, holding a character back while only some of its bytes are there."""
  seen: list[int] = []
  shown = 0
  for token in tokens:
    seen.append(token)
    text = decode(seen)
    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
      yield text[shown:]
      shown = len(text)
  if seen and (rest := decode(seen)[shown:]):
    yield rest


def prefill(model: nn.Module, params: Any, prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, Any]:
  """Reads the prompts: the logits [B, vocab_size] of what comes next, and the state after them."""
  length = _padded_length(max(map(len, prompts)))
  tokens = np.zeros((len(prompts), length), np.int32)
  segment_ids = np.zeros_like(tokens)
  for i, prompt in enumerate(prompts):
    tokens[i, length - len(prompt) :] = prompt
    segment_ids[i, length - len(prompt) :] = 1
  # Copied, for a fresh state may have one array in two places, and what is donated must not.
  state = jax.tree.map(jnp.copy, model.apply(params, len(prompts), method="initial_state"))
  piece = min(length, _LONGEST_PIECE)
  for start in range(0, length, piece):
    part = slice(start, start + piece)
    logits, state = _read(model, params, jnp.asarray(tokens[:, part]), jnp.asarray(segment_ids[:, part]), state)
  return logits, state


def draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """One token, int32 [], from logits [vocab_size]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits).astype(jnp.int32)
  order = jnp.argsort(-logits)
  ranked = logits[order].astype(jnp.float32) / sampling.temperature
  if sampling.top_k is not None:
    ranked = jnp.where(jnp.arange(ranked.size) < sampling.top_k, ranked, -jnp.inf)
  if sampling.top_p is not None:
    probability = jax.nn.softmax(ranked)
    ranked = jnp.where(jnp.cumsum(probability) - probability < sampling.top_p, ranked, -jnp.inf)
  return order[jax.random.categorical(key, ranked)].astype(jnp.int32)


def _stream(model, params, prompts, max_new_tokens, sampling, keys, stop_token) -> Iterator[np.ndarray]:
  logits, state = prefill(model, params, prompts)
  tokens = _draw_rows(logits, keys, jnp.int32(0), sampling)
  running = np.ones(len(prompts), bool)
  for step in range(1, max_new_tokens + 1):
    following = None
    if step < max_new_tokens:  # the device is at work on the next token while the caller looks at this one
      following, state = _step(model, params, tokens, state, keys, jnp.int32(step), sampling)
    current = np.where(running, np.asarray(tokens), STOPPED)
    if stop_token is not None:
      running &= current != stop_token
    yield current
    if not running.any():
      return
    tokens = following


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _read(model, params, tokens, segment_ids, state):
  logits, state = model.apply(params, tokens, state, segment_ids)
  return logits[:, -1], state


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def _step(model, params, tokens, state, keys, step, sampling):
  logits, state = model.apply(params, tokens[:, None], state)
  return _draw_rows(logits[:, -1], keys, step, sampling), state


@partial(jax.jit, static_argnames="sampling")
def _draw_rows(logits, keys, step, sampling):
  return jax.vmap(lambda row, key: draw(row, jax.random.fold_in(key, step), sampling))(logits, keys)


def _row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
  seeds = [seed + i for i in range(rows)] if isinstance(seed, int) else list(seed)
  if len(seeds) != rows:
    raise ValueError(f"seed has {len(seeds)} numbers; want one, or one for each of the {rows} prompts.")
  return jnp.stack([jax.random.key(s) for s in seeds])


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
  if isinstance(prompts, str) or not len(prompts):
    raise ValueError(f"prompts is {prompts!r}; want a list of at least one prompt, each a list of tokens.")
  for i, prompt in enumerate(prompts):
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(f"prompts[{i}] is {prompt!r}; want a list of at least one token.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
      raise ValueError(f"prompts[{i}] has tokens from {tokens.min()} to {tokens.max()}; want 0 to {vocab_size - 1}.")


def _padded_length(length: int) -> int:
  if length > _LONGEST_PIECE:
    return -(-length // _LONGEST_PIECE) * _LONGEST_PIECE
  return max(_SHORTEST_PIECE, 1 << (length - 1).bit_length())
