"""Batch norm's statistics for evaluation, re-estimated from plain training images.

Running statistics follow the newest training batches: augmented images, at parameters that have moved since. Averaged
parameters have no statistics of their own. Here the evaluated parameters see plain images, batch by batch, and the
statistics are the mean of the batches' own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import prng
from jem_jax.augment import to_float
from jem_jax.datasets import Split
from jem_jax.distributed import devices
from jem_jax.training.network import Network, Variables

Array = jax.Array

COLLECTION = "batch_stats"
"""Flax's name for statistics that a layer keeps of its batches"""
_BATCH = 200
"""images of a pass, on any number of devices"""
_DIGITS = 6
"""decimals to which a layer's momentum is rounded; settings have fewer"""


def has_statistics(variables: Variables) -> bool:
    """Whether a network keeps batch statistics."""
    return bool(jax.tree.leaves(variables.get(COLLECTION, {})))


def estimator(network: Network, split: Split, count: int, seed: int) -> Callable[[Variables], Any]:
    """A function that re-estimates a network's batch statistics.

    Args:
      network: one that keeps statistics.
      split: training images; the same `count` of them are used every time.
      count: how many, cut to whole batches of 200 (or one batch of fewer).
      seed: the run's, which says which images.

    Returns:
      Variables with the parameters to be evaluated -> the collection "batch_stats" for them: for each statistic the
      mean over the batches, the variance as the layer itself has it (unbiased in ours).
    """
    size = min(_BATCH, count, len(split))
    rows = prng.host_generator(seed, "statistics").permutation(len(split))[: min(count, len(split)) // size * size]
    batches = split.images[rows].reshape(-1, size, *split.images.shape[1:])

    def one_pass(variables: Variables, images: Array) -> Any:
        key = jax.random.key(0)
        return network.train_logits(variables, [to_float(images)], key)[1][COLLECTION]

    def share(variables: Variables, images: Array, weight: Array) -> Any:
        """A pass's weighted statistics, and the weight that it leaves the old ones; both are means over devices.

        A pass from zeros gives the first. The difference to a pass from ones is the second.
        """
        zeros, ones = (_filled(variables[COLLECTION], value) for value in (0, 1))
        news = one_pass({**variables, COLLECTION: zeros}, images)
        old_shares = jax.tree.map(jnp.subtract, one_pass({**variables, COLLECTION: ones}, images), news)
        return devices.mean((jax.tree.map(lambda new: new * weight, news), old_shares))

    mapped = devices.per_device(share, in_axes=(None, 0, 0), out_axes=None)
    places = devices.count()

    def estimate(variables: Variables) -> Any:
        total, old_shares = None, None
        for start in range(0, len(batches), places):
            chosen = np.arange(start, start + places)
            weight = (chosen < len(batches)).astype(np.float32)
            images = devices.shard_rows(batches, np.minimum(chosen, len(batches) - 1))
            news, old_shares = mapped(variables, images.reshape(-1, *batches.shape[1:]), devices.shard_each(weight))
            total = news if total is None else jax.tree.map(jnp.add, total, news)
        means = jax.tree.map(lambda new, old: _without_momentum(new * (places / len(batches)), old), total, old_shares)
        # A checkpoint holds the statistics in the network's own precision.
        return jax.tree_util.tree_map_with_path(
            lambda path, own, mean: mean.astype(own.dtype) if _is_moment(path, own) else own,
            variables[COLLECTION],
            means,
        )

    return estimate


def _filled(statistics: Any, value: int) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, value) if _is_moment(path, leaf) else leaf, statistics
    )


def _is_moment(path: tuple[Any, ...], leaf: Array) -> bool:
    """Whether a leaf is a batch's mean or variance, as batch norm names them; spectral norm has other names."""
    return getattr(path[-1], "key", None) in ("mean", "var") and jnp.issubdtype(leaf.dtype, jnp.floating)


@jax.jit
def _without_momentum(new: Array, old_share: Array) -> Array:
    """The statistics s of a batch, from the layer's update (1 - m)·s and the share m of its old statistics."""
    return new / (1 - jnp.round(old_share, _DIGITS))
