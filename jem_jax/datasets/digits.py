"""1,797 handwritten digits, 8×8 grey, that scikit-learn carries with it: no download.

Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
"""

import importlib.util
from pathlib import Path

import numpy as np

from jem_jax.datasets.dataset import Dataset, Split
from jem_jax.datasets.held_out import cut

NAME = "digits"
TRAIN, VALIDATION = 1167, 130


def load() -> Dataset:
    """The digits, shuffled once and for all: 1,167 train, 130 validation, 500 test, whatever the run's seed."""
    numbers = np.loadtxt(_file(), delimiter=",")
    # The originals count dark pixels, 0 to 16; a row ends with the label.
    images = np.round(numbers[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = numbers[:, -1].astype(np.int32)
    order = np.random.RandomState(0).permutation(len(images))
    return Dataset(NAME, tuple("0123456789"), *cut(Split(images, labels), order, [TRAIN, VALIDATION]))


def _file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads: that function takes two seconds to import."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
