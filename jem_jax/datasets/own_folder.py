"""One's own images as files in class folders."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jem_jax.common.errors import UserError, in_a_line, shown
from jem_jax.datasets import checks, resize
from jem_jax.datasets.dataset import Dataset, Split
from jem_jax.datasets.held_out import Parts, with_tenths

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# The formats of these suffixes; others run programs (EPS: Ghostscript) or read more than pixels.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_BYTES_OF_A_PIXEL = 16
"""of a picture while it is read: as it was, composed over black, in the channels that are wanted"""

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
    """The data set in a folder of class folders of image files, or of `train` and `test`, each of those.

    Classes are numbered in the order of their names. Images are grey if all are, else RGB; transparent is black.
    A tenth of the images is held out for validation, and another for testing where there is no test folder, always the
    same ones (`held_out.even_order`).

    Args:
      image_size: resize to this square (`resize.to_side`); 0: as they are, which is then one size.

    Raises:
      UserError: in one line, what is wrong with which folder or file.
    """
    train_folder, test_folder = _parts(path)
    names = tuple(folder.name for folder in _class_folders(train_folder))
    checks.class_names(str(train_folder), names)
    train = _files(train_folder, names)
    test = _files(test_folder, names) if test_folder else []
    checks.every_class(str(train_folder), np.array([file.label for file in train], np.int64), names)
    channels = 1 if all(file.grey for file in (*train, *test)) else 3
    width, height = (image_size, image_size) if image_size else _one_size((*train, *test))
    shape = (height, width, channels)
    count = len(train) + len(test)
    # Twice, since they are cut into parts, which are copies.
    checks.fits_memory(f"{path}: {count} images of {_times((width, height))}", (2, count, *shape))
    parts = Parts(names, _split(train, shape), _split(test, shape) if test else None)
    return with_tenths(str(path), parts)


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The folders of classes to train and to test on; `train` is a class like any other if it holds images itself."""
    train, test = path / "train", path / "test"
    if not train.is_dir() or not _folders(train):
        return path, None
    others = [folder.name for folder in _folders(path) if folder not in (train, test)]
    if others:
        raise UserError(f"{path} holds {others[0]!r} beside train; only train and test are read, move it elsewhere")
    return train, test if test.is_dir() else None


def _class_folders(path: Path) -> list[Path]:
    folders = _folders(path)
    if not folders:
        raise UserError(f"{path} holds no class folders; it must hold a folder of images for each class")
    return folders


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(path: Path, names: Sequence[str]) -> list[_File]:
    files = []
    numbers = {name: number for number, name in enumerate(names)}
    for folder in _class_folders(path):
        if folder.name not in numbers:
            there = shown(", ".join(names))[1:-1]
            raise UserError(f"{folder} is a class that train does not have; there are: {there}")
        images = [entry for entry in sorted(folder.iterdir()) if _is_image(entry)]
        if not images:
            raise UserError(f"class folder {folder} holds no images ({', '.join(SUFFIXES)})")
        files += [_look(image, numbers[folder.name]) for image in images]
    return files


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _look(path: Path, label: int) -> _File:
    """What an image's header says; its pixels are not read yet."""
    checks.is_file(path)
    try:
        with _opened(path) as image:
            mode, (width, height) = image.mode, image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception as error:
        raise _unreadable(path, error) from error
    if mode not in _EIGHT_BIT_MODES:
        raise UserError(f"{path} has pixels of kind {mode!r}; images must have 8 bits a channel")
    checks.fits_memory(f"{path} of {_times((width, height))}, while it is read,", (height, width, _BYTES_OF_A_PIXEL))
    return _File(path, label, mode in _GREY_MODES, (height, width) if turned else (width, height))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of at most so many pixels as Pillow allows; up to twice as many it would only warn of."""
    with warnings.catch_warnings():
        # Of odd tags, which change no pixel.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as image:
            yield image


def _one_size(files: Sequence[_File]) -> tuple[int, int]:
    other = next((file for file in files if file.size != files[0].size), None)
    if other is not None:
        raise UserError(
            f"{other.path} is {_times(other.size)} and {files[0].path} {_times(files[0].size)}; images of several "
            "sizes need --config.data.image_size=N to be resized"
        )
    return files[0].size


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _split(files: Sequence[_File], shape: tuple[int, int, int]) -> Split:
    images = np.empty((len(files), *shape), np.uint8)
    for number, file in enumerate(files):
        images[number] = _read(file.path, shape)
    return Split(images, np.array([file.label for file in files], np.int32))


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
    return UserError(f"{path} cannot be read as an image: {in_a_line(error)}")
