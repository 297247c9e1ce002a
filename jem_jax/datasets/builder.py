"""The TFDS builder of the sets in `sources`: needs no TensorFlow, neither to prepare nor to read.

TFDS's own builders of these sets unpack archives and encode images with TensorFlow. This one takes arrays that are
already in memory and keeps an image as its bytes.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jem_jax.datasets.dataset import Split
from jem_jax.datasets.held_out import Splits
from jem_jax.datasets.sources import BUILDER_NAME, Source

_DESCRIPTION = "The official train and test images, in the order of the official archives."


def prepare(source: Source, data_dir: Path, parts: Splits) -> None:
    """Writes a source's train and test images to `source.folder(data_dir)` as array_record, whole or not at all."""
    settings = tfds.core.BuilderConfig(name=source.name, version=source.version, description=_DESCRIPTION)
    builder = _Builder(source=source, parts=parts, config=settings, data_dir=str(data_dir), file_format="array_record")
    with quiet_tfds():
        builder.download_and_prepare(download_config=download_config())


def read(source: Source, data_dir: Path) -> Splits:
    """The images that `prepare` wrote.

    Raises:
      Exception: whatever TFDS raises where there are none, or they are damaged (array_record's chunks are hashed).
      ValueError: they were prepared from other archives.
    """
    builder = tfds.builder_from_directory(str(source.folder(data_dir)))
    if builder.info.metadata != source.fingerprint:
        raise ValueError("prepared from other archives")
    names = tuple(builder.info.features["label"].names)
    return Splits(names, *(_decoded(builder.as_data_source(split=part)) for part in ("train", "test")))


def download_config() -> tfds.download.DownloadConfig:
    """TFDS's settings for preparing. By default it would wait for Google's storage when offline."""
    return tfds.download.DownloadConfig(try_download_gcs=False)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from reporting on stdout and from drawing progress bars into log files."""
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Train and test images that are in memory already."""

    name = BUILDER_NAME
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Source, parts: Splits, **settings: Any) -> None:
        self._source, self._parts = source, parts
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=self._parts.train.images.shape[1:], dtype=np.uint8, encoding="bytes")
        label = tfds.features.ClassLabel(names=self._parts.class_names)
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(self._source.fingerprint),
            # The archives' order: official code holds out images by their number.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        parts = {"train": self._parts.train, "test": self._parts.test}
        return {name: self._generate_examples(split) for name, split in parts.items() if split is not None}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            yield number, {"image": image, "label": int(label)}


def _decoded(examples: Any) -> Split:
    images, labels = zip(*((example["image"], example["label"]) for example in examples), strict=True)
    return Split(np.stack(images), np.array(labels, np.int32))
