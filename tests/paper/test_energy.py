"""The quantities in a classifier's logits, against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jem_jax import energy

SHAPES = [(3,), (2, 4, 7)]


def _logits(shape, scale=3.0):
    return np.random.default_rng(0).normal(scale=scale, size=shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definitions_agree_with_numpy(shape):
    logits = _logits(shape)
    labels = np.random.default_rng(1).integers(0, shape[-1], shape[:-1])
    marginal = special.logsumexp(logits, axis=-1)
    joint = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    with jax.enable_x64(True):
        np.testing.assert_allclose(energy.log_density(jnp.asarray(logits)), marginal, rtol=1e-13)
        np.testing.assert_allclose(energy.energy(jnp.asarray(logits)), -marginal, rtol=1e-13)
        np.testing.assert_array_equal(energy.joint_log_density(jnp.asarray(logits), jnp.asarray(labels)), joint)
        np.testing.assert_allclose(
            energy.log_posterior(jnp.asarray(logits)), logits - marginal[..., None], rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_neither_overflow_nor_underflow(size):
    logits = jnp.array([[size, 0.0, -size], [-size, -size, -size], [size, size, size]], jnp.float32)
    np.testing.assert_allclose(energy.log_density(logits), np.array([1, -1, 1]) * size + [0, np.log(3), np.log(3)])
    thirds = np.full(3, -np.log(3))
    np.testing.assert_allclose(energy.log_posterior(logits), [[0, -size, -2 * size], thirds, thirds], rtol=1e-6)
    posterior = np.array([[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3])
    gradient = jax.grad(lambda logits: energy.log_density(logits).sum())(logits)
    np.testing.assert_allclose(gradient, posterior, rtol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = jnp.asarray(_logits((8, 10)), jnp.bfloat16)
    exact = np.asarray(logits, np.float64)
    labels = jnp.arange(8)
    results = {
        "log_density": (energy.log_density(logits), special.logsumexp(exact, axis=-1)),
        "energy": (energy.energy(logits), -special.logsumexp(exact, axis=-1)),
        "joint": (energy.joint_log_density(logits, labels), exact[np.arange(8), np.arange(8)]),
        "posterior": (energy.log_posterior(logits), special.log_softmax(exact, axis=-1)),
    }
    for name, (value, expected) in results.items():
        assert value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("label", [-1, -3, -4, 3, 2**31 - 1])
def test_a_label_out_of_range_gives_nan_and_leaves_its_neighbours(label):
    values = energy.joint_log_density(jnp.array([[1.0, 2.0, 3.0]] * 2), jnp.array([label, 1]))
    assert np.isnan(values[0])
    assert values[1] == 2.0


def test_labels_of_another_shape_are_an_error():
    with pytest.raises(AssertionError, match="shape"):
        energy.joint_log_density(jnp.zeros((4, 3)), jnp.zeros((5,), jnp.int32))


def test_the_score_of_a_gaussian_is_precision_times_the_way_to_the_mean():
    rng = np.random.default_rng(0)
    root, mean, x = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=(5, 3))
    precision = root @ root.T

    def log_density(x):
        return -0.5 * jnp.einsum("bi,ij,bj->b", x - mean, precision, x - mean)

    with jax.enable_x64(True):
        np.testing.assert_allclose(energy.score(log_density, jnp.asarray(x)), (mean - x) @ precision, rtol=1e-12)


def _mixture_logits(means, weights):
    """Logits whose log p~(x, y) is log π_y N(x; μ_y, I), up to a constant."""
    return lambda x: jnp.log(weights) - 0.5 * jnp.sum((x[:, None] - means) ** 2, axis=-1)


def test_the_conditional_follows_its_own_class_and_the_marginal_their_mixture():
    rng = np.random.default_rng(0)
    means, weights, x = rng.normal(size=(3, 2)), np.array([0.2, 0.3, 0.5]), rng.normal(size=(4, 2))
    labels = np.array([2, 0, 0, 1])
    posterior = weights * np.stack([stats.multivariate_normal(mean).pdf(x) for mean in means], axis=1)
    posterior /= posterior.sum(axis=1, keepdims=True)
    with jax.enable_x64(True):
        logits_fn = _mixture_logits(jnp.asarray(means), jnp.asarray(weights))
        conditional = energy.score(energy.conditional(logits_fn, jnp.asarray(labels)), jnp.asarray(x))
        marginal = energy.score(energy.marginal(logits_fn), jnp.asarray(x))
    np.testing.assert_allclose(conditional, means[labels] - x, rtol=1e-12)
    np.testing.assert_allclose(marginal, posterior @ means - x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_score_has_the_dtype_of_x(dtype):
    x = jnp.array([[1.0, -2.0]], dtype)
    gradient = energy.score(lambda x: -0.5 * jnp.sum(x.astype(jnp.float32) ** 2, axis=1), x)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[-1.0, 2.0]])


@pytest.mark.parametrize(
    ("log_density", "shape"),
    [
        (lambda x: x, r"\(4, 3\)"),
        (jnp.sum, r"\(\)"),
        (lambda x: x[:, :1], r"\(4, 1\)"),
        (lambda x: x[:2, 0], r"\(2,?\)"),
    ],
    ids=["per value", "one for all", "trailing axis", "too few"],
)
def test_a_log_density_must_give_one_value_per_example(log_density, shape):
    with pytest.raises(AssertionError, match=rf"shape {shape} but expected \(4,?\)"):
        energy.score(log_density, jnp.ones((4, 3)))


def test_the_score_vectorises_over_parameters_under_jit():
    means = jnp.array([0.0, 1.0, -3.0])
    x = jnp.array([[0.5], [2.0]])
    score = jax.jit(jax.vmap(lambda mean: energy.score(lambda x: -0.5 * jnp.sum((x - mean) ** 2, axis=1), x)))
    np.testing.assert_allclose(score(means), means[:, None, None] - x, rtol=1e-6)
