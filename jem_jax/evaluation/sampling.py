"""Samples of the model: chains that follow log p~(x) or one class's logit, and how they are sorted by class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy, sgld

Array = jax.Array


def chains(
    key: Array, logits_fn: energy.LogitsFunction, x: Array, classes: Array | None = None, **settings: Any
) -> Array:
    """Ends of SGLD chains along ∇_x log p~(x), or along ∇_x f(x)[y] of given classes.

    >>> x, settings = jnp.zeros((1, 2)), {"num_steps": 3, "step_size": 1.0, "noise_std": 0.0}
    >>> chains(jax.random.key(0), lambda x: x, x, jnp.array([1]), **settings).tolist()
    [[0.0, 3.0]]

    Args:
      key: one PRNG key, or one per example [B].
      logits_fn: x [B, ...] -> logits [B, K].
      x: [B, ...] where the chains start.
      classes: [B] integers, or None.
      **settings: keyword arguments of `sgld.chain`.

    Returns:
      [B, ...], unclipped unless the settings have bounds.
    """
    density = energy.marginal(logits_fn) if classes is None else energy.conditional(logits_fn, classes)
    return sgld.chain(key, density, x, **settings)


def film(key: Array, logits_fn: energy.LogitsFunction, x: Array, **settings: Any) -> Array:
    """Chains along ∇_x log p~(x) with what lay on their way.

    >>> settings = {"num_steps": 4, "every": 2, "step_size": 1.0, "noise_std": 0.0}
    >>> film(jax.random.key(0), lambda x: x, jnp.zeros((2, 3)), **settings).shape
    (2, 3, 3)

    Args:
      key, logits_fn, x: as of `chains`.
      **settings: keyword arguments of `sgld.trajectory`, with num_steps and every.

    Returns:
      [B, num_steps // every + 1, ...], the start first.
    """
    return jnp.swapaxes(sgld.trajectory(key, energy.marginal(logits_fn), x, **settings), 0, 1)


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
