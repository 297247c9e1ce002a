"""The code of docs/pages/extend.md runs and does what the page says."""

import importlib
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jem_jax
from jem_jax.config import Data, Model
from jem_jax.datasets import load
from jem_jax.training import network

PAGE = (Path(__file__).parents[2] / "docs" / "pages" / "extend.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function of a block's name that imports the block from a file, as a reader of the page would."""
    for name, text in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module


@pytest.mark.parametrize("name", ["my_network", "my_data", "my_sampler", "my_objective"])
def test_an_example_is_about_ten_lines(name):
    lines = BLOCKS[name].splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from"))]) <= 10


def test_network(module):
    built = network.build(Model(factory="my_network:MLP"), num_classes=7)
    x = jnp.zeros((2, 8, 8, 1))
    assert built.logits(built.init(jax.random.key(0), x), x).shape == (2, 7)


def test_data(module):
    module("my_data")
    dataset = load(Data(name="stripes.npz"))
    assert dataset.class_names == ("top", "middle", "bottom")
    assert [len(split.images) for split in (dataset.train, dataset.validation, dataset.test)] == [240, 30, 30]
    rows = dataset.train.images.mean(axis=(2, 3)).reshape(-1, 4, 2).mean(axis=2)
    assert np.array_equal(rows.argmax(axis=1), dataset.train.labels)


def test_the_package_calls_the_chain_once():
    training = Path(jem_jax.__file__).parent / "training"
    assert sum(path.read_text(encoding="utf-8").count("sgld.chain(") for path in training.glob("*.py")) == 1


def test_sampler_has_the_density_as_its_limit(module):
    mean, std, friction, step_size = 3.0, 2.0, 0.1, 0.01
    samples = jax.jit(
        lambda key, x: module("my_sampler").chain(
            key, lambda x: -0.5 * jnp.sum(((x - mean) / std) ** 2, axis=1), x,
            num_steps=1000, step_size=step_size, noise_std=math.sqrt(2 * friction * step_size), friction=friction,
        )
    )(jax.random.key(0), jnp.zeros((4000, 1)))  # fmt: skip
    assert jnp.mean(samples) == pytest.approx(mean, abs=0.15)
    assert jnp.std(samples) == pytest.approx(std, rel=0.05)


def test_objective_is_least_at_the_density_of_noisy_data(module):
    """Of N(0, 1) data with noise of standard deviation σ that is N(0, 1 + σ²)."""
    sigma, key = 0.5, jax.random.key(1)
    x = jax.random.normal(jax.random.key(0), (20_000, 1))

    def loss(precision):
        density = lambda x: -0.5 * precision * jnp.sum(x**2, axis=1)  # noqa: E731
        return module("my_objective").score_matching(key, density, x, sigma=sigma)

    best = 1 / (1 + sigma**2)
    slope, curvature = jax.grad(loss)(best), jax.grad(jax.grad(loss))(best)
    assert -slope / curvature == pytest.approx(0, abs=0.03)
