"""Samples of the model: chains that start from noise, and the replay buffer's."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jem_jax import energy, prng, replay_buffer, sgld
from jem_jax.distributed import devices
from jem_jax.training.network import Network, Variables

Array = jax.Array


def sampler(network: Network, *, conditional: bool, **settings: Any) -> Callable[..., np.ndarray]:
    """A sampler of chains that start from U(-1, 1), or where they are told to.

    Args:
      network: gives the logits.
      conditional: follow ∇_x f(x)[y] of a given class rather than ∇_x log p~(x).
      **settings: keyword arguments of `sgld.chain`.

    Returns:
      (variables, key, classes [N] int32, image_shape, batch_size, start=None) -> samples [N, H, W, C] float32,
      unclipped; `start` [N, H, W, C] takes the place of U(-1, 1).
      An example's chain depends on the key and its place among the N alone.
    """

    def run(variables: Variables, examples: tuple[Array, Array, Array]) -> Array:
        chain_keys, classes, start = examples
        logits_fn = lambda x: network.logits(variables, x)  # noqa: E731
        density = energy.conditional(logits_fn, classes) if conditional else energy.marginal(logits_fn)
        return sgld.chain(jax.random.wrap_key_data(chain_keys), density, start, **settings)

    mapped = devices.over_examples(run)

    def sample(
        variables: Variables,
        key: Array,
        classes: np.ndarray,
        image_shape: tuple[int, ...],
        batch_size: int,
        start: np.ndarray | None = None,
    ) -> np.ndarray:
        start_key, chain_key = jax.random.split(key)
        if start is None:
            start = np.asarray(replay_buffer.uniform(start_key, len(classes), image_shape))
        chain_keys = jax.random.key_data(prng.for_examples(chain_key, len(classes)))
        return mapped(variables, (chain_keys, classes, start), batch_size)

    return sample


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


def film(network: Network, *, num_steps: int, every: int, **settings: Any) -> Callable[..., np.ndarray]:
    """Chains with what lay on their way.

    Args:
      network: gives the logits.
      num_steps, every, **settings: as of `sgld.trajectory`.

    Returns:
      (variables, key, count, image_shape, start) -> [count, num_steps // every + 1, H, W, C], from `start`
      [count, H, W, C], or from U(-1, 1) where it is None.
    """

    def run(variables: Variables, examples: tuple[Array, Array]) -> Array:
        chain_keys, start = examples
        density = energy.marginal(lambda x: network.logits(variables, x))
        states = sgld.trajectory(
            jax.random.wrap_key_data(chain_keys), density, start, num_steps=num_steps, every=every, **settings
        )
        return states.swapaxes(0, 1)

    mapped = devices.over_examples(run)

    def sample(
        variables: Variables, key: Array, count: int, image_shape: tuple[int, ...], start: np.ndarray | None = None
    ) -> np.ndarray:
        start_key, chain_key = jax.random.split(key)
        if start is None:
            start = np.asarray(replay_buffer.uniform(start_key, count, image_shape))
        chain_keys = jax.random.key_data(prng.for_examples(chain_key, count))
        return mapped(variables, (np.asarray(chain_keys), start), count)

    return sample
