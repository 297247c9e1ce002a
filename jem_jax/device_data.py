"""How training images reach the devices: resident on each, or streamed batch by batch; the batches are the same."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np

from jem_jax import parallel
from jem_jax.config import Config
from jem_jax.datasets import Split
from jem_jax.datasets.batches import Stream, labelled_rows
from jem_jax.train_step import ResidentData, StreamedBatch

Array = jax.Array

_AHEAD = 2
"""batches that a stream prepares before they are asked for"""


class DeviceData(Protocol):
    """What iterations get their batches from."""

    streamed: bool

    def at(self, step: int) -> ResidentData | StreamedBatch:
        """What an iteration takes."""
        ...

    def close(self) -> None:
        """Ends what prepares batches ahead."""
        ...


class Order:
    """Which rows each iteration uses: the p(x) stream over all images, the labelled stream over those with labels."""

    def __init__(self, config: Config, labels: np.ndarray) -> None:
        self.batch_size = config.training.batch_size
        labelled = labelled_rows(labels, config.data.labels_per_class, config.data.labels_seed)
        self._rows = (np.arange(len(labels), dtype=np.int32), labelled)
        self._streams = [Stream(config.seed, i, len(rows), self.batch_size) for i, rows in enumerate(self._rows)]
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Iterations of an epoch of the p(x) stream."""
        return self._streams[0].steps_per_epoch

    def epoch(self, stream: int, step: int) -> tuple[int, np.ndarray]:
        """The stream's epoch at an iteration, and the rows of that epoch in order, [steps · B] int32."""
        number = step // self._streams[stream].steps_per_epoch
        with self._lock:
            if stream not in self._epochs or self._epochs[stream][0] != number:
                self._epochs[stream] = (number, self._rows[stream][self._streams[stream].order(number)])
            return self._epochs[stream]

    def batch(self, stream: int, step: int) -> np.ndarray:
        """The rows of an iteration's batch, [B] int32."""
        _, rows = self.epoch(stream, step)
        start = step % self._streams[stream].steps_per_epoch * self.batch_size
        return rows[start : start + self.batch_size]


def build(config: Config, split: Split, order: Order) -> DeviceData:
    """The images on every device where they fit (10 % of its memory, 1 GiB on a CPU), else streamed from the host."""
    return Resident(split, order) if is_resident(config, split) else Streamed(split, order)


def is_resident(config: Config, split: Split) -> bool:
    """Whether every device holds all images."""
    place = config.data.place
    return split.images.nbytes <= parallel.memory_for_data() if place == "auto" else place == "device"


class Resident:
    """Images on every device, and each epoch's order put there once."""

    streamed = False

    def __init__(self, split: Split, order: Order) -> None:
        self._order = order
        self._images, self._labels = parallel.replicate((split.images, split.labels))
        self._placed: dict[int, tuple[int, Array]] = {}

    def at(self, step: int) -> ResidentData:
        """What an iteration gathers its batches from."""
        return ResidentData(self._images, self._labels, self._rows(0, step), self._rows(1, step))

    def close(self) -> None:
        """Nothing is prepared ahead."""

    def _rows(self, stream: int, step: int) -> Array:
        number, rows = self._order.epoch(stream, step)
        if stream not in self._placed or self._placed[stream][0] != number:
            self._placed[stream] = (number, parallel.replicate(rows))
        return self._placed[stream][1]


class Streamed:
    """Batches gathered on the host by a thread, and sent to the devices ahead of their iteration."""

    streamed = True

    def __init__(self, split: Split, order: Order) -> None:
        self._split, self._order = split, order
        self._thread = ThreadPoolExecutor(1, "batches")
        self._coming: dict[int, Future[StreamedBatch]] = {}

    def at(self, step: int) -> StreamedBatch:
        """An iteration's batches, cut by device."""
        self._coming = {number: coming for number, coming in self._coming.items() if number >= step}
        for number in range(step, step + 1 + _AHEAD):
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self._gather, number)
        return self._coming[step].result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _gather(self, step: int) -> StreamedBatch:
        images, labels = self._split.images, self._split.labels
        rows, labelled = self._order.batch(0, step), self._order.batch(1, step)
        return StreamedBatch(
            *(parallel.shard_rows(array, which) for which in (rows, labelled) for array in (images, labels))
        )
