"""Checks of foreign images and labels. Each error is a line that names the file."""

import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jem_jax.common.errors import UserError, shown
from jem_jax.datasets.dataset import Dataset

STRIDE = 4
"""the network halves the side twice"""


def is_file(path: Path) -> None:
    """Checks before a path is opened that a file is there: a pipe would wait for someone who writes, for good.

    Raises:
      UserError: it is something else, or nothing, or out of reach.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} cannot be read: it is not a file")


def image_shape(where: str, shape: Sequence[int]) -> None:
    """Checks [N, H, W, C].

    Raises:
      UserError: there are no images, or they have no pixels or a number of channels that is not 1 or 3.
    """
    if 0 in shape:
        raise UserError(f"{where} has the shape {list(shape)}: there is nothing in it")
    if shape[-1] not in (1, 3):
        raise UserError(f"{where} has {shape[-1]} channels; images must have 1 (grey) or 3 (colour)")


def alike(where: str, train: np.ndarray, other: np.ndarray) -> None:
    """Checks that images to test or validate on [N, H, W, C] are as those to train on.

    Raises:
      UserError: with both shapes.
    """
    if other.shape[1:] != train.shape[1:]:
        raise UserError(
            f"{where}: images to train on are {list(train.shape[1:])}, others {list(other.shape[1:])}; they must be of "
            "one shape"
        )


def sides(dataset: Dataset) -> None:
    """Checks that the network can halve the images' sides twice.

    Raises:
      UserError: with a size that would do.
    """
    height, width, _ = dataset.image_shape
    if height % STRIDE or width % STRIDE:
        near = max(STRIDE, round(max(height, width) / STRIDE) * STRIDE)
        raise UserError(
            f"config.data.name {dataset.name}: the images are {width}×{height}, and their sides must be multiples of "
            f"{STRIDE}; they are resized with --config.data.image_size={near}"
        )


def labels(where: str, values: np.ndarray, num_classes: int) -> None:
    """Checks [N] integers against the number of classes.

    Raises:
      UserError: the first label that is out of range, and its row.
    """
    wrong = np.flatnonzero((values < 0) | (values >= num_classes))
    if len(wrong):
        raise UserError(
            f"{where} must be from 0 to {num_classes - 1}; row {wrong[0]} is {values[wrong[0]]}"
            + (f", and {len(wrong) - 1} more are out of range" if len(wrong) > 1 else "")
        )


def every_class(where: str, values: np.ndarray, class_names: Sequence[str]) -> None:
    """Checks that there are at least two classes, and training images of each.

    Raises:
      UserError: the class that has none.
    """
    if len(class_names) < 2:
        raise UserError(f"{where} has {len(class_names)} class; at least 2 are needed")
    empty = np.flatnonzero(np.bincount(values, minlength=len(class_names)) == 0)
    if len(empty):
        raise UserError(f"{where} has no image of class {empty[0]} ({class_names[empty[0]]}); every class needs some")


def class_names(where: str, names: Iterable[str]) -> None:
    """Checks that names can be written down.

    Raises:
      UserError: the first that is not Unicode text.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {shown(name)} is no Unicode text (UTF-8); give it another name") from error


def fits_memory(where: str, shape: Iterable[int]) -> None:
    """Checks before it is allocated that an array of bytes fits this machine's memory.

    Raises:
      UserError: with both sizes.
    """
    size = math.prod(map(int, shape))
    if size > memory():
        raise UserError(
            f"{where} would take {size / 2**30:,.1f} GiB, and this machine has {memory() / 2**30:,.1f} GiB of memory; "
            "take fewer images, or smaller ones with --config.data.image_size=N"
        )


def memory() -> int:
    """Bytes of memory that this process may use at most: the machine's, or its container's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        # No container, or one without a limit ("max").
        return machine
