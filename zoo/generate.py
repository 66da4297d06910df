"""Generation: reads the prompts in a few calls, then makes the same call with one token at a time.

    for tokens in stream(model, params, [prompt], max_new_tokens=100): ...      # tokens [B], each as soon as it is drawn
    generate(model, params, prompts, max_new_tokens=100)                        # all tokens, as lists

The state keeps its size however long the text gets, so no cache grows. Prompts of different lengths share a batch: the
shorter ones are padded on the left, and by the layers' contract padding changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .seeds import as_seed

STOPPED = -1  # the token of a row that has already ended

# A prompt is padded to a power of two between these; a longer one is padded to a multiple of the second and read in pieces
# of that length. So only a few shapes occur, and each is compiled once.
_SHORTEST_PIECE = 16
_LONGEST_PIECE = 1024

_HELD = 64  # the most tokens whose text is held back, and whose text decides that of the next


@dataclass(frozen=True)
class Sampling:
  """How a token is drawn from the model's distribution.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw from the `top_k` likeliest tokens; None means all.
    top_p: draw from the fewest likeliest tokens that together have at least this probability, after temperature and `top_k`.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature is {self.temperature}; expected 0 (the likeliest token) or more.")
    if self.top_k is not None and not (self.top_k >= 1 and self.top_k == int(self.top_k)):
      raise ValueError(f"top_k is {self.top_k}; expected an integer of at least 1, or None.")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; expected a probability above 0 and up to 1, or None.")


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
  stop_token: int | Sequence[int] | None = None,
) -> list[list[int]]:
  """Returns the tokens that follow each prompt, without the prompt and the stop token. Arguments: see `stream`."""
  ends = {STOPPED, *_stop_tokens(stop_token)}
  rows: list[list[int]] = [[] for _ in prompts]
  options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_token": stop_token}
  for tokens in stream(model, params, prompts, max_new_tokens=max_new_tokens, **options):
    for row, token in zip(rows, tokens.tolist(), strict=True):
      if token not in ends:
        row.append(token)
  return rows


def generate_until(
  model: nn.Module,
  params: Any,
  prompts: Sequence[Sequence[int]],
  decode: Callable[[list[int]], str],
  until: Sequence[str],
  **options: Any,
) -> list[str]:
  """Returns the text that follows each prompt, up to the first of the texts `until`, which are not part of it.

  Args:
    model, params, prompts: see `stream`.
    decode: from tokens to their text.
    until: texts that end a row.
    **options: those of `stream`.
  """
  rows: list[list[int]] = [[] for _ in prompts]
  ends = {STOPPED, *_stop_tokens(options.get("stop_token"))}
  running = set(range(len(rows)))
  for tokens in stream(model, params, prompts, **options):
    for i in sorted(running):
      if int(tokens[i]) in ends:
        running.discard(i)
        continue
      rows[i].append(int(tokens[i]))
      if any(text in decode(rows[i][-_HELD:]) for text in until):
        running.discard(i)
    if not running:
      break
  return [_before(decode(row), until) for row in rows]


def _before(text: str, until: Sequence[str]) -> str:
  """`text` up to the first of the texts `until`."""
  return text[: min((place for end in until if (place := text.find(end)) >= 0), default=len(text))]


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
  stop_token: int | Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
  """Yields the next token of every row as soon as it is drawn.

  Args:
    model: an unbound `LanguageModel`.
    params: its variables, as `model.init` returns them.
    prompts: a list of tokens for each row, at least one token each; lengths may differ.
    max_new_tokens: how many tokens to generate per row.
    temperature, top_k, top_p: see `Sampling`.
    seed: row `i` uses the seed `seed + i`, or `seed[i]`; integers from 0 to 2**32 - 1. The tokens of a row depend only on its
      own seed and prompt, not on the other rows of the batch.
    stop_token: ends a row when it is drawn, or one of several that do; None ends no row.

  Yields:
    int32 [batch]: the tokens, and `STOPPED` in rows that have ended. The stream ends early when all rows have ended.

  Raises:
    ValueError: if an argument is not as described here.
  """
  sampling = Sampling(temperature, top_k, top_p)
  _check_prompts(prompts, model.vocab_size)
  if not (max_new_tokens >= 1 and max_new_tokens == int(max_new_tokens)):
    raise ValueError(f"max_new_tokens is {max_new_tokens}; expected an integer of at least 1.")
  return _stream(model, params, prompts, max_new_tokens, sampling, _row_keys(seed, len(prompts)), _stop_tokens(stop_token))


def as_text(
  tokens: Iterable[int], decode: Callable[[list[int]], str], prompt: Sequence[int] = ()
) -> Iterator[str]:
  """Yields the text of `tokens` as they arrive, as it continues the text of `prompt`.

  A character is held back until all its bytes have arrived. A token is decoded together with the few before it, because its
  text may depend on them: some tokenizers put a space before every word but the first. So the time is linear in the number of
  tokens.
  """
  before, held = list(prompt)[-_HELD:], []  # tokens whose text is shown, and tokens whose text is not
  for token in tokens:
    held.append(token)
    text = decode([*before, *held])
    if text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) < _HELD:
      continue
    if piece := text[len(decode(before)) :]:
      yield piece
      before, held = held, []
    elif len(held) == _HELD:  # tokens without any text
      held = []
  if held and (rest := decode([*before, *held])[len(decode(before)) :]):
    yield rest


def prefill(model: nn.Module, params: Any, prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, Any]:
  """Reads the prompts; returns the logits [B, vocab_size] of the next token and the state."""
  length = padded_length(max(map(len, prompts)), _SHORTEST_PIECE, _LONGEST_PIECE)
  tokens = np.zeros((len(prompts), length), np.int32)
  segment_ids = np.zeros_like(tokens)
  for i, prompt in enumerate(prompts):
    tokens[i, length - len(prompt) :] = prompt
    segment_ids[i, length - len(prompt) :] = 1
  # Copied because the state is donated, and a fresh state may contain one array twice.
  state = jax.tree.map(jnp.copy, model.apply(params, len(prompts), method="initial_state"))
  piece = min(length, _LONGEST_PIECE)
  for start in range(0, length, piece):
    part = slice(start, start + piece)
    logits, state = _read(model, params, jnp.asarray(tokens[:, part]), jnp.asarray(segment_ids[:, part]), state)
  return logits, state


def draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token, int32 [], from logits [vocab_size]."""
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


def _stream(model, params, prompts, max_new_tokens, sampling, keys, stop_tokens) -> Iterator[np.ndarray]:
  logits, state = prefill(model, params, prompts)
  tokens = _draw_rows(logits, keys, jnp.int32(0), sampling)
  running = np.ones(len(prompts), bool)
  for step in range(1, max_new_tokens + 1):
    following = None
    if step < max_new_tokens:  # the device computes the next token while the caller handles this one
      following, state = _step(model, params, tokens, state, keys, jnp.int32(step), sampling)
    current = np.where(running, np.asarray(tokens), STOPPED)
    running &= ~np.isin(current, stop_tokens)
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


def _stop_tokens(stop_token: int | Sequence[int] | None) -> list[int]:
  return [] if stop_token is None else np.atleast_1d(stop_token).tolist()


def _row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
  if np.ndim(seed) == 0:
    first = as_seed(seed, "seed")
    seeds = [as_seed(first + i, f"seed {first} of the first of {rows} rows + {i}") for i in range(rows)]
  else:
    seeds = [as_seed(number, f"seed[{i}]") for i, number in enumerate(seed)]
  if len(seeds) != rows:
    raise ValueError(f"seed has {len(seeds)} numbers; expected one number, or one for each of the {rows} prompts.")
  return jnp.stack([jax.random.key(s) for s in seeds])


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
  if isinstance(prompts, str) or not len(prompts):
    raise ValueError(f"prompts is {prompts!r}; expected a list of at least one prompt, each a list of tokens.")
  for i, prompt in enumerate(prompts):
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(f"prompts[{i}] is {prompt!r}; expected a list of at least one token.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
      raise ValueError(f"prompts[{i}] has tokens from {tokens.min()} to {tokens.max()}; expected 0 to {vocab_size - 1}.")


def padded_length(length: int, shortest: int, longest: int) -> int:
  """The least power of two from `shortest` to `longest`, or multiple of `longest`, that is at least `length`."""
  if length > longest:
    return -(-length // longest) * longest
  return max(shortest, 1 << (length - 1).bit_length())
