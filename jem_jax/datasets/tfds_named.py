"""Any other image classification set of tensorflow-datasets, by its name there.

Reading a set that TFDS prepared as array_record needs no TensorFlow. Preparing nearly any set does, so a missing
TensorFlow is reported before the download.
"""

import difflib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jem_jax.common.errors import UserError, first_line
from jem_jax.datasets import cache, checks, locking, resize
from jem_jax.datasets.dataset import Dataset, Split
from jem_jax.datasets.held_out import Splits, with_tenths
from jem_jax.datasets.notices import say
from jem_jax.datasets.sources import BUILDER_NAME, SOURCES

PREFIX = "tfds:"
_PARTS = ("train", "test", "validation")
"""TFDS's usual names of splits, in the order of `Splits`"""


def load(name: str, data_dir: Path, image_size: int) -> Dataset:
    """The data set that TFDS knows by that name, prepared first where it is not.

    Its splits `train`, `validation` and `test` are taken where it has them, its validation split to test on where it
    has no other. What is missing is a tenth of its training images each (`held_out.even_order`).

    Args:
      name: "NAME", "NAME/CONFIG" or "NAME/CONFIG:VERSION".
      data_dir: TFDS's data folder.
      image_size: resize to this square (`resize.to_side`); 0: as they are, which is then one size.

    Raises:
      UserError: there is none of that name, it has no images and labels, their sizes differ, it can't be prepared.
    """
    builder = _builder(name, data_dir)
    _check_features(name, builder)
    return with_tenths(f"{PREFIX}{name}", _parts(name, builder, data_dir, image_size))


def known() -> list[str]:
    """The names of the sets that TFDS can prepare, image classification or not."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def _builder(name: str, data_dir: Path) -> Any:
    # Slow to import, so only here.
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=str(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name.partition("/")[0], known(), n=3)
        hint = f"; near it: {', '.join(PREFIX + other for other in near)}" if near else ""
        raise UserError(
            f"config.data.name {PREFIX}{name}: tensorflow-datasets has no set of that name, and none is prepared in "
            f"{data_dir}{hint}"
        ) from error
    except Exception as error:
        raise UserError(f"config.data.name {PREFIX}{name}: tensorflow-datasets says: {first_line(error)}") from error


def _check_features(name: str, builder: Any) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    known = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = known.get("image"), known.get("label")
    kinds = (tfds.features.Image, tfds.features.Tensor)
    is_image = isinstance(image, kinds) and image.np_dtype == np.uint8 and len(image.shape) == 3
    if not is_image or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"config.data.name {PREFIX}{name} is not for classifying images: it must have the features image (uint8) "
            f"and label (classes), and has {', '.join(known) or 'none'}"
        )
    if builder.info.splits and "train" not in builder.info.splits:
        raise UserError(f"config.data.name {PREFIX}{name} has no split train; it has {', '.join(builder.info.splits)}")


def _parts(name: str, builder: Any, data_dir: Path, image_size: int) -> Splits:
    """The decoded images. TFDS prepares the set first if need be, and the images are decoded once."""
    file = data_dir / BUILDER_NAME / "tfds" / builder.info.full_name / f"decoded_{image_size}.npz"
    info = Path(builder.data_dir) / "dataset_info.json"
    parts = cache.read(file, _made_from(info))
    if parts is not None:
        return parts
    if info.exists() and not os.access(data_dir, os.W_OK):
        # Others prepared it for everyone to read: there is no place to keep what is decoded.
        return _decode(name, builder, image_size)
    with locking.held(file.parent, name):
        if not info.exists():
            _prepare(name, builder)
        # Another process may have made it while this one waited.
        parts = cache.read(file, _made_from(info))
        if parts is None:
            parts = _decode(name, builder, image_size)
            cache.write(file, _made_from(info), parts)
    return parts


def _made_from(info: Path) -> dict[str, Any]:
    return {"data_set": str(info.parent), "prepared": info.stat().st_mtime_ns if info.exists() else None}


def _prepare(name: str, builder: Any) -> None:
    from jem_jax.datasets.builder import download_config, quiet_tfds

    own = " That set is also there without it: --config.data.name=" + name if name in SOURCES else ""
    needed = UserError(
        f"config.data.name {PREFIX}{name} is not prepared in {builder.data_dir}, and tensorflow-datasets needs "
        f"TensorFlow to prepare it (not to read it afterwards); install it: pip install tensorflow.{own}"
    )
    stock = type(builder).__module__.startswith("tensorflow_datasets.")
    if stock and importlib.util.find_spec("tensorflow") is None:
        raise needed
    say(f"tensorflow-datasets prepares {name} in {builder.data_dir}: once")
    try:
        with quiet_tfds():
            builder.download_and_prepare(download_config=download_config(), file_format="array_record")
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "tensorflow":
            raise needed from error
        raise UserError(f"config.data.name {PREFIX}{name} cannot be prepared: {error}; install that package") from error
    except Exception as error:
        raise UserError(
            f"config.data.name {PREFIX}{name} could not be prepared in {builder.data_dir}: {first_line(error)}"
        ) from error


def _decode(name: str, builder: Any, image_size: int) -> Splits:
    where = f"config.data.name {PREFIX}{name}"
    names = tuple(builder.info.features["label"].names)
    present = [part for part in _PARTS if part in builder.info.splits]
    splits = {part: _split(where, builder, part, image_size) for part in present}
    checks.every_class(where, splits["train"].labels, names)
    for split in splits.values():
        checks.alike(where, splits["train"].images, split.images)
    return Splits(names, **splits)


def _split(where: str, builder: Any, part: str, image_size: int) -> Split:
    where = f"{where}, split {part}"
    try:
        examples = builder.as_data_source(split=part)
        if not len(examples):
            raise UserError(f"{where} is empty")
        first = _image(examples[0], image_size)
        shape = (len(examples), *first.shape)
        checks.image_shape(where, shape)
        checks.fits_memory(where, shape)
        images, labels = np.empty(shape, np.uint8), np.empty(len(examples), np.int64)
        for row in range(len(examples)):
            example = examples[row]
            image = _image(example, image_size)
            if image.shape != first.shape:
                raise UserError(
                    f"{where}: image {row} is {_times(image)} and image 0 {_times(first)}; images of several sizes "
                    "need --config.data.image_size=N to be resized"
                )
            images[row], labels[row] = image, example["label"]
    except NotImplementedError as error:
        raise UserError(
            f"{where} is prepared in {builder.data_dir} in a format that only TensorFlow reads; have it prepared anew, "
            "as array_record, elsewhere: --config.data.data_dir=DIR"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{where} in {builder.data_dir} is damaged: {first_line(error)}; delete that folder to prepare it anew"
        ) from error
    checks.labels(f"{where}: labels", labels, builder.info.features["label"].num_classes)
    return Split(images, labels.astype(np.int32))


def _image(example: Mapping[str, Any], image_size: int) -> np.ndarray:
    image = np.asarray(example["image"])
    if not image_size or image.shape[-1] not in (1, 3):
        return image
    return resize.from_picture(resize.to_side(resize.to_picture(image), image_size))


def _times(image: np.ndarray) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
