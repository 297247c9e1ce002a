"""One's own images in an .npz, read as plain arrays and never unpickled. Every error names the file and the key."""

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from jem_jax.common.errors import UserError, first_line, shown
from jem_jax.datasets import checks
from jem_jax.datasets.dataset import Dataset, Split
from jem_jax.datasets.held_out import Splits, with_tenths
from jem_jax.datasets.notices import say

_KEYS = (
    "images [N, H, W] or [N, H, W, C] uint8, labels [N]; optional test_images, test_labels, val_images, val_labels, "
    "class_names"
)
_PARTS = {"train": "", "test": "test_", "validation": "val_"}
"""parts and what their keys begin with"""
_WORDS = {
    **dict.fromkeys(("train", "training", "tr"), ""),
    **dict.fromkeys(("test", "testing", "te"), "test_"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val_"),
    **dict.fromkeys(("images", "image", "imgs", "img", "x", "data", "arr_0"), "images"),
    **dict.fromkeys(("labels", "label", "lbls", "lbl", "y", "targets", "target", "arr_1"), "labels"),
    **dict.fromkeys(("classes", "names", "label_names"), "class_names"),
}
"""what others call a part or an array, in lower case, and what that is in a key here"""
_LONGEST_NAME = 200
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""NumPy's own; Python unpacks others in whole blocks, however much is in them"""


def load(path: Path) -> Dataset:
    """The data set in an .npz of `np.savez` or `np.savez_compressed`.

    Keys: `images` [N, H, W] or [N, H, W, C] uint8, C 1 or 3; `labels` [N] integers from 0; optional `test_images` and
    `test_labels`, `val_images` and `val_labels`; optional `class_names` [K] strings. Missing parts are held out as
    `held_out.with_tenths` says. Other keys are named on the screen and not read.

    Raises:
      UserError: in one line, what is wrong with which key.
    """
    with _opened(path) as archive:
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
        _check_keys(path, keys)
        members = {key: _looked_at(archive, f"{path}: {key}", key) for key in _CHECKS if key in keys}
        _check_sizes(path, members)
        arrays = {key: _read(archive, member) for key, member in members.items()}
    splits = {part: _split(path, arrays, prefix) for part, prefix in _PARTS.items() if f"{prefix}images" in arrays}
    labels = splits["train"].labels
    names = _names(path, arrays["class_names"]) if "class_names" in arrays else _numbers(path, labels)
    for part, split in splits.items():
        checks.labels(f"{path}: {_PARTS[part]}labels", split.labels, len(names))
        checks.alike(str(path), splits["train"].images, split.images)
    checks.every_class(str(path), labels, names)
    return with_tenths(str(path), Splits(names, **splits))


def _check_keys(path: Path, keys: Set[str]) -> None:
    renamed = {key: meant for key in sorted(keys) if (meant := _meant(key)) and meant not in keys}
    hint = f". Rename {', '.join(f'{key} to {ours}' for key, ours in renamed.items())}" if renamed else ""
    missing = sorted({"images", "labels"} - keys)
    if missing:
        there = shown(", ".join(sorted(keys)) or "nothing")[1:-1]
        raise UserError(f"{path} has no key {missing[0]!r}; there are: {there}. It must hold {_KEYS}{hint}")
    for prefix in _PARTS.values():
        if len({f"{prefix}images", f"{prefix}labels"} & keys) == 1:
            raise UserError(f"{path} has only one of {prefix}images and {prefix}labels; give both or neither{hint}")
    unread = sorted(keys - _CHECKS.keys())
    if unread:
        say(f"{path}: not read: {shown(', '.join(unread))[1:-1]}{hint}")


def _meant(key: str) -> str | None:
    """The key that somebody's stands for, such as `test_images` for X_test, testX and te_img."""
    if key.lower() in _WORDS:
        return _WORDS[key.lower()]
    words = [_WORDS.get(word.lower(), "?") for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
    return next((meant for meant in map("".join, (words, words[::-1])) if meant in _CHECKS), None)


def _split(path: Path, arrays: Mapping[str, np.ndarray], prefix: str) -> Split:
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    # int32 would wrap larger numbers around.
    checks.labels(f"{path}: {prefix}labels", labels, 2**31)
    return Split(images if images.ndim == 4 else images[..., None], labels.astype(np.int32))


def _check_images(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    key = where.rpartition(" ")[2]
    if dtype != np.uint8:
        whole = f"; save {key}.astype(np.uint8) if they are whole numbers from 0 to 255" if dtype.kind in "iuf" else ""
        scaled = f", ({key} * 255).round().astype(np.uint8) if they are in [0, 1]" if dtype.kind == "f" else ""
        raise UserError(f"{where} must be uint8, 0 to 255, not {dtype}{whole}{scaled}")
    if len(shape) not in (3, 4):
        raise UserError(f"{where} must be [N, H, W] or [N, H, W, C], not {list(shape)}{_unflattened(key, shape)}")
    if len(shape) == 4 and shape[3] not in (1, 3):
        hint = ""
        if shape[1] in (1, 3):
            hint = f", and they come last: save {key}.transpose(0, 2, 3, 1)"
        elif shape[2] in (1, 3):
            hint = f", and the number of images comes first: save {key}.transpose(3, 0, 1, 2)"
        elif shape[3] == 4:
            hint = f"; save {key}[..., :3] to leave transparency out"
        raise UserError(f"{where} has {shape[3]} channels; images must have 1 (grey) or 3 (colour){hint}")
    checks.image_shape(where, shape if len(shape) == 4 else (*shape, 1))


def _unflattened(key: str, shape: tuple[int, ...]) -> str:
    """What makes square images of rows of pixels [N, H · W · C], as far as their number tells."""
    pixels = shape[1] if len(shape) == 2 else 0
    for channels in (1, 3):
        side = math.isqrt(pixels // channels)
        if side > 1 and side * side * channels == pixels:
            first = f", or {key}.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1) if all red comes first"
            grey = f"; save {key}.reshape(-1, {side}, {side}"
            return f"{grey})" if channels == 1 else f"{grey}, 3){first}"
    return ""


def _check_labels(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    key = where.rpartition(" ")[2]
    if len(shape) != 1:
        hint = f"{key}.argmax(axis=1)" if len(shape) == 2 and min(shape) > 1 else f"{key}.reshape(-1)"
        raise UserError(f"{where} must be [N], not {list(shape)}; save {hint}")
    if dtype.kind in "fb":
        only = " if they are whole numbers" if dtype.kind == "f" else ""
        raise UserError(f"{where} must be integers, not {dtype}; save {key}.astype(int){only}")
    if dtype.kind not in "iu":
        hint = f"; save np.unique({key}, return_inverse=True)[1], and class_names" if dtype.kind in "US" else ""
        raise UserError(f"{where} must be integers, not {dtype}{hint}")


def _check_names(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind != "U" or len(shape) != 1:
        hint = f"; save {where.rpartition(' ')[2]}.astype(str).reshape(-1)" if dtype.kind in "US" else ""
        raise UserError(f"{where} must be [K] strings, not {dtype} {list(shape)}{hint}")
    if dtype.itemsize > 4 * _LONGEST_NAME:
        raise UserError(f"{where} must be at most {_LONGEST_NAME} characters long, not {dtype.itemsize // 4:,}")


_CHECKS = {
    **{f"{prefix}images": _check_images for prefix in _PARTS.values()},
    **{f"{prefix}labels": _check_labels for prefix in _PARTS.values()},
    "class_names": _check_names,
}
"""key -> check of its shape and type; other keys are not read"""


def _names(path: Path, array: np.ndarray) -> tuple[str, ...]:
    names = tuple(array.tolist())
    checks.class_names(f"{path}: class_names", names)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path}: class_names holds {shown(twice)} more than once")
    return names


def _numbers(path: Path, labels: np.ndarray) -> tuple[str, ...]:
    """Class names where none are given: "0", "1" and so on. The labels must use each of them."""
    used = np.unique(labels)
    gaps = np.flatnonzero(used != np.arange(len(used)))
    if len(gaps):
        raise UserError(
            f"{path}: labels go up to {used[-1]} but none is {gaps[0]}; without class_names they must be 0 to K - 1 "
            "with none left out: save np.unique(labels, return_inverse=True)[1]"
        )
    return tuple(str(label) for label in used)


class _Member(NamedTuple):
    """An array by its header; nothing of the array itself is read or allocated yet."""

    where: str
    """its file and key, for errors"""
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    size: int
    """bytes"""


def _looked_at(archive: zipfile.ZipFile, where: str, key: str) -> _Member:
    info = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.namelist() else key)
    if info.compress_type not in _COMPRESSIONS:
        raise UserError(f"{where} is compressed in a way that NumPy never uses; write it with np.savez_compressed")
    with _named(where), archive.open(info) as file:
        # Version 3 differs in field names alone, which plain arrays have none of.
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        header = file.tell()
    if dtype.hasobject:
        raise UserError(f"{where} holds pickled objects, which are never read; save it as plain numbers or strings")
    _CHECKS[key](where, shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    if size != info.file_size - header:
        raise UserError(
            f"{where} is damaged: its header says {list(shape)} {dtype}, {size:,} bytes, and it holds "
            f"{info.file_size - header:,}"
        )
    return _Member(where, info, shape, size)


def _check_sizes(path: Path, members: Mapping[str, _Member]) -> None:
    """Checks that the arrays go together, and fit the memory together, before any is read."""
    for prefix in _PARTS.values():
        if f"{prefix}images" in members:
            images, labels = (members[f"{prefix}{what}"].shape[0] for what in ("images", "labels"))
            if images != labels:
                raise UserError(
                    f"{path}: {prefix}images holds {images} images and {prefix}labels {labels} labels; there must be "
                    "one for each"
                )
    if "class_names" in members:
        names, images = members["class_names"].shape[0], members["images"].shape[0]
        if names > images:
            raise UserError(f"{path}: class_names holds {names} names for {images} images; every class needs some")
    # Twice, since images are cut into parts, which are copies.
    checks.fits_memory(str(path), (2, sum(member.size for member in members.values())))


def _read(archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
    with _named(member.where), archive.open(member.info) as file:
        return npy.read_array(file, allow_pickle=False)


def _opened(path: Path) -> zipfile.ZipFile:
    checks.is_file(path)
    try:
        return zipfile.ZipFile(path)
    except Exception as error:
        raise UserError(f"{path} is not an .npz file, or it is truncated: {first_line(error)}") from error


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Names the damaged array."""
    try:
        yield
    except Exception as error:
        # NumPy hands a header to Python's parser, and zipfile its data to several unpackers. All raise errors of
        # their own.
        raise UserError(f"{where} is damaged: {first_line(error)}") from error
