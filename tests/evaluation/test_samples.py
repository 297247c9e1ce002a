"""What the model draws: chains, film strips, hidden pixels, and the measures of their quality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import linalg

from jem_jax import energy, sgld
from jem_jax.evaluation import inpainting, sample_quality, sampling
from jem_jax.report import inputs
from jem_jax.training import network

SHAPE = (8, 8, 1)
SETTINGS = {"step_size": 0.05, "noise_std": 0.01}


def _ripple(x):
    return jnp.sum(jnp.sin(1.3 * x + 0.4) - 0.1 * x**2, axis=(1, 2, 3))


def test_a_chain_depends_on_its_place_alone():
    model = network.build(tiny.config(**{"model.factory": "tiny:mlp"}).model, tiny.CLASSES)
    start, configs = np.zeros((12, *SHAPE), np.float32), (tiny.config(**{"evaluation.batch_size": n}) for n in (4, 12))
    variables = jax.jit(model.init)(jax.random.key(0), start)
    chains = lambda keys, logits_fn, _, x: sgld.chain(keys, energy.marginal(logits_fn), x, num_steps=5, **SETTINGS)  # noqa: E731
    one, other = (inputs.over_examples(some, model, chains, 1)(variables, jax.random.key(3), start) for some in configs)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(np.unique(one[:, 0, 0, 0])) == 12


def test_a_chain_of_no_known_pixels_is_a_trajectory():
    start, key = np.random.default_rng(0).uniform(-1, 1, (4, *SHAPE)).astype(np.float32), jax.random.key(3)
    how, nothing = {"num_steps": 6, "every": 2, **SETTINGS}, np.zeros((4, *SHAPE), bool)
    states = jax.jit(lambda: inpainting.inpaint(key, _ripple, start, nothing, **how))()
    expected = jax.jit(lambda: sgld.trajectory(key, _ripple, start, **how))()
    np.testing.assert_allclose(states, np.swapaxes(expected, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(states[:, 0], start)


def test_images_are_put_to_the_class_that_wins():
    logits = np.array([[0.0, 1, 2], [5, 1, 2], [0, 1, 9], [0, 0, 1]])
    rows = sampling.by_class(np.arange(4), logits, per_class=2)
    assert [row.tolist() for row in rows] == [[1], [], [0, 2]]


def test_known_pixels_stay_to_the_last_bit_and_hidden_ones_do_not():
    images = np.random.default_rng(0).uniform(-1, 1, (6, *SHAPE)).astype(np.float32)
    fill = jax.jit(lambda known: inpainting.inpaint(jax.random.key(0), _ripple, images, known, num_steps=5, **SETTINGS))
    for name, known in inpainting.masks(SHAPE).items():
        filled = np.asarray(fill(known))
        np.testing.assert_array_equal(filled[:, known], images[:, known], err_msg=name)
        assert (filled[:, ~known] != images[:, ~known]).all()


def test_hidden_pixels_follow_the_density_given_the_known_ones():
    """log p~ = -Σ (right - left)² / 2 has its peak where the hidden half is the known one."""

    def density(x):
        return -0.5 * ((x[:, :, 2:] - x[:, :, :2]) ** 2).sum(axis=(1, 2, 3))

    images = np.random.default_rng(0).uniform(-1, 1, (6, 4, 4, 1)).astype(np.float32)
    known = inpainting.masks((4, 4, 1))["right half"]
    how = {"num_steps": 100, "step_size": 0.2, "noise_std": 0.0}
    filled = inpainting.inpaint(jax.random.key(0), density, jnp.asarray(images), known, **how)
    np.testing.assert_allclose(filled[:, :, 2:], images[:, :, :2], atol=1e-4)


def test_masks_hide_what_they_say_and_the_error_is_of_hidden_pixels_alone():
    masks = inpainting.masks((8, 6, 3))
    assert masks["lower half"][:4].all()
    assert not masks["lower half"][4:].any()
    assert masks["right half"][:, :3].all()
    assert not masks["right half"][:, 3:].any()
    assert (~masks["centre"]).sum() == 4 * 4 * 3
    images = np.zeros((2, 8, 6, 3), np.float32)
    known = masks["lower half"]
    filled = np.where(known, 7.0, 0.5)[None].repeat(2, axis=0)
    # Half of the range from 0 to 1 in [-1, 1] is a quarter of that in [0, 1].
    assert inpainting.error(images, filled, known) == pytest.approx(0.25)
    assert inpainting.error(images, np.full_like(images, 9), known) == pytest.approx(0.5)


def test_the_frechet_distance_is_its_formula():
    random = np.random.default_rng(0)
    one = random.normal(size=(400, 5)) @ random.normal(size=(5, 5)) + 1
    other = random.normal(size=(300, 5)) @ random.normal(size=(5, 5))
    covariance, other_covariance = np.cov(one.T), np.cov(other.T)
    root = linalg.sqrtm(covariance @ other_covariance).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)
    assert sample_quality.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert sample_quality.frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
    # Fewer images than features are enough; covariances are singular then.
    one, other = random.normal(size=(4, 9)), random.normal(size=(5, 9))
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(np.cov(one.T) + np.cov(other.T))
    assert 0 < sample_quality.frechet_distance(one, other) <= apart


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.full((4, 3), np.nan)])
def test_features_that_have_no_gaussian_are_an_error(bad):
    with pytest.raises(ValueError, match="finite"):
        sample_quality.frechet_distance(bad, np.zeros((4, 3)))


def test_the_inception_style_score_runs_from_one_to_the_number_of_classes():
    with np.errstate(divide="ignore"):
        sure = np.maximum(np.log(np.eye(4)), -700)
    assert sample_quality.inception_style_score(sure) == pytest.approx(4)
    assert sample_quality.inception_style_score(sure[[0, 0, 0]]) == pytest.approx(1)
    assert sample_quality.inception_style_score(np.log(np.full((5, 4), 0.25))) == pytest.approx(1)
    two = np.log(np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert sample_quality.inception_style_score(two) == pytest.approx(
        np.exp(np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    )


def test_nearest_finds_copies_and_the_closest():
    random = np.random.default_rng(0)
    references = random.normal(size=(300, 3, 3, 1)).astype(np.float32)
    queries = np.concatenate([references[[17, 4]], random.normal(size=(290, 3, 3, 1)).astype(np.float32)])
    indices, distances = sample_quality.nearest(queries, references)
    apart = np.linalg.norm((queries[:, None] - references[None]).reshape(292, 300, -1), axis=-1)
    np.testing.assert_array_equal(indices, apart.argmin(axis=1))
    np.testing.assert_allclose(distances, apart.min(axis=1), rtol=1e-5, atol=1e-6)
    assert distances[:2].tolist() == [0, 0]
