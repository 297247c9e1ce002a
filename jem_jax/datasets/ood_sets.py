"""Images that a classifier was not made for, out of its own test images or of none: nothing is downloaded.

Every set is float32 [N, H, W, C] in [-1, 1], a function of the test images and a seed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from jem_jax import datasets
from jem_jax.augment import to_float
from jem_jax.config import Data
from jem_jax.datasets import resize
from jem_jax.datasets.dataset import Split

_PHOTOGRAPHS_SHRINK = 4
"""times at most; less where patches would not fit otherwise"""


class OutsideSet(NamedTuple):
    """One set and what is in it."""

    description: str
    images: np.ndarray


def builtin(test: Split, count: int, seed: int) -> dict[str, OutsideSet]:
    """All sets that need no download, of at most `count` images each; those that these images do not make are empty.

    Args:
      test: in-distribution images.
      count: at most; sets made image by image from the test images hold no more than there are.
      seed: of everything random.
    """
    sets = {}
    for number, (name, (description, make)) in enumerate(_BUILTIN.items()):
        sets[name] = OutsideSet(description, make(test, count, np.random.default_rng((seed, number))))
    return sets


def named(data: Data, name: str, image_shape: tuple[int, int, int], count: int, seed: int) -> OutsideSet:
    """Test images of another data set, resized to the same side, as grey or colour images like the model's.

    Args:
      data: settings of the model's own data; folders and offline archives are the same.
      name: as `config.data.name` has it.

    Raises:
      UserError: it cannot be had.
    """
    height, width, channels = image_shape
    side = height if height == width else 0
    other = datasets.load(dataclasses.replace(data, name=name, image_size=side, labels_per_class=0))
    rows = np.random.default_rng(seed).permutation(len(other.test))[:count]
    images = other.test.images[rows]
    if images.shape[1:3] != (height, width):
        images = np.stack([_to_size(image, width, height) for image in images])
    return OutsideSet(f"test images of {other.name}", to_float(_to_channels(images, channels)))


def _midpoints(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    first, second = _pairs(len(test), count, random)
    return _halfway(test, first, second)


def _midpoints_of_classes(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    # More pairs than are wanted, since those of one class are dropped.
    first, second = _pairs(len(test), 4 * count, random, repeat=True)
    different = test.labels[first] != test.labels[second]
    return _halfway(test, first[different][:count], second[different][:count])


def _uniform_noise(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    return random.uniform(-1, 1, (count, *test.images.shape[1:])).astype(np.float32)


def _constant(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    channels = test.images.shape[-1]
    return np.broadcast_to(
        random.uniform(-1, 1, (count, 1, 1, channels)).astype(np.float32), (count, *test.images.shape[1:])
    ).copy()


def _inverted(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    return -to_float(_some(test, count, random))


def _rotated(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    images = to_float(_some(test, count, random))
    quarter = images.shape[1] == images.shape[2]
    return np.rot90(images, 1 if quarter else 2, axes=(1, 2)).copy()


def _photographs(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    from sklearn.datasets import load_sample_images

    height, width, channels = test.images.shape[1:]
    shrunk = [_not_below(Image.fromarray(photograph), width, height) for photograph in load_sample_images().images]
    patches = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        photograph = shrunk[i % len(shrunk)]
        top = random.integers(photograph.shape[0] - height + 1)
        left = random.integers(photograph.shape[1] - width + 1)
        patches[i] = photograph[top : top + height, left : left + width]
    return to_float(_to_channels(patches, channels))


def _not_below(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """A picture shrunk by a whole factor, or enlarged, so that it holds a patch."""
    room = min(picture.width / width, picture.height / height)
    if room >= 1:
        return np.asarray(picture.reduce(min(_PHOTOGRAPHS_SHRINK, int(room))))
    size = (math.ceil(picture.width / room), math.ceil(picture.height / room))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


_BUILTIN: Mapping[str, tuple[str, Callable[[Split, int, np.random.Generator], np.ndarray]]] = {
    "midpoints": ("midpoints of random pairs of test images", _midpoints),
    "midpoints_of_classes": ("midpoints of pairs of test images of different classes", _midpoints_of_classes),
    "inverted": ("test images, light and dark exchanged", _inverted),
    "rotated": ("test images turned by 90° (by 180° where they are not square)", _rotated),
    "photographs": (
        f"patches of scikit-learn's two photographs, shrunk {_PHOTOGRAPHS_SHRINK} times, or less for large images",
        _photographs,
    ),
    "uniform_noise": ("every value from U(-1, 1)", _uniform_noise),
    "constant": ("one random colour each", _constant),
}


def _some(test: Split, count: int, random: np.random.Generator) -> np.ndarray:
    return test.images[random.permutation(len(test))[:count]]


def _pairs(size: int, count: int, random: np.random.Generator, repeat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of two different images; none where there is one image."""
    if size < 2:
        return np.zeros(0, int), np.zeros(0, int)
    count = count if repeat else min(count, size)
    first = random.integers(size, size=count) if repeat else random.permutation(size)[:count]
    # The second is drawn among the others, so that no image is paired with itself.
    return first, (first + random.integers(1, size, size=count)) % size


def _halfway(test: Split, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (to_float(test.images[first]) + to_float(test.images[second])) / 2


def _to_size(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return resize.from_picture(resize.to_picture(image).resize((width, height), Image.Resampling.BICUBIC))


def _to_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Grey to colour by repetition, colour to grey by the Rec. 601 luma. uint8 [N, H, W, 1 or 3]."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.round(images @ np.array([0.299, 0.587, 0.114]))[..., None].astype(np.uint8)
