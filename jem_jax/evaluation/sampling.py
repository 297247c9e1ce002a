"""Samples of the model: what their chains climb, and how they are sorted by class."""

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy

Array = jax.Array


NO_CLASS = -1
"""instead of a class: log p~(x)"""


def log_density(logits_fn: energy.LogitsFunction, classes: Array) -> energy.LogDensity:
    """The function that a chain climbs: f(x)[y] of its class, or log p~(x) where its class is `NO_CLASS`.

    >>> density = log_density(lambda x: x, jnp.array([1, NO_CLASS]))
    >>> density(jnp.array([[1.0, 2.0], [3.0, -jnp.inf]])).tolist()
    [2.0, 3.0]

    Args:
      logits_fn: x [B, ...] -> logits [B, K].
      classes: [B] integers.

    Returns:
      x [B, ...] -> [B].
    """

    def density(x: Array) -> Array:
        logits = logits_fn(x)
        of_class = energy.joint_log_density(logits, jnp.maximum(classes, 0))
        return jnp.where(classes == NO_CLASS, energy.log_density(logits), of_class)

    return density


def by_class(images: np.ndarray, logits: np.ndarray, per_class: int) -> list[np.ndarray]:
    """For each class, the first `per_class` images whose largest logit is that class's, in the order given.

    Args:
      images: [N, ...].
      logits: [N, K].

    Returns:
      K arrays of at most `per_class` images; fewer where the model made fewer.
    """
    predicted = logits.argmax(axis=-1)
    return [images[predicted == label][:per_class] for label in range(logits.shape[-1])]
