"""A data set, networks and settings so small that a test is mostly compiling; for tests and the programs they start."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jem_jax import config as configuration
from jem_jax.config import Config
from jem_jax.datasets import Dataset, Split
from jem_jax.distributed import devices
from jem_jax.runs import checkpoint, workdir
from jem_jax.training import loop, setup, trained
from jem_jax.training.device_data import DeviceData
from jem_jax.training.network import Network
from jem_jax.training.state import TrainState
from jem_jax.training.step import Step
from jem_jax.wide_resnet import BatchNorm

CLASSES, SIDE = 3, 8
TRAIN, VALIDATION, TEST = 43, 12, 12

_SETTINGS = {
    "sampler.num_steps": 3,
    "sampler.buffer_size": 32,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.05,
    "training.batch_size": 8,
    "training.epochs": 2,
    "training.log_every": 4,
    "training.validate_every": 1,
    "training.checkpoint_every": 1,
    "evaluation.batch_size": 8,
}

FULL = {
    "model.factory": "tiny:batch_norm_mlp",
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.01,
    "optimizer.weight_decay": 0.01,
    "optimizer.ema_decay": 0.75,
}
"""Settings that fill every field of the state (batch statistics, Adam's moments, averaged parameters); with dropout."""


def dataset() -> Dataset:
    """Noisy images [8, 8, 1] of three classes, told apart by which rows are bright; always the same."""
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        labels = (np.arange(count) % CLASSES).astype(np.int32)
        images = random.integers(0, 100, (count, SIDE, SIDE, 1))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 1 : 2 * label + 3] += 150
        return Split(images.astype(np.uint8), labels)

    return Dataset("tiny", ("a", "b", "c"), split(TRAIN), split(VALIDATION), split(TEST))


def config(**overrides: Any) -> Config:
    """Validated settings of a tiny run: `config(**{"training.batch_size": 16})`."""
    settings: dict[str, Any] = {}
    for name, value in {**_SETTINGS, **overrides}.items():
        *groups, key = name.split(".")
        group = settings
        for part in groups:
            group = group.setdefault(part, {})
        group[key] = value
    return configuration.validate(settings)


class MLP(nn.Module):
    """One hidden layer, with batch norm and dropout if wanted."""

    num_classes: int
    batch_norm: bool = False
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16, name="hidden")(x.reshape(len(x), -1))
        if self.batch_norm:
            x = BatchNorm(name="norm")(x, train)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classes")(nn.swish(x))


def mlp(num_classes: int) -> MLP:
    """For `model.factory="tiny:mlp"`: compiles in half the WRN's time."""
    return MLP(num_classes)


def batch_norm_mlp(num_classes: int) -> MLP:
    """For `model.factory="tiny:batch_norm_mlp"`."""
    return MLP(num_classes, batch_norm=True)


def plain_batch_norm_mlp(num_classes: int) -> MLP:
    """For `model.factory="tiny:plain_batch_norm_mlp"`: without dropout."""
    return MLP(num_classes, batch_norm=True, dropout=0.0)


class Start(NamedTuple):
    """What a first iteration takes."""

    step: Step
    state: TrainState
    chains: np.ndarray | None
    """the whole buffer [S, C, H, W, channels], on the host since steps take their buffer over"""
    data: DeviceData
    network: Network

    @property
    def buffer(self) -> jax.Array | None:
        """The buffer on the devices, a new one each time."""
        return None if self.chains is None else devices.shard_buffer(self.chains)


def whole(buffer: jax.Array) -> np.ndarray:
    """A step's buffer as it is kept: [S, C, H, W, channels]."""
    return np.array(devices.whole_buffer(buffer, (SIDE, SIDE, 1)))


def start(config: Config) -> Start:
    """All that a run's first iteration takes, on the devices."""
    run = setup.prepare(config, dataset())
    state, buffer = run.begin()
    shape = () if buffer is None else buffer.shape
    chains = None if buffer is None else np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    return Start(run.step(), devices.replicate(state), chains, run.data, run.network)


class Killed(Exception):
    """The program ended without a chance to save."""


class Stop:
    """Stands for the signals of a run that is stopped, or killed, after some iterations."""

    def __init__(self, *steps: int, kill: bool = False) -> None:
        self.steps, self.kill = steps, kill
        self.asked: list[int] = []

    def requested(self, step: int, processes: int) -> bool:
        self.asked.append(step)
        if step in self.steps and self.kill:
            raise Killed
        return step in self.steps


def train(directory: Path, stop: Stop | None = None, **settings: Any) -> loop.Trained:
    """Trains a run in a directory, or goes on with it."""
    return loop.train(config(**settings), dataset(), directory, "tiny", stop or Stop())


def restored(
    directory: Path, name: str = workdir.CHECKPOINTS, step: int | None = None, **settings: Any
) -> checkpoint.Restored:
    """A checkpoint of such a run, by default its last."""
    state, buffer = trained.template(config(**settings), (SIDE, SIDE, 1), CLASSES)
    tree = trained.tree(checkpoint.template_of(state), None if name == workdir.BEST else buffer)
    return checkpoint.restore(directory / name, tree, step)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a pytree on the host, under its path; PRNG keys as their numbers."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        named[jax.tree_util.keystr(path, simple=True, separator="/")] = np.array(
            jax.random.key_data(leaf) if is_key else leaf
        )
    return named


def differing(one: Any, other: Any) -> list[str]:
    """Paths at which two pytrees are not the same bit for bit (so that NaN equals NaN)."""
    ours, theirs = leaves(one), leaves(other)
    bits = lambda leaf: (leaf.dtype, leaf.shape, leaf.tobytes())  # noqa: E731
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {path for path in both if bits(ours[path]) != bits(theirs[path])})
