"""Pixels as numbers in [-1, 1], and augmentation on the device: one image -> one image; `vmap` makes it a batch."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import prng

Array = jax.Array
Images = TypeVar("Images", np.ndarray, jax.Array)


def to_float(images: Images) -> Images:
    """uint8 -> float32 in [-1, 1], any shape; NumPy in, NumPy out, and JAX in, JAX out."""
    return images.astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """float [-1, 1] -> uint8, values outside clipped. Any shape."""
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def random_shift(key: Array, image: Array, pad: int, mode: str) -> Array:
    """Pads by `pad` pixels on every side and crops at random to the old size.

    Args:
      image: [H, W, C].
      pad: pixels, at least 0.
      mode: "constant" pads with -1 (black), "reflect" mirrors without the edge (official default, pad 4).

    Returns:
      [H, W, C].
    """
    if pad == 0:
        return image
    sides = ((pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(image, sides, mode) if mode == "reflect" else jnp.pad(image, sides, constant_values=-1)
    row, column = prng.integers(key, (2,), 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


def random_flip(key: Array, image: Array) -> Array:
    """Mirrors left to right with probability one half. [H, W, C] -> [H, W, C]."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def augment(key: Array, image: Array, *, pad: int, pad_mode: str, flip: bool, noise_std: float) -> Array:
    """Shift, flip and Gaussian noise (official: pad 4, reflect, flip but on SVHN, σ 0.03).

    Args:
      key: this image's PRNG key.
      image: [H, W, C] float32 in [-1, 1].
      noise_std: in units of [-1, 1] pixels; the noise is not clipped.

    Returns:
      [H, W, C].
    """
    shift_key, flip_key, noise_key = jax.random.split(key, 3)
    image = random_shift(shift_key, image, pad, pad_mode)
    if flip:
        image = random_flip(flip_key, image)
    return image + noise_std * jax.random.normal(noise_key, image.shape)
