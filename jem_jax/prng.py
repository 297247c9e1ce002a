"""Random keys that belong to an example's place in the global batch.

Every random number drawn for an example (noise, re-initialisation, augmentation) comes from a key folded with that
example's global index. The same example therefore sees the same random numbers on one device and on many.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

STREAMS = ("initialisation", "buffer", "class Gaussians", "recovery", "statistics")
"""uses of random numbers in a run besides its iterations; the order is part of every run's identity"""
_FIRST_STREAM = 2**31
"""Iterations fold in their number, which is smaller"""


def stream(key: Array, name: str) -> Array:
    """The key of a named stream, distinct from every other stream's and from every iteration's.

    Raises:
      ValueError: `name` is not one of `STREAMS`.
    """
    return jax.random.fold_in(key, np.uint32(_FIRST_STREAM + _number(name)))


def host_generator(seed: int, name: str) -> np.random.Generator:
    """NumPy's generator of a named stream, for what is drawn on the host."""
    return np.random.default_rng((seed, _number(name)))


def _number(name: str) -> int:
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r}; streams are {', '.join(STREAMS)}")
    return STREAMS.index(name)


def for_examples(key: Array, count: int, first: int | Array = 0) -> Array:
    """Keys of the examples `first, …, first + count - 1` of a global batch.

    Args:
      key: one PRNG key, the same on every device.
      count: examples on this device.
      first: global index of this device's first example.

    Returns:
      [count] keys.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def integers(key: Array, shape: tuple[int, ...], bound: int | np.ndarray | Array) -> Array:
    """Uniform integers in [0, bound), from one draw of bits; `jax.random.randint` takes three, which compile longer.

    Args:
      bound: at least 1; it broadcasts with `shape`. An integer's probability is off by less than bound / 2³² of itself.

    Returns:
      int32, of `shape`.
    """
    return (jax.random.bits(key, shape, jnp.uint32) % jnp.asarray(bound, jnp.uint32)).astype(jnp.int32)


def of_batch(key: Array, batch_size: int) -> Array:
    """One key per example, from either one key or an array of keys that already is one per example.

    Args:
      key: a PRNG key (typed or a legacy uint32 pair), or [batch_size] typed keys.

    Returns:
      [batch_size] typed keys; a single key is folded with the example's index, as by `for_examples(key, batch_size)`.

    Raises:
      ValueError: `key` is an array of keys whose shape is not [batch_size].
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == ():
        return for_examples(key, batch_size)
    if key.shape != (batch_size,):
        raise ValueError(f"key must be one PRNG key or one per example, [{batch_size}], not of shape {key.shape}")
    return key
