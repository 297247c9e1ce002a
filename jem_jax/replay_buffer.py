"""The replay buffer of persistent SGLD chains, as pure functions on one array.

A buffer is a float array [S, C, ...]: S slots, C classes (1 unless sampling is class-conditional), then one example.
Values are what the chains left there: unclipped, in the units of x.

Example i of a batch of B draws its slot uniformly from [⌊iS/B⌋, ⌊(i+1)S/B⌋). The slots of a batch are therefore
distinct, and a write never collides. An example's slot lies on its own device, where buffer and batch are cut over
devices in the same order. The official code draws from the whole buffer with replacement instead; over many steps every
slot is visited equally often either way.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import prng

Array = jax.Array


class Draw(NamedTuple):
    """Starting points of chains, and where they came from."""

    x: Array
    """[B, ...]"""
    slots: Array
    """[B] int32, distinct, increasing"""


def uniform(key: Array, batch_size: int, shape: tuple[int, ...], low: float = -1.0, high: float = 1.0) -> Array:
    """Fresh chains from U(low, high), JEM's initial distribution p_0 (official default U(-1, 1)).

    Args:
      key: one PRNG key, or one per example [batch_size].
      shape: the shape of one example.

    Returns:
      [batch_size, *shape] float32.
    """
    example_keys = prng.of_batch(key, batch_size)
    return jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32, low, high))(example_keys)


def init(key: Array, num_slots: int, shape: tuple[int, ...], *, num_classes: int = 1) -> Array:
    """A buffer of fresh uniform chains.

    Args:
      key: one PRNG key, or one per slot [num_slots].
      num_slots: S (per class).
      shape: the shape of one example.
      num_classes: C, more than 1 only for class-conditional sampling.

    Returns:
      [num_slots, num_classes, *shape] float32 in [-1, 1].
    """
    return uniform(key, num_slots, (num_classes, *shape))


def draw(key: Array, buffer: Array, fresh: Array, *, reinit_prob: float, labels: Array | None = None) -> Draw:
    """Starting points for a batch of chains: each from its slot or, with some probability, a fresh one.

    Args:
      key: one PRNG key, or one per example [B].
      buffer: [S, C, ...].
      fresh: [B, ...] the starting point an example takes if it is re-initialised.
      reinit_prob: probability of that, in [0, 1] (official default 0.05).
      labels: [B] integers in [0, C), the class each example draws from; omitted where C is 1. Labels outside are not
        noticed: a chain is drawn from another class and not written back.

    Returns:
      x [B, ...] and slots [B]. An example that was re-initialised has a slot too: `write` puts its chain there.

    Raises:
      ValueError: fewer slots than examples, or labels missing for a buffer with classes.
    """
    batch_size = fresh.shape[0]
    chex.assert_equal_shape([buffer[0, 0], fresh[0]])
    # One draw for both: each takes a loop of its own in the compiled program.
    bits = jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(prng.of_batch(key, batch_size))
    slots = _slots(bits[:, 0], buffer.shape[0])
    stored = buffer[slots, _classes(buffer, labels, slots.shape)]
    again = (bits[:, 1] >> 8).astype(jnp.float32) * 2.0**-24 < reinit_prob
    return Draw(jnp.where(again.reshape(-1, *(1,) * (fresh.ndim - 1)), fresh.astype(buffer.dtype), stored), slots)


def write(buffer: Array, slots: Array, x: Array, *, labels: Array | None = None, discard: Array | None = None) -> Array:
    """The buffer with the chains' ends put into the slots they were drawn from.

    Args:
      buffer: [S, C, ...]; donate it to the enclosing jit, and the write happens in place.
      slots: [B] distinct, as `draw` gave them.
      x: [B, ...].
      labels: as in `draw`.
      discard: [] bool; where true the buffer stays as it was, at the cost of a gather rather than a copy.

    Returns:
      [S, C, ...].
    """
    chex.assert_shape(x, (*slots.shape, *buffer.shape[2:]))
    classes = _classes(buffer, labels, slots.shape)
    x = x.astype(buffer.dtype)
    if discard is not None:
        x = jnp.where(discard, buffer[slots, classes], x)
    return buffer.at[slots, classes].set(x, indices_are_sorted=True, unique_indices=True)


def _slots(bits: Array, num_slots: int) -> Array:
    """A slot of each example's own range, from uint32 bits [B]."""
    batch_size = len(bits)
    if num_slots < batch_size:
        raise ValueError(f"a buffer of {num_slots} slots is smaller than the batch of {batch_size}")
    # In NumPy, since i·S passes 2³¹ for large buffers.
    edges = np.arange(batch_size + 1, dtype=np.int64) * num_slots // batch_size
    low, size = edges[:-1].astype(np.int32), np.diff(edges).astype(np.uint32)
    return jnp.asarray(low) + (bits % size).astype(jnp.int32)


def _classes(buffer: Array, labels: Array | None, batch: tuple[int, ...]) -> Array | int:
    if labels is None and buffer.shape[1] != 1:
        raise ValueError(f"a buffer of {buffer.shape[1]} classes needs labels")
    if labels is None:
        return 0
    chex.assert_shape(labels, batch)
    return labels
