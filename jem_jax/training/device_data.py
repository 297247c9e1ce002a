"""Training images on the devices: resident on each, or streamed in batches. Both give the same batches."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np

from jem_jax import class_gaussians, prng
from jem_jax.config import Config
from jem_jax.datasets import Split
from jem_jax.datasets.batches import Stream, labelled_rows
from jem_jax.distributed import devices
from jem_jax.training.quantities import chains, weights
from jem_jax.training.state import ResidentData, StreamedBatch

Array = jax.Array

_AHEAD = 2
"""batches that a stream prepares ahead"""
_STARTS_BYTES = 2**28


class DeviceData(Protocol):
    """The source of the iterations' batches."""

    streamed: bool

    def at(self, step: int) -> ResidentData | StreamedBatch:
        """The data of an iteration."""
        ...

    def close(self) -> None:
        """Ends the preparation of batches."""
        ...


class Order:
    """The rows of each iteration: the p(x) stream over all images, the labelled stream over labelled ones."""

    def __init__(self, config: Config, labels: np.ndarray) -> None:
        self.batch_sizes = config.training.batch_sizes
        labelled = labelled_rows(labels, config.data.labels_per_class, config.data.labels_seed)
        self._rows = (np.arange(len(labels), dtype=np.int32), labelled)
        self._streams = [
            Stream(config.seed, i, len(rows), size)
            for i, (rows, size) in enumerate(zip(self._rows, self.batch_sizes, strict=True))
        ]
        # The newest epochs of both streams. A thread may be one epoch ahead.
        self.in_epoch = functools.lru_cache(maxsize=4)(
            lambda stream, number, rows=self._rows, streams=self._streams: rows[stream][streams[stream].order(number)]
        )

    @property
    def steps_per_epoch(self) -> int:
        """Iterations of an epoch, in which the larger batch passes over the training images once.

        SADA-JEM's released code does the same: its p(x) stream takes half as many images (390 iterations on CIFAR-10).
        """
        return len(self._rows[0]) // max(self.batch_sizes)

    def epoch(self, stream: int, step: int) -> int:
        """The stream's epoch at an iteration; `in_epoch(stream, epoch)` are its rows in order, [steps · B] int32."""
        return step // self._streams[stream].steps_per_epoch

    def batch(self, stream: int, step: int) -> np.ndarray:
        """The rows of an iteration's batch, [B] int32."""
        rows = self.in_epoch(stream, self.epoch(stream, step))
        size = self.batch_sizes[stream]
        start = step % self._streams[stream].steps_per_epoch * size
        return rows[start : start + size]


class Starts:
    """Starts of fresh chains: draws from the classes' Gaussians, renewed every epoch.

    There are about as many as fresh chains in an epoch, and each chain takes one at random. Every start has the
    Gaussian's distribution. Two chains of an epoch may share one.
    """

    def __init__(self, config: Config, split: Split, order: Order, images: Array | None = None) -> None:
        self._order = order
        self._key = prng.stream(jax.random.key(config.seed), "class Gaussians")
        self._draws = draws(config, split, images)
        image_bytes = 4 * split.images[0].size
        self._flat = devices.flat(split.images.shape[1:])
        classes = int(split.labels.max()) + 1
        needed = config.sampler.reinit_prob * order.steps_per_epoch * chains(config)
        self._count = max(1, min(math.ceil(needed / classes), _STARTS_BYTES // (image_bytes * classes)))
        self._placed: tuple[int, Array] | None = None

    def at(self, step: int) -> Array:
        """The starts of an iteration's epoch [P, K, *flat], on every device."""
        epoch = step // self._order.steps_per_epoch
        if self._placed is None or self._placed[0] != epoch:
            starts = self._draws(jax.random.fold_in(self._key, epoch), self._count)
            self._placed = epoch, devices.replicate(starts.reshape(*starts.shape[:2], *self._flat))
        return self._placed[1]


def draws(config: Config, split: Split, images: Array | None = None) -> Callable[[Array, int], Array]:
    """The classes' Gaussians, fitted to the labelled images; see `class_gaussians.of_classes`."""
    rows = labelled_rows(split.labels, config.data.labels_per_class, config.data.labels_seed)
    return class_gaussians.of_classes(
        split.images if images is None else images, split.labels, rows, int(split.labels.max()) + 1
    )


def build(config: Config, split: Split, order: Order) -> DeviceData:
    """The images on every device where they fit (10 % of its memory, 1 GiB on a CPU), else streamed from the host."""
    from_gaussians = weights(config).needs_samples and config.sampler.init == "class_gaussians"
    if not is_resident(config, split):
        return Streamed(split, order, Starts(config, split, order) if from_gaussians else None)
    flat = split.images.reshape(len(split), *devices.flat(split.images.shape[1:]))
    images, labels = devices.replicate((flat, split.labels))
    # One device draws for all.
    starts = Starts(config, split, order, images.addressable_data(0)) if from_gaussians else None
    return Resident(images, labels, order, starts)


def is_resident(config: Config, split: Split) -> bool:
    """Whether every device holds all images."""
    setting = config.data.place
    return split.images.nbytes <= devices.memory_for_data() if setting == "auto" else setting == "device"


class Resident:
    """Images on every device, and each epoch's order put there once."""

    streamed = False

    def __init__(self, images: Array, labels: Array, order: Order, starts: Starts | None = None) -> None:
        self._images, self._labels, self._order, self._starts = images, labels, order, starts
        self._placed = functools.lru_cache(maxsize=2)(
            lambda stream, number: devices.replicate(order.in_epoch(stream, number))
        )

    def at(self, step: int) -> ResidentData:
        """The arrays from which an iteration gathers its batches."""
        starts = None if self._starts is None else self._starts.at(step)
        rows, labelled = (self._placed(stream, self._order.epoch(stream, step)) for stream in (0, 1))
        return ResidentData(self._images, self._labels, rows, labelled, starts)

    def close(self) -> None:
        """Does nothing: no batches are prepared ahead."""


class Streamed:
    """Batches gathered on the host by a thread, and sent to the devices ahead of their iteration."""

    streamed = True

    def __init__(self, split: Split, order: Order, starts: Starts | None = None) -> None:
        self._split, self._order, self._starts = split, order, starts
        self._thread = ThreadPoolExecutor(1, "batches")
        self._coming: dict[int, Future[StreamedBatch]] = {}

    def at(self, step: int) -> StreamedBatch:
        """An iteration's batches, cut by device."""
        self._coming = {number: coming for number, coming in self._coming.items() if number >= step}
        for number in range(step, step + 1 + _AHEAD):
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self._gather, number)
        batch = self._coming[step].result()
        return batch._replace(starts=self._starts.at(step)) if self._starts else batch

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _gather(self, step: int) -> StreamedBatch:
        images, labels = self._split.images, self._split.labels
        rows, labelled = self._order.batch(0, step), self._order.batch(1, step)
        return StreamedBatch(
            *(devices.shard_rows(array, which) for which in (rows, labelled) for array in (images, labels))
        )
