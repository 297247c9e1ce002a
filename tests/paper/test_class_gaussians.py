"""Chains that start from the classes' Gaussians: their statistics are NumPy's, and batches find them."""

import jax
import numpy as np
import pytest
import tiny

from jem_jax import class_gaussians
from jem_jax.augment import to_float
from jem_jax.datasets import Split
from jem_jax.training import device_data, setup
from jem_jax.training.device_data import Order

DRAWS = 20_000
JITTER = 1e-2
"""of the released code: 1e-4 on the diagonal of the covariance"""


@pytest.fixture(scope="module")
def split():
    """Dim images of two classes [2, 2, 1] of different sizes, whose values move together."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(2, 4, 4)) * 12
    labels = np.array([0] * 9 + [1] * 30)
    images = [mixing[label] @ random.normal(size=4) + (90, 150)[label] for label in labels]
    return Split(np.clip(images, 0, 255).astype(np.uint8).reshape(-1, 2, 2, 1), labels.astype(np.int32))


def test_draws_are_normal_with_numpys_mean_and_covariance(split):
    draws = class_gaussians.of_classes(split.images, split.labels, np.arange(len(split)), 2)
    drawn = np.array(draws(jax.random.key(3), DRAWS))
    for label in (0, 1):
        images = to_float(split.images[split.labels == label]).reshape(-1, 4)
        found = drawn[:, label].reshape(-1, 4)
        covariance = np.cov(images.T, bias=True) + JITTER**2 * np.eye(4)
        error = 5 / np.sqrt(DRAWS)
        np.testing.assert_allclose(found.mean(0), images.mean(0), atol=error * np.sqrt(covariance.max()))
        np.testing.assert_allclose(np.cov(found.T), covariance, atol=error * 2 * covariance.max())
        # A mixture of images would have other tails along some direction.
        values = found @ np.array([1.0, -2.0, 0.5, 1.0])
        standard = (values - values.mean()) / values.std()
        assert (standard**3).mean() == pytest.approx(0, abs=0.1)
        assert (standard**4).mean() == pytest.approx(3, abs=0.2)


def test_draws_are_clipped_to_the_images_range():
    bright = Split(np.array([[[[0]]], [[[255]]]], np.uint8).repeat(4, 0), np.zeros(8, np.int32))
    drawn = np.array(class_gaussians.of_classes(bright.images, bright.labels, np.arange(8), 1)(jax.random.key(0), 500))
    assert (drawn.min(), drawn.max()) == (-1, 1)


def test_rows_without_labels_are_not_used(split):
    draws = class_gaussians.of_classes(split.images, split.labels, np.array([0, 20]), 2)
    found = np.array(draws(jax.random.key(0), 200))
    for label, row in enumerate((0, 20)):
        difference = found[:, label] - to_float(split.images[row])
        np.testing.assert_allclose(difference, 0, atol=6 * JITTER)
        assert difference.std() == pytest.approx(JITTER, rel=0.1)


def test_large_images_need_no_covariance_matrix():
    of_one_class = (jax.random.key(0), np.zeros((3, 64, 64, 3), np.float32), np.ones(3, bool))
    equations = jax.make_jaxpr(class_gaussians.draw, static_argnums=3)(*of_one_class, 8).eqns
    largest = max(variable.aval.size for equation in equations for variable in equation.outvars)
    assert largest <= 8 * 64 * 64 * 3


def test_slots_of_every_class_hold_draws_of_each(split):
    draws = class_gaussians.of_classes(split.images, split.labels, np.arange(len(split)), 2)
    buffer = np.array(class_gaussians.init(draws, jax.random.key(1), 5, 2))
    assert buffer.shape == (5, 2, 2, 2, 1)
    means = [to_float(split.images[split.labels == label]).mean() for label in (0, 1)]
    nearest = np.abs(buffer.mean(axis=(2, 3, 4))[..., None] - means).argmin(axis=-1)
    assert (nearest == [0, 1]).mean() > 0.8


def test_a_run_begins_with_chains_from_the_gaussians():
    config = tiny.config(**{"sampler.init": "class_gaussians", "sampler.buffer_size": 100})
    found = np.array(setup.prepare(config, tiny.dataset()).fresh_buffer(jax.random.key(5)))
    images, labels = to_float(tiny.dataset().train.images), tiny.dataset().train.labels
    means = np.stack([images[labels == label].mean(axis=0) for label in range(3)])
    # They take turns: each of the three has 33 draws around its own class's mean, and one is left over.
    assert found.shape == (100, 1, 8, 8, 1)
    np.testing.assert_allclose(found[:99].reshape(33, 3, 8, 8, 1).mean(axis=0), means, atol=0.35)


def test_an_epochs_starts_are_placed_once_and_are_the_same_however_images_come():
    found = {}
    for place in ("device", "host"):
        config = tiny.config(**{"data.place": place, "sampler.init": "class_gaussians"})
        order = Order(config, tiny.dataset().train.labels)
        data = device_data.build(config, tiny.dataset().train, order)
        found[place] = [data.at(step).starts for step in (0, order.steps_per_epoch - 1, order.steps_per_epoch)]
        data.close()
        assert found[place][0] is found[place][1]
    first, _, later = (np.array(starts) for starts in found["device"])
    assert first.shape[1:] == (tiny.CLASSES, tiny.SIDE**2)
    assert not np.array_equal(first, later)
    for ours, theirs in zip(*found.values(), strict=True):
        assert np.array_equal(ours, theirs)
