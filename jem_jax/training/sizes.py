"""Whether batch, buffer, images and devices fit together."""

import numpy as np

from jem_jax.common.errors import UserError
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices
from jem_jax.training import quantities

_MOST_ITERATIONS = 2**31 - 3
"""they are counted in int32, and the last two numbers seed what comes before the first"""


def buffer_size(config: Config, num_classes: int) -> tuple[int, int]:
    """Slots [S] and class axis [C] of the replay buffer; no slots where the objective needs no negatives."""
    terms = quantities.weights(config)
    if not terms.needs_samples:
        return 0, 1
    classes = quantities.buffer_classes(config, num_classes)
    return config.sampler.buffer_size // classes, classes


def check(config: Config, dataset: Dataset) -> None:
    """Checks what needs the data set and the devices to be known.

    Raises:
      UserError: a size that does not fit, with the nearest that does.
    """
    count = devices.count()
    batches = {"config.training.batch_size": config.training.batch_size}
    if config.training.labelled_batch_size:
        batches["config.training.labelled_batch_size"] = config.training.labelled_batch_size
    for name, batch in batches.items():
        if batch > len(dataset.train):
            raise UserError(f"{name} {batch} is larger than the {len(dataset.train)} training images")
    per_epoch = len(dataset.train) // max(config.training.batch_sizes)
    if config.training.epochs * per_epoch > _MOST_ITERATIONS:
        raise UserError(
            f"config.training.epochs {config.training.epochs} would be {config.training.epochs * per_epoch:,} "
            f"iterations, more than can be counted ({_MOST_ITERATIONS:,}); it must be at most "
            f"{_MOST_ITERATIONS // per_epoch}"
        )
    fewest = int(np.bincount(dataset.train.labels, minlength=dataset.num_classes).min())
    if config.data.labels_per_class > fewest:
        raise UserError(
            f"config.data.labels_per_class {config.data.labels_per_class} is more than the {fewest} training images of "
            "the smallest class"
        )
    if config.data.pad_mode == "reflect" and config.data.pad >= min(dataset.image_shape[:2]):
        raise UserError(
            f"config.data.pad must be less than the images' side {min(dataset.image_shape[:2])} to reflect, "
            f"not {config.data.pad}"
        )
    for name, batch in batches.items():
        if batch % count:
            raise UserError(_indivisible(name, batch, count, f"the {count} devices"))
    terms = quantities.weights(config)
    if not terms.needs_samples:
        return
    slots, classes = buffer_size(config, dataset.num_classes)
    size = config.sampler.buffer_size
    for name, chains in batches.items():
        drawn = terms.needs_negatives if name == "config.training.batch_size" else terms.needs_conditional_negatives
        if drawn and slots < chains:
            raise UserError(
                f"config.sampler.buffer_size {size} gives {slots} slots a class, fewer than {name} {chains}; it must "
                f"be at least {chains * classes}"
            )
    if size % (classes * count):
        whom = f"the {count} devices" if classes == 1 else f"{classes} classes × {count} devices"
        raise UserError(_indivisible("config.sampler.buffer_size", size, classes * count, whom))


def _indivisible(name: str, value: int, divisor: int, whom: str) -> str:
    lower, upper = value // divisor * divisor, -(-value // divisor) * divisor
    nearest = f"{lower} and {upper} do" if lower else f"{upper} does"
    return f"{name} {value} does not divide among {whom}; {nearest}"
