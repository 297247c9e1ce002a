"""The joint loss: its values against NumPy, its gradient against exact likelihoods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jem_jax import objective
from jem_jax.objective import Logits, Weights

LABELS = np.array([2, 0, 1, 2], np.int32)


def _arrays(count=4):
    """Logits [4, 3] of the labelled, data, negative and conditional negative batches."""
    return np.random.default_rng(0).normal(scale=2.0, size=(count, 4, 3))


def _cross_entropy(logits):
    return -special.log_softmax(logits, axis=-1)[np.arange(4), LABELS].mean()


def _marginal(logits):
    return special.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _loss(arrays, weights):
    return objective.joint_loss(Logits(*arrays), LABELS, weights)


ALL = Weights(p_x=0.7, p_y_given_x=1.3, p_xy=0.4, energy_l2=0.1)


def _expected_loss(arrays, weights):
    labelled, data, negatives, conditional = arrays
    place = np.arange(4), LABELS
    return (
        weights.p_y_given_x * _cross_entropy(labelled)
        + weights.p_x * (_marginal(negatives).mean() - _marginal(data).mean())
        + weights.energy_l2 * ((_marginal(data) ** 2).mean() + (_marginal(negatives) ** 2).mean())
        + weights.p_xy * (conditional[place].mean() - labelled[place].mean())
    )


@pytest.mark.parametrize(
    ("weights", "unused"),
    [
        (ALL, []),
        (Weights(p_x=0), [1, 2, 3]),
        (Weights(p_x=0, p_y_given_x=0, p_xy=1), [1, 2]),
        (Weights(p_x=0, energy_l2=0.5), [3]),
    ],
)
def test_the_loss_and_its_gradient_agree_with_numpy_and_a_weight_of_zero_switches_its_term_off(weights, unused):
    arrays, spacing = _arrays(), 1e-6
    expected = np.zeros_like(arrays)
    for place in np.ndindex(arrays.shape):
        offset = np.zeros_like(arrays)
        offset[place] = spacing
        ends = (_expected_loss(arrays + sign * offset, weights) for sign in (1, -1))
        expected[place] = np.subtract(*ends) / (2 * spacing)
    with jax.enable_x64(True):
        (loss, terms), gradient = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=1)(arrays, weights)
    np.testing.assert_allclose(loss, _expected_loss(arrays, weights), rtol=1e-12)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)
    np.testing.assert_array_equal(np.asarray(gradient)[unused], 0)
    assert weights.needs_negatives is ("log_px_samples" in terms) is (2 not in unused)
    assert weights.needs_conditional_negatives is ("contrast_xy" in terms) is (3 not in unused)


def test_the_contrast_has_the_gradient_of_the_negative_log_likelihood():
    # Three states of energies θ: p = (1/2, 1/4, 1/4), so four negatives represent the model without error.
    theta = np.log([2.0, 1.0, 1.0]) + 0.3
    data, negatives = np.array([0, 2, 2, 2, 1]), np.array([0, 0, 1, 2])

    def exact(theta):
        return -jnp.mean(jax.nn.log_softmax(theta)[data])

    with jax.enable_x64(True):
        contrast = lambda theta: objective.contrast(theta[data], theta[negatives])  # noqa: E731
        ours, theirs = jax.jit(lambda theta: (jax.grad(contrast)(theta), jax.grad(exact)(theta)))(theta)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_the_terms_are_what_they_are_named_for():
    labelled, data, negatives, conditional = arrays = _arrays()
    negatives[1] -= 60.0  # the largest |log p~| may be a negative one
    with jax.enable_x64(True):
        loss, terms = _loss(arrays, ALL)
    place = np.arange(4), LABELS
    expected = {
        "loss": loss,
        "cross_entropy": _cross_entropy(labelled),
        "accuracy": np.mean(labelled.argmax(axis=-1) == LABELS),
        "log_px_data": _marginal(data).mean(),
        "log_px_samples": _marginal(negatives).mean(),
        "log_px_max": np.abs(_marginal(arrays)).max(),
        "contrast_xy": conditional[place].mean() - labelled[place].mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-12, err_msg=name)
    assert 0 < terms["accuracy"] < 1
    assert all(jnp.shape(term) == () for term in terms.values())


@pytest.mark.parametrize("place", range(4))
def test_a_nan_in_any_batch_reaches_the_loss_and_the_largest_density(place):
    arrays = _arrays().astype(np.float32)
    arrays[place, 1, 2] = np.nan
    arrays[place, 1, LABELS[1]] = np.nan
    loss, terms = _loss(arrays, ALL)
    assert np.isnan(loss)
    assert np.isnan(terms["log_px_max"])


def test_missing_negatives_are_an_error():
    labelled, data, negatives, _ = _arrays()
    for logits in (Logits(labelled), Logits(labelled, data), Logits(labelled, negatives=negatives)):
        with pytest.raises(ValueError, match="need logits of data and of negatives"):
            jax.eval_shape(lambda logits=logits: objective.joint_loss(logits, LABELS, Weights()))
    with pytest.raises(ValueError, match="need logits of conditional negatives"):
        jax.eval_shape(lambda: objective.joint_loss(Logits(labelled, data, negatives), LABELS, Weights(p_xy=1)))


def test_bfloat16_logits_give_a_float32_loss():
    arrays = jnp.asarray(_arrays(), jnp.bfloat16)
    loss, terms = _loss(arrays, ALL)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, _expected_loss(np.asarray(arrays, np.float64), ALL), rtol=1e-5)
    assert terms["log_px_max"].dtype == jnp.float32
