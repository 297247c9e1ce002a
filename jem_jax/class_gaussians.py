"""Informative initialisation: chains start from a Gaussian of each class's training images (JEM++, SADA-JEM).

The Gaussian of a class with images x_1, …, x_n has their mean, and their covariance + 10⁻⁴·I. A draw is

    mean + Σ_i (x_i - mean) ε_i / √n + 10⁻² ε′,     ε, ε′ ~ N(0, I)

clipped to [-1, 1] as released. No covariance matrix is formed, which for 64×64 images would take 600 MB a class.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax.augment import to_float

Array = jax.Array

JITTER = 1e-2
"""standard deviation of ε′: the released code adds 10⁻⁴ to the covariance's diagonal"""


def draw(key: Array, images: Array, present: Array, count: int) -> Array:
    """Draws from the Gaussian of some images.

    Args:
      key: one PRNG key.
      images: [n, ...] float.
      present: [n] bool, which of them count; at least one.
      count: how many draws.

    Returns:
      [count, ...], clipped to [-1, 1].
    """
    weights_key, jitter_key = jax.random.split(key)
    flat = images.reshape(len(images), -1)
    total = jnp.sum(present)
    mean = jnp.sum(jnp.where(present[:, None], flat, 0), axis=0) / total
    centred = jnp.where(present[:, None], flat - mean, 0)
    epsilon = jax.random.normal(weights_key, (count, len(images)), flat.dtype)
    jitter = JITTER * jax.random.normal(jitter_key, (count, flat.shape[1]), flat.dtype)
    # Accelerators would round the product to TF32 or bf16, more than the jitter in places.
    spread = jnp.matmul(epsilon, centred, precision=jax.lax.Precision.HIGHEST) / jnp.sqrt(total)
    return jnp.clip(mean + spread + jitter, -1, 1).reshape(count, *images.shape[1:])


@functools.partial(jax.jit, static_argnums=3)
def _draw(key: Array, images: Array, present: Array, count: int) -> Array:
    return draw(key, to_float(images), present, count)


def of_classes(
    images: np.ndarray | Array, labels: np.ndarray, rows: np.ndarray, num_classes: int
) -> Callable[[Array, int], Array]:
    """The Gaussians of a data set's classes.

    Args:
      images: uint8 [N, H, W, C]; every call sends them to a device if they are NumPy's.
      labels: [N].
      rows: [n] which of them may be used: those with labels. Every class has at least one.
      num_classes: K.

    Returns:
      (key, count) -> draws [count, K, H, W, C] float32, `count` of each class.
    """
    labels = labels[rows]
    members = [rows[labels == label] for label in range(num_classes)]
    most = max(len(chosen) for chosen in members)

    def draws(key: Array, count: int) -> Array:
        samples = []
        for label, chosen in enumerate(members):
            # Filled up to the largest class, so that one program serves all.
            padded = np.resize(chosen, most)
            present = np.arange(most) < len(chosen)
            samples.append(_draw(jax.random.fold_in(key, label), images[padded], present, count))
        return jnp.stack(samples, axis=1)

    return draws


def init(draws: Callable[[Array, int], Array], key: Array, num_slots: int, num_classes: int) -> Any:
    """A replay buffer of such draws.

    Args:
      draws: as `of_classes` returns.
      num_slots: S (per class).
      num_classes: the buffer's class axis: K, or 1, where classes take turns from slot to slot.

    Returns:
      [num_slots, num_classes, H, W, C] float32.
    """
    if num_classes > 1:
        return draws(key, num_slots)
    classes = jax.eval_shape(lambda: draws(key, 1)).shape[1]
    mixed = draws(key, -(-num_slots // classes))
    return mixed.reshape(-1, 1, *mixed.shape[2:])[:num_slots]
