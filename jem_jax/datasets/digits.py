"""1,797 handwritten digits, 8×8 grey, that scikit-learn carries with it: no download.

Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
"""

import numpy as np

from jem_jax.datasets.splits import Dataset, Split

NAME = "digits"
TRAIN, VALIDATION = 1167, 130


def load() -> Dataset:
    """The digits, shuffled once and for all: 1,167 train, 130 validation, 500 test, whatever the run's seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The originals count dark pixels, 0 to 16.
    images = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(images))
    train, validation, test = np.split(order, [TRAIN, TRAIN + VALIDATION])
    return Dataset(
        name=NAME,
        class_names=tuple(str(digit) for digit in range(10)),
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(images[test], labels[test]),
    )
