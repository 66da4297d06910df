"""Random keys of one implementation, so that a run does not depend on JAX's default, `jax_default_prng_impl`."""

import jax

_IMPLEMENTATION = "threefry2x32"


def new_key(seed: int | jax.Array) -> jax.Array:
  """A random key from a seed."""
  return jax.random.key(seed, impl=_IMPLEMENTATION)


def key_from_data(data: jax.Array) -> jax.Array:
  """The key whose `jax.random.key_data` is `data`."""
  return jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)
