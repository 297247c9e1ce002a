"""What a report is about: a trained JEM, the plain classifier beside it, and the data."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jem_jax import class_gaussians, prng, replay_buffer
from jem_jax.augment import to_float
from jem_jax.config import Config, Evaluation
from jem_jax.datasets import Dataset, Split
from jem_jax.distributed import devices
from jem_jax.evaluation import sampling
from jem_jax.runs import workdir
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import device_data, quantities, trained
from jem_jax.training.network import Network
from jem_jax.training.trained import Model

TITLES = {"jem": "JEM", "baseline": "classifier"}


@dataclass(frozen=True)
class Subject:
    """The models of a run, and its data."""

    path: Path
    facts: RunFacts
    dataset: Dataset
    models: dict[str, Model]
    """"jem" and, where one was trained, "baseline"; of the same shape, so that one program serves both"""
    report_dir: Path | None = None
    """gets the report where `path` is only read"""

    @property
    def jem(self) -> Model:
        """The model that the run is about."""
        return self.models["jem"]

    @property
    def judge(self) -> str:
        """Whose features and predictions samples are measured with: the baseline's, which never saw a sample."""
        return "baseline" if "baseline" in self.models else "jem"

    @property
    def folder(self) -> Path:
        """Where figures go."""
        return (self.report_dir or self.path) / workdir.REPORT

    @property
    def settings(self) -> Evaluation:
        """How much is measured."""
        return self.facts.config.evaluation

    def key(self, stream: int) -> jax.Array:
        """A PRNG key of the run's seed, another for each stream."""
        return jax.random.fold_in(jax.random.key(self.facts.config.seed), stream)

    def logits(self, name: str, images: np.ndarray) -> np.ndarray:
        """A model's logits [N, K] of images [N, H, W, C] in [-1, 1]."""
        model = self.models[name]
        return _over_examples(self.jem.network.logits)(model.variables, images, self.settings.batch_size)

    def features(self, name: str, images: np.ndarray) -> np.ndarray:
        """A model's penultimate features [N, D]; its logits where the network has no `features` argument."""
        model = self.models[name]
        return _over_examples(self.jem.network.features)(model.variables, images, self.settings.batch_size)

    def over_examples(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`over_examples` of the models' network: (model's name, key, *arrays [N, ...]) -> NumPy arrays [N, ...]."""
        run = over_examples(self.jem.network, function, self.settings.batch_size)
        return lambda name, key, *arrays: run(self.models[name].variables, key, *arrays)

    @functools.cached_property
    def test(self) -> np.ndarray:
        """All test images as floats."""
        return to_float(self.dataset.test.images)

    @functools.cached_property
    def test_logits(self) -> dict[str, np.ndarray]:
        """Every model's logits of the test images."""
        return {name: self.logits(name, self.test) for name in self.models}

    @functools.cached_property
    def fresh(self) -> dict[str, np.ndarray]:
        """The JEM's `fresh_chains`."""
        return fresh_chains(self.jem, self.facts, self.dataset)

    def some_test(self, count: int) -> Split:
        """At most `count` test images, the same for every model and section of a seed."""
        test = self.dataset.test
        return test.rows(np.random.default_rng(self.facts.config.seed).permutation(len(test))[:count])


_over_examples = functools.lru_cache(maxsize=8)(devices.over_examples)


def over_examples(network: Network, function: Callable[..., Any], batch_size: int) -> Callable[..., Any]:
    """A function of `evaluation` for many examples, in batches and on all devices.

    Args:
      function: (keys [b], logits_fn, *arrays [b, ...]) -> pytree of arrays [b, ...].

    Returns:
      (variables, key, *arrays [N, ...]) -> pytree of NumPy arrays [N, ...]. Example i has the key `fold_in(key, i)`,
      whatever the batches and devices. All calls with arrays of the same shapes share one compiled program.
    """

    def batch(variables: Any, examples: tuple[Any, ...]) -> Any:
        keys, *arrays = examples
        return function(keys, functools.partial(network.logits, variables), *arrays)

    mapped = devices.over_examples(batch)
    return lambda variables, key, *arrays: mapped(
        variables, (prng.for_examples(key, len(arrays[0])), *arrays), batch_size
    )


def read(path: Path, facts: RunFacts, dataset: Dataset, report_dir: Path | None = None) -> Subject:
    """The last checkpoints of a run and of its baseline, or the model of a model folder.

    Raises:
      UserError: the run has no finished checkpoint.
    """
    models = {"jem": trained.read_model(path, facts)}
    if (path / workdir.BASELINE).is_dir():
        models["baseline"] = trained.read_model(path, facts, baseline=True)
    return Subject(path, facts, dataset, models, report_dir)


def start_of_chains(config: Config) -> str:
    """Where chains of a run start afresh, in words."""
    return "U(-1, 1)" if config.sampler.init == "uniform" else "the classes' Gaussians"


def fresh_chains(model: Model, facts: RunFacts, dataset: Dataset) -> dict[str, np.ndarray]:
    """Samples of chains that began as training's do, unclipped [N, H, W, C].

    "by_class": equally many of each in order, following ∇ f(x)[y]. "unconditional": following ∇ log p~(x).
    """
    settings, config = facts.config.evaluation, facts.config
    per_class = -(-settings.num_samples // facts.num_classes)
    chain = {"num_steps": settings.sample_steps, **quantities.sgld_settings(config.sampler)}

    def key_and_start(count: int, by_class: bool) -> tuple[jax.Array, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(config.seed), by_class)
        return jax.random.split(key)[1], starts(config, dataset, key, count, by_class)

    classes = np.repeat(np.arange(facts.num_classes, dtype=np.int32), per_class)
    follow_class = over_examples(
        model.network,
        lambda keys, logits_fn, x, classes: sampling.chains(keys, logits_fn, x, classes, **chain),
        settings.batch_size,
    )
    follow_density = over_examples(
        model.network, lambda keys, logits_fn, x: sampling.chains(keys, logits_fn, x, **chain), settings.batch_size
    )
    return {
        "by_class": follow_class(model.variables, *key_and_start(len(classes), True), classes),
        "unconditional": follow_density(model.variables, *key_and_start(settings.num_samples, False)),
    }


def starts(config: Config, dataset: Dataset, key: jax.Array, count: int, by_class: bool) -> np.ndarray:
    """Where chains start afresh [count, H, W, C], as in training.

    U(-1, 1), or draws from the classes' Gaussians, class after class or in turns.
    """
    if config.sampler.init == "uniform":
        return np.asarray(replay_buffer.uniform(jax.random.split(key)[0], count, dataset.image_shape))
    draws = device_data.draws(config, dataset.train)
    # Chains split the key, which gives the keys that small numbers folded in give.
    key = jax.random.fold_in(key, 2**31 - 1)
    if by_class:
        drawn = np.asarray(draws(key, count // dataset.num_classes)).swapaxes(0, 1)
    else:
        drawn = np.asarray(class_gaussians.init(draws, key, count, 1))
    return drawn.reshape(count, *dataset.image_shape)
