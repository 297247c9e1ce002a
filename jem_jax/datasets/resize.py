"""Images in the size of `config.data.image_size`: the central square, resized by Pillow's bicubic filter."""

import numpy as np
from PIL import Image, ImageOps

from jem_jax.datasets import checks
from jem_jax.datasets.dataset import Dataset, Split


def to_side(image: Image.Image, side: int) -> Image.Image:
    """The central square of an image, side × side pixels; the image itself where it has that size."""
    if image.size == (side, side):
        return image
    return ImageOps.fit(image, (side, side), method=Image.Resampling.BICUBIC)


def dataset_to_side(dataset: Dataset, side: int) -> Dataset:
    """A data set with all its images `to_side`; side 0 leaves them as they are."""
    if side == 0 or dataset.image_shape[:2] == (side, side):
        return dataset
    count = sum(len(split) for split in (dataset.train, dataset.validation, dataset.test))
    checks.fits_memory(f"{dataset.name} at {side}×{side}", (count, side, side, dataset.image_shape[-1]))
    parts = (_split_to_side(split, side) for split in (dataset.train, dataset.validation, dataset.test))
    return Dataset(dataset.name, dataset.class_names, *parts)


def _split_to_side(split: Split, side: int) -> Split:
    images = np.empty((len(split), side, side, split.images.shape[-1]), np.uint8)
    for number, image in enumerate(split.images):
        images[number] = from_picture(to_side(to_picture(image), side))
    return Split(images, split.labels)


def to_picture(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] -> a grey or RGB picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_picture(picture: Image.Image) -> np.ndarray:
    """A grey or RGB picture -> uint8 [H, W, C]."""
    array = np.asarray(picture, np.uint8)
    return array[..., None] if array.ndim == 2 else array
