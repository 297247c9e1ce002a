"""A data set: images, labels and class names in three splits."""

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images and their labels."""

    images: np.ndarray
    """uint8 [N, H, W, C]"""
    labels: np.ndarray
    """int32 [N]"""

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, H, W, C], not {self.images.dtype} {self.images.shape}")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int32 [{len(self.images)}], not {self.labels.dtype} {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: np.ndarray) -> "Split":
        """The images and labels of those rows, in that order."""
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """A data set in its three splits."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of class names, images and labels, split by split in their order; the name does not count.

        It is computed at every start, from arrays, wherever these were read from. A hash that is kept by a file's time
        would be wrong where a tool copies the time along with other content.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(json.dumps(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels, "<i4").data)
        return digest.hexdigest()
