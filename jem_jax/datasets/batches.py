"""The order in which a stream of examples passes by: a function of seed, epoch and stream alone."""

import numpy as np


class Stream:
    """Epochs of shuffled batches over `count` examples.

    An epoch is one permutation, its last partial batch dropped. Where there are fewer examples than a batch holds, an
    epoch is as many permutations as fill one batch.

    Args:
      seed: the run's.
      stream: tells streams of one run apart (0: p(x), 1: labelled).
      count: examples.
      batch_size: of all devices together.
    """

    def __init__(self, seed: int, stream: int, count: int, batch_size: int) -> None:
        self._entropy = (seed, stream)
        self._count = count
        self._repeats = -(-batch_size // count)
        self.steps_per_epoch = count * self._repeats // batch_size
        self._length = self.steps_per_epoch * batch_size

    def order(self, epoch: int) -> np.ndarray:
        """[steps_per_epoch · batch_size] int32 indices of an epoch's examples."""
        random = np.random.default_rng((*self._entropy, epoch))
        permutations = [random.permutation(self._count) for _ in range(self._repeats)]
        return np.concatenate(permutations)[: self._length].astype(np.int32)


def labelled_rows(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """The rows whose labels are used: `per_class` of each class, drawn by a seed; all where `per_class` is 0.

    Args:
      labels: [N] integers.

    Returns:
      [n] int32, in increasing order.

    Raises:
      ValueError: a class has fewer examples.
    """
    if per_class == 0:
        return np.arange(len(labels), dtype=np.int32)
    random = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(f"class {label} has {len(rows)} training images, fewer than {per_class}")
        chosen.append(random.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(chosen)).astype(np.int32)
