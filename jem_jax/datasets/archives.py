"""The layouts of the official archives: bytes -> images and labels, in the archive's order, without TensorFlow."""

import functools
import gzip
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jem_jax.common.errors import UserError
from jem_jax.datasets.dataset import Split
from jem_jax.datasets.held_out import Splits

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Layout(NamedTuple):
    """The contents of a source's archives."""

    description: str
    read: Callable[..., Splits]
    """paths of the archives, in their order -> the official train and test images"""


def read(layout: Layout, paths: Sequence[Path]) -> Splits:
    """The official train and test images of a data set.

    Args:
      paths: of its archives, in the layout's order.

    Raises:
      UserError: an archive is not of that layout.
    """
    try:
        return layout.read(*paths)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names}: not in the layout expected ({layout.description}): {error}") from error


def _cifar10(path: Path) -> Splits:
    files = _tar(path)
    train = b"".join(files[f"data_batch_{number}.bin"] for number in range(1, 6))
    return Splits(
        class_names=_lines(files["batches.meta.txt"]),
        train=_records(train, label_bytes=1),
        test=_records(files["test_batch.bin"], label_bytes=1),
    )


def _cifar100(path: Path) -> Splits:
    files = _tar(path)
    return Splits(
        class_names=_lines(files["fine_label_names.txt"]),
        train=_records(files["train.bin"], label_bytes=2),
        test=_records(files["test.bin"], label_bytes=2),
    )


def _svhn(train: Path, test: Path) -> Splits:
    return Splits(_DIGITS, _mat(train), _mat(test))


def _idx_files(class_names: tuple[str, ...], *paths: Path) -> Splits:
    train_images, train_labels, test_images, test_labels = map(_idx, paths)
    return Splits(
        class_names,
        Split(train_images[..., None], train_labels.astype(np.int32)),
        Split(test_images[..., None], test_labels.astype(np.int32)),
    )


def _tar(path: Path) -> dict[str, bytes]:
    """The files of an archive by their plain names; nothing is extracted to disk."""
    with tarfile.open(path, "r:gz") as archive:
        members = ((member, archive.extractfile(member)) for member in archive if member.isfile())
        return {Path(member.name).name: file.read() for member, file in members if file is not None}


def _lines(text: bytes) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.decode("ascii").splitlines() if line.strip())


def _records(data: bytes, label_bytes: int) -> Split:
    """CIFAR's records; of several labels the last is the class (CIFAR-100's fine label)."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
    planes = rows[:, label_bytes:].reshape(-1, 3, 32, 32)
    return Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), rows[:, label_bytes - 1].astype(np.int32))


def _mat(path: Path) -> Split:
    from scipy.io import loadmat

    content = loadmat(path, variable_names=("X", "y"))
    labels = content["y"].reshape(-1).astype(np.int32) % 10
    return Split(np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2)), labels)


def _idx(path: Path) -> np.ndarray:
    """An idx file of bytes: two zeros, the type 8, the number of dimensions, each dimension as big-endian int32."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} does not start as an idx file of bytes")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


_IDX = "gzipped idx files: train images, train labels, test images, test labels"
CIFAR10 = Layout("one tar.gz of records: label, 3 × 32 × 32 bytes", _cifar10)
CIFAR100 = Layout("one tar.gz of records: coarse label, fine label, 3 × 32 × 32 bytes", _cifar100)
SVHN = Layout("MATLAB files of train and test: X [32, 32, 3, N], y [N, 1] with 10 for the digit 0", _svhn)
MNIST = Layout(_IDX, functools.partial(_idx_files, _DIGITS))
FASHION_MNIST = Layout(_IDX, functools.partial(_idx_files, _CLOTHES))
