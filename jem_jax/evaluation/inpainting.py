"""Imputation: hidden pixels are sampled by SGLD while the known ones stay as they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import energy, prng, replay_buffer, sgld
from jem_jax.distributed import devices

Array = jax.Array
VariablesLogits = Callable[[Any, Array], Array]


def inpainter(
    logits_fn: VariablesLogits, **settings: Any
) -> Callable[[Any, Array, np.ndarray, np.ndarray, int], np.ndarray]:
    """A sampler of p(hidden pixels | known pixels), from hidden pixels that begin as U(-1, 1).

    The chain moves along ∇ log p~ of the whole image with respect to its hidden pixels alone.

    Args:
      logits_fn: (variables, x) -> logits.
      **settings: keyword arguments of `sgld.chain`.

    Returns:
      (variables, key, images [N, H, W, C], known [H, W, C] bool, batch_size) -> [N, H, W, C], the known pixels
      unchanged to the last bit and the others unclipped.
    """

    def run(shared: tuple[Any, Array], examples: tuple[Array, Array, Array]) -> Array:
        variables, known = shared
        chain_keys, start, images = examples
        whole = lambda hidden: jnp.where(known, images, hidden)  # noqa: E731
        density = energy.marginal(lambda hidden: logits_fn(variables, whole(hidden)))
        return whole(sgld.chain(jax.random.wrap_key_data(chain_keys), density, start, **settings))

    mapped = devices.over_examples(run)

    def inpaint(variables: Any, key: Array, images: np.ndarray, known: np.ndarray, batch_size: int) -> np.ndarray:
        start_key, chain_key = jax.random.split(key)
        start = replay_buffer.uniform(start_key, len(images), images.shape[1:])
        chain_keys = jax.random.key_data(prng.for_examples(chain_key, len(images)))
        return mapped((variables, known), (np.asarray(chain_keys), np.asarray(start), images), batch_size)

    return inpaint


def masks(image_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What is known under each mask: the upper half, the left half, or all but the central square of half the side."""
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
