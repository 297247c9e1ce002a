"""The images held out of training. They depend on the data alone, never on the run's seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jem_jax.common.errors import UserError
from jem_jax.datasets.dataset import Dataset, Split


@dataclass(frozen=True)
class Splits:
    """A data set as it came; a split that is None is still to be held out of the training images."""

    class_names: tuple[str, ...]
    train: Split
    test: Split | None = None
    validation: Split | None = None


def cut(split: Split, order: np.ndarray, counts: Sequence[int]) -> list[Split]:
    """Splits of the given sizes, in an order of the rows, and one of what is left, which keeps that order.

    Args:
      order: [N] a permutation.
      counts: the sizes, less than N together.
    """
    return [split.rows(rows) for rows in np.split(order, np.cumsum(counts))]


def official_order(count: int) -> np.ndarray:
    """[count] the permutation whose first images the official JEM code holds out: NumPy's legacy seed 1234.

    It says something only of images in the order of the official archives. A checkpoint of that code has then never
    seen the validation images of this one.
    """
    return np.random.RandomState(1234).permutation(count)


def even_order(labels: np.ndarray) -> np.ndarray:
    """[N] a permutation by a fixed seed (0) in which every stretch holds the classes in about their proportions.

    One image of each class comes last, so that what is cut off the front leaves every class some.
    """
    random = np.random.default_rng(0)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        position[rows] = (np.arange(len(rows)) + random.random()) / len(rows)
        position[rows[-1]] = 1
    return np.argsort(position, kind="stable")


def with_tenths(name: str, parts: Splits) -> Dataset:
    """The data set, with a tenth of its training images for each of validation and test that it has no part for.

    A validation part alone is the one to test on, and others are held out to validate on.

    Raises:
      UserError: there are too few images to hold any out.
    """
    if parts.test is None:
        parts = Splits(parts.class_names, parts.train, test=parts.validation)
    missing = sum(part is None for part in (parts.validation, parts.test))
    tenth = max(1, round(len(parts.train) / 10))
    if len(parts.train) < missing * tenth + len(parts.class_names):
        raise UserError(
            f"config.data.name {name}: its {len(parts.train)} images are too few to hold some out and leave "
            "every class one"
        )
    *held, train = cut(parts.train, even_order(parts.train.labels), [tenth] * missing)
    validation = held.pop(0) if parts.validation is None else parts.validation
    test = held.pop(0) if parts.test is None else parts.test
    return Dataset(name, parts.class_names, train=train, validation=validation, test=test)
