"""One's own images as files in class folders."""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from jem_jax.common import files
from jem_jax.common.errors import UserError, first_line, shown
from jem_jax.datasets import checks, resize
from jem_jax.datasets.dataset import Dataset, Split
from jem_jax.datasets.held_out import Splits, with_tenths
from jem_jax.datasets.notices import say

# Formats of pixels alone; others run programs (EPS: Ghostscript) or hold more than pixels.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP")
_UNMARKED_FORMATS = ("PCX", "TGA")
"""only the suffix tells such a file from others"""
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""words in names of folders of parts, in lower case"""
_BYTES_OF_A_PIXEL = 16
"""of a picture while it is read: as stored, composed over black, and in the data set's channels"""

_GREY_MODES = ("1", "L", "LA")
_EIGHT_BIT_MODES = (*_GREY_MODES, "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class _File:
    path: Path
    label: int
    grey: bool
    size: tuple[int, int]
    """width, height, as it is seen"""


def load(path: Path, image_size: int) -> Dataset:
    """The data set in a folder of class folders of image files, or of parts, each of those.

    Parts are `train`, `val` and `test`, or have names with such a word (`_PARTS`). Classes are numbered in the order of
    their names. Images are grey if all are, else RGB; transparent is black; photographs are turned upright. What no
    part is there for is held out as `held_out.with_tenths` says. What is left out is counted on the screen.

    Args:
      image_size: resize to this square (`resize.to_side`); 0: as they are, which is then one size.

    Raises:
      UserError: in one line, what is wrong with which folder or file.
    """
    folders = _parts(path)
    train_folder = folders["train"]
    names = tuple(folder.name for folder in _class_folders(train_folder))
    checks.class_names(str(train_folder), names)
    left_out: Counter[str] = Counter()
    if train_folder != path:
        left_out.update(map(_suffix, _other_files(path)))
    parts = {part: _files(folder, names, left_out, part == "train") for part, folder in folders.items()}
    _say_left_out(path, left_out)
    every = [file for part in parts.values() for file in part]
    checks.every_class(str(train_folder), np.array([file.label for file in parts["train"]], np.int64), names)
    channels = 1 if all(file.grey for file in every) else 3
    width, height = (image_size, image_size) if image_size else _one_size(every)
    shape = (height, width, channels)
    # Twice, since they are cut into parts, which are copies.
    checks.fits_memory(f"{path}: {len(every)} images of {_times((width, height))}", (2, len(every), *shape))
    return with_tenths(str(path), Splits(names, **{part: _split(members, shape) for part, members in parts.items()}))


def _parts(path: Path) -> dict[str, Path]:
    """The folders of class folders, by part; `train` is a class like any other if it holds images itself."""
    folders = _folders(path)
    by_part: dict[str, list[Path]] = {}
    for folder in folders:
        by_part.setdefault(_part(folder.name), []).append(folder)
    others = by_part.pop("", [])
    if not any(map(_folders, by_part.get("train", []))):
        return {"train": path}
    for first, *more in by_part.values():
        if more:
            raise UserError(f"{path} holds {first.name!r} and {more[0].name!r}, which are one part; keep one of them")
    parts = {part: same[0] for part, same in by_part.items()}
    classes = {folder.name for folder in _folders(parts["train"])}
    for folder in others:
        if classes & {inner.name for inner in _folders(folder)} or any(map(_is_image, _other_files(folder))):
            raise UserError(
                f"{path} holds {folder.name!r} beside {parts['train'].name}; only parts are read "
                f"({', '.join(_PARTS)}); move it elsewhere"
            )
    if others:
        say(f"{path}: not read: {shown(', '.join(folder.name for folder in others))[1:-1]}")
    return parts


def _part(name: str) -> str:
    """Which part a folder of that name is: test, Testing, test_set, imagesTest and seg-test are one; empty: none."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    parts = {_PARTS.get(word.lower().removesuffix("set"), "") for word in words} - {""}
    return parts.pop() if len(parts) == 1 else ""


def _class_folders(path: Path) -> list[Path]:
    folders = _folders(path)
    if not folders:
        raise UserError(f"{path} holds no class folders; it must hold a folder of images for each class")
    return folders


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not files.is_litter(entry) and entry.is_dir())


def _other_files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not files.is_litter(entry) and not entry.is_dir())


def _files(path: Path, names: Sequence[str], left_out: Counter[str], every_class: bool) -> list[_File]:
    """The images in class folders. Other files are counted in `left_out`, by suffix."""
    members: list[_File] = []
    numbers = {name: number for number, name in enumerate(names)}
    left_out.update(map(_suffix, _other_files(path)))
    for folder in _class_folders(path):
        if folder.name not in numbers:
            there = shown(", ".join(names))[1:-1]
            raise UserError(f"{folder} is a class that train does not have; there are: {there}")
        images = []
        for file in _other_files(folder):
            if _is_image(file):
                images.append(_look(file, numbers[folder.name]))
            else:
                left_out[_suffix(file)] += 1
        left_out["in deeper folders"] += sum(len(_other_files(deeper)) for deeper in _folders(folder))
        if not images and every_class:
            deeper = "".join(f"the folder {shown(inner.name)} and " for inner in _folders(folder)[:1])
            raise UserError(
                f"class folder {folder} holds {deeper}no images itself; {path} must hold a folder of images for each "
                "class, or parts (train, val, test) that do"
            )
        members += images
    if not members:
        raise UserError(f"{path} holds no images ({', '.join(_suffixes())})")
    return members


def _say_left_out(path: Path, left_out: Counter[str]) -> None:
    count = left_out.total()
    if count:
        kinds = ", ".join(f"{number} {kind}" for kind, number in left_out.most_common() if number)
        say(f"{path}: {count} file{'s are' if count > 1 else ' is'} left out: {kinds}")


def _suffix(path: Path) -> str:
    return path.suffix.lower() or "without suffix"


@functools.cache
def _suffixes() -> list[str]:
    """Suffixes of the formats that this Pillow reads."""
    known = Image.registered_extensions()
    return sorted({suffix for suffix, kind in known.items() if kind in _formats(*_FORMATS, *_UNMARKED_FORMATS)})


def _formats(*names: str) -> tuple[str, ...]:
    """The formats that this Pillow reads. Some need a library that it may have been built without."""
    Image.init()
    return tuple(name for name in names if name in Image.OPEN)


def _is_image(path: Path) -> bool:
    """By its suffix, or by how its content begins."""
    if path.suffix.lower() in _suffixes():
        return True
    try:
        checks.is_file(path)
        with Image.open(path, formats=_formats(*_FORMATS)):
            return True
    except Exception:
        return False


def _look(path: Path, label: int) -> _File:
    """An image by its header; the pixels are not read yet."""
    checks.is_file(path)
    try:
        with _opened(path) as image:
            mode = image.mode
            # Of a TIFF, Pillow gives the size upright from version 11 on.
            size = (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size
            # A PNG's orientation may come behind the pixels, so `getexif` reads them all.
            checks.fits_memory(f"{path} of {_times(size)}, while it is read,", (*size, _BYTES_OF_A_PIXEL))
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    if mode not in _EIGHT_BIT_MODES:
        raise UserError(f"{path} has pixels of kind {mode!r}; images must have 8 bits a channel")
    return _File(path, label, mode in _GREY_MODES, size[::-1] if turned else size)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of at most the pixels that Pillow allows. For up to twice as many it would only warn."""
    with warnings.catch_warnings():
        # Pillow warns of odd tags, which change no pixel.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_formats(*_FORMATS, *_UNMARKED_FORMATS)) as image:
            yield image


def _one_size(every: Sequence[_File]) -> tuple[int, int]:
    other = next((file for file in every if file.size != every[0].size), None)
    if other is not None:
        raise UserError(
            f"{other.path} is {_times(other.size)} and {every[0].path} {_times(every[0].size)}; images of several "
            "sizes need --config.data.image_size=N to be resized"
        )
    return every[0].size


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _split(members: Sequence[_File], shape: tuple[int, int, int]) -> Split:
    images = np.empty((len(members), *shape), np.uint8)
    for number, file in enumerate(members):
        images[number] = _read(file.path, shape)
    return Split(images, np.array([file.label for file in members], np.int32))


def _read(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    try:
        with _opened(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            image = image.convert("L" if channels == 1 else "RGB")
            return resize.from_picture(image if image.size == (width, height) else resize.to_side(image, width))
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    """Pillow and its plug-ins raise almost anything where a file is damaged."""
    return UserError(f"{path} cannot be read as an image: {first_line(error)}")
