"""Imputation: hidden pixels are sampled by SGLD while the known ones stay as they are.

Where no pixel is known, it is sampling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy, sgld

Array = jax.Array


def inpaint(
    key: Array, log_density: energy.LogDensity, x: Array, known: Array, *, every: int = 0, **settings: Any
) -> Array:
    """A sample of p(hidden pixels | known pixels).

    The chain moves along ∇ log p~ of the whole image with respect to its hidden pixels alone.

    >>> log_density = lambda x: -((x[:, 0] - x[:, 1]) ** 2)
    >>> x, known = jnp.array([[0.5, -1.0]]), jnp.array([True, False])
    >>> inpaint(jax.random.key(0), log_density, x, known, num_steps=20, step_size=0.3, noise_std=0.0).round(3).tolist()
    [[0.5, 0.5]]

    Args:
      key: one PRNG key, or one per example [B].
      log_density: x [B, ...] -> [B].
      x: [B, ...]; the chain starts at its hidden pixels.
      known: [...] or [B, ...] bool, which pixels stay.
      every: also return the start, and what lies on the way after so many steps each; 0: the end alone.
      **settings: keyword arguments of `sgld.chain`.

    Returns:
      [B, ...], the known pixels unchanged to the last bit and the others unclipped; with `every`
      [B, num_steps // every + 1, ...].
    """
    whole = lambda hidden: jnp.where(known, x, hidden)  # noqa: E731
    density = lambda hidden: log_density(whole(hidden))  # noqa: E731
    if every:
        states = sgld.trajectory(key, density, x, every=every, **settings)
        return jnp.swapaxes(jax.vmap(whole)(states), 0, 1)
    return whole(sgld.chain(key, density, x, **settings))


def masks(image_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Known pixels of each mask: the upper half, the left half, or all but the central square of half the side."""
    height, width, _ = image_shape
    upper, left, around = (np.ones(image_shape, bool) for _ in range(3))
    upper[height // 2 :] = False
    left[:, width // 2 :] = False
    around[height // 4 : height - height // 4, width // 4 : width - width // 4] = False
    return {"lower half": upper, "right half": left, "centre": around}


def error(images: np.ndarray, filled: np.ndarray, known: np.ndarray) -> float:
    """Root mean squared error of the hidden pixels, in [0, 1] pixels; what was filled in is clipped to [-1, 1]."""
    difference = (np.clip(filled, -1, 1) - images)[:, ~known]
    return float(np.sqrt(np.mean(difference**2)) / 2)
