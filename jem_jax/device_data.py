"""Training images on every device, and each epoch's order put there once."""

import jax
import numpy as np

from jem_jax import parallel
from jem_jax.config import Config
from jem_jax.datasets import Split
from jem_jax.datasets.batches import Stream, labelled_rows
from jem_jax.train_step import TrainingData

Array = jax.Array


class DeviceData:
    """What iterations gather their batches from: the p(x) stream and the labelled stream over the same images."""

    def __init__(self, config: Config, split: Split) -> None:
        self._batch_size = config.training.batch_size
        labelled = labelled_rows(split.labels, config.data.labels_per_class, config.data.labels_seed)
        self._rows = (np.arange(len(split), dtype=np.int32), labelled)
        self._streams = [Stream(config.seed, i, len(rows), self._batch_size) for i, rows in enumerate(self._rows)]
        self._images, self._labels = parallel.replicate((split.images, split.labels))
        self._orders: dict[int, tuple[int, Array]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Iterations of an epoch of the p(x) stream."""
        return self._streams[0].steps_per_epoch

    def first_rows(self) -> np.ndarray:
        """[B] the rows of the first batch of the p(x) stream."""
        return self._streams[0].order(0)[: self._batch_size]

    def at(self, step: int) -> TrainingData:
        """What an iteration gathers its batches from."""
        return TrainingData(self._images, self._labels, self._order(0, step), self._order(1, step))

    def _order(self, number: int, step: int) -> Array:
        stream = self._streams[number]
        epoch = step // stream.steps_per_epoch
        if number not in self._orders or self._orders[number][0] != epoch:
            self._orders[number] = (epoch, parallel.replicate(self._rows[number][stream.order(epoch)]))
        return self._orders[number][1]
