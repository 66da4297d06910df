"""Variants of the delta rule for the tests: inputs like those of a trained model, gradients, and the equation in NumPy."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from memzoo.pallas_kernels import delta_rule as ops
from memzoo.pallas_kernels import dispatch
from memzoo.pallas_kernels.delta_rule import call
from tolerances import assert_close


@dataclasses.dataclass(frozen=True)
class Variant:
  """A public function and the kind of its arguments.

  Attributes:
    function: the public function.
    decay: "none", "scalar" or "channel".
    updates: r, the updates per token, if keys have an axis for them, else 0.
  """

  function: Callable
  decay: str = "none"
  updates: int = 0

  def __str__(self) -> str:
    return f"{self.function.__name__}{self.updates or ''}-{self.decay}"

  @property
  def erases(self) -> bool:
    return self.function is ops.erase_then_delta_rule

  def inputs(self, tokens, *, dtype=jnp.float64, batch=2, key_heads=1, heads=2, key_dim=5, value_dim=3, cosine=0.5, seed=0):
    """Keyword arguments: unit keys with a mean cosine of `cosine`, strengths up to 2, decays from gentle to e^-5."""
    rng = np.random.default_rng(seed)
    steps = (self.updates,) if self.updates else ()
    common = rng.normal(size=key_dim)

    def unit(*steps):
      x = rng.normal(size=(batch, tokens, *steps, key_heads, key_dim))
      x = cosine**0.5 * common + (1 - cosine) ** 0.5 * x
      return x / np.linalg.norm(x, axis=-1, keepdims=True)

    args = {"q": unit(), "k": unit(*steps), "v": rng.normal(size=(batch, tokens, *steps, heads, value_dim))}
    if self.function is ops.gated_delta_rule_2:
      args["erase_gate"] = rng.uniform(0, 2, (batch, tokens, key_heads, key_dim))
      args["write_gate"] = rng.uniform(0, 1, (batch, tokens, heads, value_dim))
    elif self.function is not ops.linear_attention:
      args["beta"] = rng.uniform(0, 2, (batch, tokens, *steps, heads))
    if self.erases:
      args["erase_key"] = unit()
      args["erase_strength"] = rng.uniform(0, 1, (batch, tokens, heads))
    if self.function is ops.comba_rule:
      args["feedback_key"] = unit() * rng.uniform(0, 1, (key_heads, 1))
    if self.decay != "none":
      shape = (batch, tokens, heads) if self.decay == "scalar" else (batch, tokens, heads, key_dim)
      args["log_decay"] = -np.exp(rng.uniform(np.log(1e-3), np.log(5), shape))
    args["initial_state"] = rng.normal(size=(batch, heads, key_dim, value_dim))
    return {name: jnp.asarray(x, dtype) for name, x in args.items()}


STATIC = ("variant", "scale", "chunk_size", "decay_bound", "precision", "implementation")


@partial(jax.jit, static_argnames=STATIC)
def values(variant: Variant, args, segment_ids=None, **options):
  """Output and final state."""
  return variant.function(**args, segment_ids=segment_ids, **options)


def cotangents(args):
  """Cotangents of the output and the final state."""
  (batch, tokens), (heads, value_dim) = args["v"].shape[:2], args["v"].shape[-2:]
  rng = np.random.default_rng(99)
  out = rng.normal(size=(batch, tokens, heads, value_dim))
  state = rng.normal(size=(batch, heads, args["q"].shape[-1], value_dim))
  return jnp.asarray(out, args["v"].dtype), jnp.asarray(state, args.get("initial_state", args["v"]).dtype)


def values_and_gradients(variant: Variant, args, segment_ids=None, **options):
  """Output and final state, and the gradients of every argument for cotangents of both."""
  return _values_and_gradients(variant, args, cotangents(args), segment_ids, **options)


@partial(jax.jit, static_argnames=(*STATIC, "platform", "matrices"))
def _values_and_gradients(variant, args, cotangents, segment_ids, platform=None, matrices=None, **options):
  """In the form for a `platform`, if given, with blocks of at most so many `matrices`, if given."""
  with contextlib.ExitStack() as stack:
    if platform:
      for module in (call, dispatch):
        stack.enter_context(mock.patch.object(module, "by_platform", lambda forms, *args: forms.of(platform)(*args)))
    if matrices:
      names = "_MATRICES", "_MATRICES_BY_CHANNEL", "_MATRICES_ON_GPU"
      stack.enter_context(mock.patch.multiple(call, **dict.fromkeys(names, matrices)))
    out, pull_back = jax.vjp(lambda args: variant.function(**args, segment_ids=segment_ids, **options), args)
    return out, pull_back(cotangents)[0]


def by_hand(
  q,
  k,
  v,
  beta=None,
  erase_key=None,
  erase_strength=None,
  log_decay=None,
  initial_state=None,
  segment_ids=None,
  scale=None,
  **asymmetric,
):
  """The rule as products of matrices, in NumPy: S_t = (I - beta k k^T) (I - gamma e e^T) Diag(exp g) S_{t-1} + beta k v^T.

  Padding is skipped, and the state is set to zero where the segment id changes. With `erase_gate` b and `write_gate` w it is
  S_t = (I - k (b k)^T) Diag(exp g) S_{t-1} + k (w v)^T; with `feedback_key` p it is
  S_t = (exp(g) - beta k p^T) S_{t-1} + beta k v^T.
  """
  q, k, v, beta = (None if x is None else np.asarray(x) for x in (q, k, v, beta))
  erase_key, erase_strength, log_decay = (None if x is None else np.asarray(x) for x in (erase_key, erase_strength, log_decay))
  if k.ndim == 4:
    k, v, beta = (None if x is None else x[:, :, None] for x in (k, v, beta))
  batch, tokens, steps, heads, value_dim = v.shape
  key_dim, group = q.shape[-1], heads // q.shape[2]
  scale = key_dim**-0.5 if scale is None else scale
  out, final = np.zeros((batch, tokens, heads, value_dim)), np.zeros((batch, heads, key_dim, value_dim))
  for b, h in np.ndindex(batch, heads):
    state = final[b, h] if initial_state is None else np.asarray(initial_state[b, h])
    document = None
    for t in range(tokens):
      segment = 1 if segment_ids is None else segment_ids[b, t]
      if segment == 0:
        continue
      state = state if document in (None, segment) else np.zeros_like(state)
      document = segment
      if asymmetric:
        key, value = np.asarray(k[b, t, 0, h // group]), np.asarray(v[b, t, 0, h])
        decay = np.diag(np.exp(np.broadcast_to(0 if log_decay is None else log_decay[b, t, h], key_dim)))
        if "feedback_key" in asymmetric:
          strength = float(beta[b, t, 0, h])
          state = (decay - strength * np.outer(key, asymmetric["feedback_key"][b, t, h // group])) @ state
          state = state + strength * np.outer(key, value)
        else:
          erased, written = asymmetric["erase_gate"][b, t, h // group] * key, asymmetric["write_gate"][b, t, h] * value
          state = (np.eye(key_dim) - np.outer(key, erased)) @ decay @ state + np.outer(key, written)
        out[b, t, h] = scale * state.T @ q[b, t, h // group]
        continue
      if log_decay is not None:
        state = np.diag(np.exp(np.broadcast_to(log_decay[b, t, h], key_dim))) @ state
      if erase_key is not None:
        e = erase_key[b, t, h // group]
        state = (np.eye(key_dim) - float(erase_strength[b, t, h]) * np.outer(e, e)) @ state
      for m in range(steps):
        write = k[b, t, m, h // group]
        strength = 1.0 if beta is None else float(beta[b, t, m, h])
        if beta is not None:
          state = (np.eye(key_dim) - strength * np.outer(write, write)) @ state
        state = state + strength * np.outer(write, v[b, t, m, h])
      out[b, t, h] = scale * state.T @ q[b, t, h // group]
    final[b, h] = state
  return out, final


# Consequences of the equations are tested on inputs of one shape, with equal key and value widths, so that each variant needs
# one program of values and at most one of gradients.


def inputs(variant, seed=0):
  return variant.inputs(21, value_dim=5, seed=seed)


def run(variant, args):
  return values(variant, args, implementation="xla", chunk_size=8)


def run_with_gradients(variant, args):
  return values_and_gradients(variant, args, implementation="xla", chunk_size=8)


def without(args, *names):
  return {name: x for name, x in args.items() if name not in names}


def empty(args):
  """The same arguments, with an empty memory."""
  return args | {"initial_state": jnp.zeros_like(args["initial_state"])}


def only_token(args, t=0):
  """The same arguments, except that only token t decays, erases or writes."""
  gates = [name for name in ("beta", "erase_strength", "erase_gate", "write_gate", "log_decay") if name in args]
  return args | {name: jnp.zeros_like(args[name]).at[:, t].set(args[name][:, t]) for name in gates}


def assert_same(actual, expected):
  """Equal values, and equal gradients of the arguments that both have."""
  assert_close(actual[0], expected[0])
  shared = actual[1].keys() & expected[1].keys()
  assert_close(*({name: gradients[name] for name in shared} for _, gradients in (actual, expected)), gradients=True)


def differ(a, b):
  return not np.allclose(a, b)


def per_token(x, args):
  """A [B, T, Hv] array of one number."""
  return jnp.full(args["v"].shape[:2] + args["v"].shape[-2:-1], x, jnp.float64)


def transition(variant, args):
  """The matrices that the state is multiplied by over all tokens, [B, H, K, K]."""
  state = args["initial_state"]
  identity = jnp.asarray(np.broadcast_to(np.eye(state.shape[-1]), state.shape))
  return run(variant, args | {"v": jnp.zeros_like(args["v"]), "initial_state": identity})[1]
