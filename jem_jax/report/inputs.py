"""The subject of a report: a trained JEM, the plain classifier beside it, and the data."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jem_jax import class_gaussians, replay_buffer
from jem_jax.augment import to_float
from jem_jax.config import Config, Evaluation
from jem_jax.datasets import Dataset, Split
from jem_jax.distributed import devices
from jem_jax.evaluation import inpainting, sampling
from jem_jax.runs import checkpoint, workdir
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import device_data, network, quantities, trained
from jem_jax.training.network import Network
from jem_jax.training.trained import Model

_MULTIPLE, _LONG = 6, 1000
_FILM = 9
"""states of a chain that are drawn, behind its start"""
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
    def feature_model(self) -> str:
        """The model that measures samples, by its features and predictions: the baseline, which never saw a sample."""
        return "baseline" if "baseline" in self.models else "jem"

    @property
    def folder(self) -> Path:
        """The folder of the figures."""
        return (self.report_dir or self.path) / workdir.REPORT

    @property
    def settings(self) -> Evaluation:
        """The settings of the evaluation."""
        return self.facts.config.evaluation

    def key(self, stream: int) -> jax.Array:
        """A PRNG key of the run's seed, another for each stream."""
        return jax.random.fold_in(jax.random.key(self.facts.config.seed), stream)

    def described(self, name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A model's logits [N, K] and penultimate features [N, D] of images [N, H, W, C] in [-1, 1].

        The features are its logits where the network has no `features` argument.
        """
        model = self.models[name]
        return network.describe(model.network, model.variables, images, self.settings.batch_size)

    def logits(self, name: str, images: np.ndarray) -> np.ndarray:
        """A model's logits [N, K] of images [N, H, W, C] in [-1, 1]."""
        return self.described(name, images)[0]

    def over_examples(self, function: Callable[..., Any], chains: int = 0) -> Callable[..., Any]:
        """`over_examples` of the models' network: (model's name, key, *arrays [N, ...]) -> NumPy arrays [N, ...]."""
        run = over_examples(self.facts.config, self.jem.network, function, chains)
        return lambda name, key, *arrays, **shared: run(self.models[name].variables, key, *arrays, **shared)

    @functools.cached_property
    def test(self) -> np.ndarray:
        """All test images as floats."""
        return to_float(self.dataset.test.images)

    @functools.cached_property
    def test_logits(self) -> dict[str, np.ndarray]:
        """Every model's logits of the test images."""
        return {name: self.logits(name, self.test) for name in self.models}

    @functools.cached_property
    def sampler(self) -> "Sampler":
        """Chains of the JEM."""
        return Sampler(self.facts.config, self.jem, _FILM)

    @functools.cached_property
    def fresh(self) -> dict[str, np.ndarray]:
        """The JEM's `fresh_chains`."""
        return fresh_chains(self.sampler, self.facts, self.dataset)

    def some_test(self, count: int) -> Split:
        """At most `count` test images, the same for every model and section of a seed."""
        test = self.dataset.test
        return test.rows(np.random.default_rng(self.facts.config.seed).permutation(len(test))[:count])


def over_examples(config: Config, net: Network, function: Callable[..., Any], chains: int = 0) -> Callable[..., Any]:
    """A function of `evaluation` for many examples, in batches and on all devices.

    Chains follow `chain_logits_fn`. Where training's last chains took the statistics of their batch, these do too, and
    batches are of `chain_batch` chains; a network of a factory may have dropout then, with one mask for all chains.

    Args:
      function: (keys [b], logits_fn, chain_logits_fn, *arrays [b, ...], **shared) -> pytree of arrays [b, ...].
      chains: how many SGLD chains it runs for each example.

    Returns:
      (variables, key, *arrays [N, ...], fill=0, **shared) -> pytree of NumPy arrays [N, ...]. Example i has the key
      `fold_in(key, i)`, whatever the batches and devices; `shared` arrays are the same for all examples. All calls with
      arrays of the same shapes share one compiled program; `fill` is that of `devices.over_examples`.
    """

    together = chain_batch(config) if chains else 0
    batch_size = max(1, together // chains) if together else config.evaluation.batch_size

    def batch(common: Any, examples: tuple[Any, ...]) -> Any:
        variables, key, shared = common
        indices, *arrays = examples
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        logits_fn = functools.partial(net.logits, variables)
        by_batch = lambda x: net.batch_logits(variables, x, jax.random.key(0))  # noqa: E731
        return function(keys, logits_fn, by_batch if together else logits_fn, *arrays, **shared)

    mapped = devices.over_examples(batch, together=together > 0)

    def run(variables: Any, key: jax.Array, *arrays: Any, fill: int = 0, **shared: Any) -> Any:
        return mapped((variables, key, shared), (np.arange(len(arrays[0])), *arrays), batch_size, fill=fill)

    return run


def read(path: Path, facts: RunFacts, dataset: Dataset, report_dir: Path | None = None) -> Subject:
    """The last checkpoints of a run and of its baseline, or the model of a model folder.

    Raises:
      UserError: the run has no finished checkpoint.
    """
    models = {"jem": trained.read_model(path, facts)}
    if checkpoint.steps(path / workdir.BASELINE / workdir.CHECKPOINTS):
        models["baseline"] = trained.read_model(path, facts, baseline=True)
    return Subject(path, facts, dataset, models, report_dir)


def chain_batch(config: Config) -> int:
    """Chains that pass the network together after training, by the statistics of their batch; 0: each on its own."""
    return config.training.batch_size if quantities.chains_by_batch(config) else 0


def sample_steps(config: Config) -> int:
    """SGLD steps of a chain that starts afresh.

    With batch statistics, long chains pass the data's log p~; about 6 K steps reach it.
    """
    default = _MULTIPLE * config.sampler.num_steps if config.sampler.batch_statistics else _LONG
    return config.evaluation.sample_steps or default


def chains_in_words(config: Config, chains: str = "The chains") -> str:
    """A sentence about how they pass the network, after a space; empty where chains do not influence each other."""
    together = chain_batch(config)
    return f" {chains} pass the network in batches of {together}, by the batch's own statistics." if together else ""


def how_chains_pass(config: Config) -> dict[str, Any]:
    """The same for report.json."""
    together = chain_batch(config)
    return {"statistics": "of each batch of chains", "batch": together} if together else {"statistics": "running"}


def start_of_chains(config: Config) -> str:
    """The starts of a run's fresh chains, in words."""
    return "U(-1, 1)" if config.sampler.init == "uniform" else "the classes' Gaussians"


class Sampler:
    """Chains of a model, by one compiled program: of a class or of none, with some pixels known or with none."""

    def __init__(self, config: Config, model: Model, most_states: int = 1) -> None:
        """Chains of `sample_steps`, of which at most `most_states` states behind the start are returned."""
        self._variables, self._fill = model.variables, config.evaluation.num_samples
        steps = sample_steps(config)
        states = max(number for number in range(1, most_states + 1) if steps % number == 0)
        chain = {"num_steps": steps, "every": steps // states, **quantities.sgld_settings(config.sampler)}
        self._run = over_examples(
            config,
            model.network,
            lambda keys, _, logits_fn, x, classes, known: inpainting.inpaint(
                keys, sampling.log_density(logits_fn, classes), x, known, **chain
            ),
            chains=1,
        )

    def __call__(
        self, key: jax.Array, x: np.ndarray, classes: np.ndarray | None = None, known: np.ndarray | None = None
    ) -> np.ndarray:
        """States of chains [N, states + 1, H, W, C], unclipped; the start first and the sample last.

        Args:
          x: [N, H, W, C], where they start.
          classes: [N], whose logit they follow; None: they follow log p~(x).
          known: [N, H, W, C] bool, pixels that stay; None: none.
        """
        classes = np.full(len(x), sampling.NO_CLASS) if classes is None else classes
        known = np.zeros(x.shape, bool) if known is None else known
        return self._run(self._variables, key, x, classes, known, fill=self._fill)


def fresh_chains(sampler: Sampler, facts: RunFacts, dataset: Dataset) -> dict[str, np.ndarray]:
    """Chains that began as training's do, unclipped [N, states + 1, H, W, C]; the last is the sample.

    "by_class": equally many of each in order, following ∇ f(x)[y]. "unconditional": following ∇ log p~(x).
    """
    config, num_classes = facts.config, facts.num_classes
    num_samples = config.evaluation.num_samples
    # A whole batch at least, where its statistics count.
    count = max(num_samples, chain_batch(config))
    per_class = -(-count // num_classes)

    def key_and_start(count: int, by_class: bool) -> tuple[jax.Array, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(config.seed), by_class)
        return jax.random.split(key)[1], starts(config, dataset, key, count, by_class)

    classes = np.repeat(np.arange(num_classes), per_class)
    by_class = sampler(*key_and_start(len(classes), True), classes)
    by_class = by_class.reshape(num_classes, per_class, *by_class.shape[1:])[:, : -(-num_samples // num_classes)]
    return {
        "by_class": by_class.reshape(-1, *by_class.shape[2:]),
        "unconditional": sampler(*key_and_start(count, False))[:num_samples],
    }


def starts(config: Config, dataset: Dataset, key: jax.Array, count: int, by_class: bool) -> np.ndarray:
    """Starts of fresh chains [count, H, W, C], as in training.

    U(-1, 1), or draws from the classes' Gaussians, class after class or in turns.
    """
    if config.sampler.init == "uniform":
        uniform = devices.once(lambda key: replay_buffer.uniform(jax.random.split(key)[0], count, dataset.image_shape))
        return np.asarray(uniform(key))
    draws = device_data.draws(config, dataset.train)
    # `split` gives the same keys as `fold_in` of small numbers, and chains split this key.
    key = jax.random.fold_in(key, 2**31 - 1)
    if by_class:
        chains = np.asarray(draws(key, count // dataset.num_classes)).swapaxes(0, 1)
    else:
        chains = np.asarray(class_gaussians.init(draws, key, count, 1))
    return chains.reshape(count, *dataset.image_shape)
