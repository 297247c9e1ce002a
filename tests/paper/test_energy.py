"""The quantities in a classifier's logits, against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jem_jax import energy


@jax.jit
def _all(logits, labels):
    return {
        "log_density": energy.log_density(logits),
        "energy": energy.energy(logits),
        "joint": energy.joint_log_density(logits, labels),
        "posterior": energy.log_posterior(logits),
    }


@pytest.mark.parametrize(("shape", "dtype"), [((3,), jnp.float64), ((2, 4, 7), jnp.float64), ((2, 4, 7), jnp.bfloat16)])
def test_the_definitions_agree_with_numpy_and_reduce_bfloat16_in_float32(shape, dtype):
    random, half = np.random.default_rng(0), dtype == jnp.bfloat16
    with jax.enable_x64(True):
        logits = jnp.asarray(random.normal(scale=3.0, size=shape), dtype)
        labels = random.integers(0, shape[-1], shape[:-1])
        found = _all(logits, labels)
    exact = np.asarray(logits, np.float64)
    marginal = special.logsumexp(exact, axis=-1)
    expected = {
        "log_density": marginal,
        "energy": -marginal,
        "joint": np.take_along_axis(exact, labels[..., None], axis=-1)[..., 0],
        "posterior": exact - marginal[..., None],
    }
    for name, value in found.items():
        assert value.dtype == (jnp.float32 if half else jnp.float64), name
        tolerance = 1e-6 if half else 1e-13
        np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_large_logits_neither_overflow_nor_underflow():
    size = 1e30
    logits = np.array([[size, 0.0, -size], [-size, -size, -size], [size, size, size]], np.float32)
    found = _all(logits, np.zeros(3, int))
    np.testing.assert_allclose(found["log_density"], np.array([1, -1, 1]) * size + [0, np.log(3), np.log(3)])
    thirds = np.full(3, -np.log(3))
    np.testing.assert_allclose(found["posterior"], [[0, -size, -2 * size], thirds, thirds], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda logits: energy.log_density(logits).sum()))(logits)
    np.testing.assert_allclose(gradient, [[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3], rtol=1e-6)


def test_a_label_out_of_range_gives_nan_and_leaves_its_neighbours():
    logits, labels = np.array([[1.0, 2.0, 3.0]] * 6, np.float32), np.array([-1, -3, -4, 3, 2**31 - 1, 1])
    np.testing.assert_array_equal(_all(logits, labels)["joint"], [np.nan] * 5 + [2.0])


def test_the_conditional_follows_its_own_class_and_the_marginal_their_mixture():
    rng = np.random.default_rng(0)
    means, weights, x = rng.normal(size=(3, 2)), np.array([0.2, 0.3, 0.5]), rng.normal(size=(4, 2))
    labels = np.array([2, 0, 0, 1])
    posterior = weights * np.stack([stats.multivariate_normal(mean).pdf(x) for mean in means], axis=1)
    posterior /= posterior.sum(axis=1, keepdims=True)

    def logits_fn(x):
        """log π_y N(x; μ_y, I) is log p~(x, y), up to a constant."""
        return jnp.log(weights) - 0.5 * jnp.sum((x[:, None] - means) ** 2, axis=-1)

    @jax.jit
    def scores(x):
        return energy.score(energy.conditional(logits_fn, labels), x), energy.score(energy.marginal(logits_fn), x)

    with jax.enable_x64(True):
        conditional, marginal = scores(x)
    np.testing.assert_allclose(conditional, means[labels] - x, rtol=1e-12)
    np.testing.assert_allclose(marginal, posterior @ means - x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("log_density", "shape"),
    [
        (jnp.sum, r"\(\)"),
        (lambda x: x[:2, 0], r"\(2,?\)"),
    ],
)
def test_a_log_density_must_give_one_value_per_example(log_density, shape):
    with pytest.raises(AssertionError, match=rf"shape {shape} but expected \(4,?\)"):
        energy.score(log_density, jnp.ones((4, 3)))
