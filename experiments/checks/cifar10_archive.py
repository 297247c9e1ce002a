"""CIFAR-10 from an archive in the official layout, through the data set builder, and a small JEM on it.

    python -m experiments.checks.cifar10_archive ARCHIVE.tar.gz

The archive holds CIFAR-10's images but need not be the official file: it is checked against its own checksum. Trains a
WRN-10-1 for 400 iterations. Writes experiments/results/cifar10_archive.json and a picture of the replay buffer,
docs/pages/images/cifar10_buffer.png.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.runs import IMAGES, store
from jem_jax.commands import config_files
from jem_jax.datasets import Dataset, prepared
from jem_jax.datasets.sources import SOURCES, Archive
from jem_jax.distributed import devices, processes
from jem_jax.distributed.interrupts import Interrupts
from jem_jax.runs import workdir
from jem_jax.training import loop

SETTINGS = [("model.width", "1"), ("training.log_every", "20"), ("training.epochs", "1")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--images", type=int, default=25_600, help="training images of the one epoch (default 25,600)")
    flags = parser.parse_args()
    config = config_files.read("cifar10_small", SETTINGS)
    processes.start(processes.Cluster(), devices.choose_cpu_devices((64, config.sampler.buffer_size)), 1)
    with tempfile.TemporaryDirectory() as folder, Interrupts() as interrupts:
        dataset, seconds = _prepare(flags.archive, Path(folder))
        run = Path(folder) / "run"
        trained = loop.train(config, _shortened(dataset, flags.images), run, "JEM", interrupts)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        picture = sorted((run / workdir.SAMPLES).glob("*.png"))[-1]
        shutil.copy(picture, IMAGES / "cifar10_buffer.png")
    summary = {
        "images": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "prepare_seconds": round(seconds, 1),
        "iterations": trained.steps,
        "training_seconds": round(trained.seconds, 1),
        "first": lines[0],
        "last": lines[-2],
        "validation": lines[-1],
    }
    store("cifar10_archive", "python -m experiments.checks.cifar10_archive ARCHIVE.tar.gz", summary, [])


def _prepare(archive: Path, folder: Path) -> tuple[Dataset, float]:
    with archive.open("rb") as file:
        own = Archive(
            f"file:///{archive.name}", archive.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )
    source = dataclasses.replace(SOURCES["cifar10"], archives=(own,))
    started = time.monotonic()
    return prepared.load(source, folder / "data", archive.parent), time.monotonic() - started


def _shortened(dataset: Dataset, images: int) -> Dataset:
    return dataclasses.replace(dataset, train=dataset.train.rows(np.arange(images)))


if __name__ == "__main__":
    main()
