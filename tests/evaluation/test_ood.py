"""Detection of outside images: the measures against scikit-learn, the scores against closed forms, the sets."""

import jax
import numpy as np
import pytest
import tiny
from sklearn import metrics as sklearn_metrics

from jem_jax import datasets
from jem_jax.augment import to_float
from jem_jax.config import Data
from jem_jax.datasets import Split, ood_sets
from jem_jax.evaluation import ood


@pytest.mark.parametrize("ties", [False, True])
def test_the_measures_are_scikit_learns(ties):
    random = np.random.default_rng(0)
    inside, outside = random.normal(0.7, 1, 300), random.normal(0, 1, 170)
    if ties:
        inside, outside = inside.round(), outside.round()
    truth = np.repeat([1, 0], [300, 170])
    scores = np.concatenate([inside, outside])
    assert ood.auroc(inside, outside) == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert ood.aupr(inside, outside) == pytest.approx(sklearn_metrics.average_precision_score(truth, scores), abs=1e-12)
    false, true, _ = sklearn_metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert ood.fpr_at_tpr(inside, outside) == pytest.approx(false[true >= 0.95 - 1e-12].min(), abs=1e-12)


def test_nan_is_the_lowest_score_there_is_and_is_counted():
    found = ood.detection(np.array([1.0, 2.0, np.nan]), np.array([-np.inf, np.nan]))
    # Of six pairs the inside wins four, the two NaN tie, and NaN loses to -inf.
    assert found.auroc == pytest.approx((4 + 0.5) / 6)
    assert found.not_finite == 2
    assert ood.detection(np.full(3, np.nan), np.ones(4)).auroc == 0


# f(x) = Wx, whose every score is known.
WEIGHTS = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (10, 2, 2, 3)).astype(np.float32)


def _scores(**settings):
    logits_fn = lambda x: x.reshape(len(x), -1) @ WEIGHTS  # noqa: E731
    scores = jax.jit(lambda x: ood.scores(jax.random.key(0), logits_fn, x, noise_std=0.0, **settings))(IMAGES)
    return {name: np.asarray(values) for name, values in scores.items()}


def _posterior(images):
    """Of every class, with its logarithm's normaliser log p~ and the gradient of that."""
    logits = images.reshape(10, -1).astype(np.float64) @ WEIGHTS
    density = np.log(np.exp(logits).sum(axis=1))
    posterior = np.exp(logits - density[:, None])
    return posterior, density, (posterior @ WEIGHTS.T).reshape(images.shape)


def test_scores_of_a_linear_classifier_are_their_closed_forms():
    scores = _scores(num_steps=0)
    posterior, density, gradient = _posterior(IMAGES)
    assert scores.keys() == ood.SCORES.keys()
    expected = {
        "log_density": density,
        "max_posterior": np.log(posterior.max(axis=1)),
        "approximate_mass": -np.linalg.norm(gradient.reshape(10, -1), axis=1),
        "max_logit": np.log(posterior.max(axis=1)) + density,
        "refine": np.zeros(10),
        "refine_gradient": np.zeros(10),
        "refine_distance": np.zeros(10),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("step_size", "clip", "bound"), [(0.1, None, None), (1e4, 1e-5, 1.0)])
def test_refinement_scores_compare_with_the_end_of_a_chain_that_clips_as_it_is_told(step_size, clip, bound):
    scores = _scores(num_steps=1, step_size=step_size, grad_clip=clip, bounds=bound and (-bound, bound))
    _, density, gradient = _posterior(IMAGES)
    moved = IMAGES + step_size * np.clip(gradient, -(clip or np.inf), clip or np.inf)
    assert bound is None or np.abs(moved).max() > 1.01
    moved = np.clip(moved, -(bound or np.inf), bound or np.inf)
    np.testing.assert_allclose(scores["refine"], density - _posterior(moved)[1], atol=1e-5)
    distance = np.linalg.norm((moved - IMAGES).reshape(10, -1), axis=1)
    np.testing.assert_allclose(scores["refine_distance"], -distance, rtol=1e-4)
    # Up the gradient, the density grows.
    assert (scores["refine"] < 0).all()


TEST = tiny.dataset().test


def test_builtin_sets_are_what_they_say_and_a_function_of_the_seed():
    found, again, other = (ood_sets.builtin(TEST, 12, seed=seed) for seed in (0, 0, 1))
    sets, test = {name: some.images for name, some in found.items()}, to_float(TEST.images)
    for name, images in sets.items():
        assert found[name].description
        assert (images.shape, images.dtype) == ((12, 8, 8, 1), np.float32)
        assert np.abs(images).max() <= 1
        np.testing.assert_array_equal(images, again[name].images)
        assert name in ("inverted", "rotated") or not np.array_equal(images, other[name].images)

    def made_from(images: np.ndarray, wanted: np.ndarray) -> bool:
        return all(np.isclose(wanted, image, atol=1e-6).all(axis=(1, 2, 3)).any() for image in images)

    first, second = np.triu_indices(12, 1)
    halfway, differ = (test[first] + test[second]) / 2, TEST.labels[first] != TEST.labels[second]
    assert made_from(sets["midpoints"], halfway)
    assert made_from(sets["midpoints_of_classes"], halfway[differ])
    assert not made_from(sets["midpoints"], halfway[differ])
    assert made_from(sets["inverted"], -test)
    assert made_from(sets["rotated"], np.rot90(test, axes=(1, 2)))
    assert (sets["constant"].std(axis=(1, 2)) < 1e-6).all()
    assert len(np.unique(sets["constant"][:, 0, 0, 0])) > 6
    assert sets["uniform_noise"].std() == pytest.approx(1 / np.sqrt(3), rel=0.1)
    smooth = np.abs(np.diff(sets["photographs"], axis=1)).mean()
    assert smooth < np.abs(np.diff(sets["uniform_noise"], axis=1)).mean() / 3
    assert sets["photographs"].std(axis=(1, 2)).max() > 0.1


def test_images_that_are_not_square_are_turned_upside_down():
    images = np.random.default_rng(0).integers(0, 256, (6, 6, 9, 1)).astype(np.uint8)
    sets = ood_sets.builtin(Split(images, np.arange(6, dtype=np.int32)), 6, seed=0)
    assert {some.images.shape for some in sets.values()} == {(6, 6, 9, 1)}
    upside_down = to_float(images)[:, ::-1, ::-1]
    assert all(any(np.allclose(image, one) for one in upside_down) for image in sets["rotated"].images)


def test_another_data_set_is_brought_to_the_models_size_and_channels():
    some = ood_sets.named(Data(), "digits", (12, 12, 3), 7, seed=0)
    assert some.images.shape == (7, 12, 12, 3)
    assert "digits" in some.description
    np.testing.assert_array_equal(some.images[..., 0], some.images[..., 2])
    as_they_are = ood_sets.named(Data(), "digits", (8, 8, 1), 7, seed=0).images
    test = to_float(datasets.load(Data()).test.images)
    assert all((image == test).all(axis=(1, 2, 3)).any() for image in as_they_are)
    assert ood_sets.named(Data(), "digits", (6, 9, 1), 2, seed=0).images.shape == (2, 6, 9, 1)


def test_colour_becomes_grey_by_luma(tmp_path):
    green = np.full((30, 8, 8, 3), [0, 200, 0], np.uint8)
    np.savez(tmp_path / "green.npz", images=green, labels=np.arange(30) % 3)
    some = ood_sets.named(Data(), str(tmp_path / "green.npz"), (8, 8, 1), 3, seed=0)
    np.testing.assert_allclose(some.images, round(0.587 * 200) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("count", "classes", "side", "empty"),
                         [(1, 1, 8, {"midpoints", "midpoints_of_classes"}), (2, 2, 450, set())])  # fmt: skip
def test_few_and_large_test_images_make_the_sets_they_can(count, classes, side, empty):
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    test = Split(images, (np.arange(count) % classes).astype(np.int32))
    sets = ood_sets.builtin(test, 3, seed=0)
    assert {name for name, some in sets.items() if not len(some.images)} <= empty
    assert all(some.images.shape[1:] == (side, side, 3) for some in sets.values())
    assert len(sets["photographs"].images) == 3
