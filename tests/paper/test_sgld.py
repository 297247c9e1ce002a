"""The SGLD chain, against closed forms, a published implementation and its own contract."""

import math

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jem_jax import convolution, energy, sgld

KEY = jax.random.key(0)
SETTINGS = {"num_steps": 6, "step_size": 0.3, "noise_std": 0.2}


def _linear(slope):
    """A log density whose gradient is `slope` everywhere."""
    return lambda x: jnp.sum(slope * x, axis=tuple(range(1, x.ndim)))


def _ripple(x):
    """A log density with no symmetry to hide behind."""
    return jnp.sum(jnp.sin(1.3 * x + 0.4) - 0.1 * x**2, axis=tuple(range(1, x.ndim)))


@jax.jit
def _chain(key, x):
    return sgld.chain(key, _ripple, x, **SETTINGS)


def _states(log_density, x, **settings):
    """Every state of a chain of steps of size 1 without noise, unless the settings say otherwise."""
    settings = {"every": 1, "step_size": 1.0, "noise_std": 0, **settings}
    return np.asarray(jax.jit(lambda x: sgld.trajectory(KEY, log_density, x, **settings))(x))


def _starts(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@jax.jit
def _gaussian_ends(precision, step_size, noise_std):
    """20,000 independent values after 70 steps from zero."""
    density = lambda x: -0.5 * precision * jnp.sum(x**2, axis=1)  # noqa: E731
    return sgld.chain(KEY, density, jnp.zeros((200, 100)), num_steps=70, step_size=step_size, noise_std=noise_std)


@pytest.mark.parametrize(("precision", "step_size", "noise_std"), [(1.0, 0.1, 0.3), (2.5, 0.6, 0.7)])
def test_a_gaussian_chain_has_the_stationary_variance_of_its_discretisation(precision, step_size, noise_std):
    contraction = 1 - step_size * precision
    assert contraction**140 < 1e-6  # what is left of the start
    variance = noise_std**2 / (1 - contraction**2)
    values = np.asarray(_gaussian_ends(precision, step_size, noise_std), np.float64).ravel()
    assert abs(values.mean()) < 5 * math.sqrt(variance / values.size)
    assert abs(np.mean(values**2) / variance - 1) < 5 * math.sqrt(2 / values.size)


def test_noise_is_standard_normal_and_independent_over_steps_examples_and_pixels():
    states = _states(_linear(0.0), np.zeros((100, 100), np.float32), num_steps=4, noise_std=2.0)
    noise = np.diff(states.astype(np.float64), axis=0) / 2.0
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    limit = 5 / math.sqrt(noise[0].size)
    for axis in range(3):
        neighbours = np.mean(noise * np.roll(noise, 1, axis=axis))
        assert abs(neighbours) < limit, axis


def test_without_noise_none_is_drawn():
    for noise_std, draws in ((0, False), (jnp.zeros(()), True)):
        chain = lambda x, how={**SETTINGS, "noise_std": noise_std}: sgld.chain(KEY, _ripple, x, **how)  # noqa: E731
        assert ("erf_inv" in str(jax.make_jaxpr(chain)(_starts(4, 3)))) == draws


def test_a_step_equals_blackjax():
    oracle = blackjax.sgld(lambda x, _: jax.grad(lambda x: _ripple(x[None])[0])(x))

    @jax.jit
    def both(example_keys, x, step_size, noise_std):
        temperature = noise_std**2 / (2 * step_size)
        theirs = jax.vmap(lambda key, x: oracle.step(key, x, None, step_size, temperature))(example_keys, x)
        return sgld.step(example_keys, _ripple, x, step_size=step_size, noise_std=noise_std), theirs

    with jax.enable_x64(True):
        for step_size, noise_std in [(1.0, 0.01), (0.1, 0.7)]:
            ours, theirs = both(jax.random.split(KEY, 5), _starts(5, 3, 2).astype(np.float64), step_size, noise_std)
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gradients_are_clipped_before_the_step_and_x_after_it_and_a_schedule_gives_each_step_its_size():
    slope, schedule = np.array([[-5.0, -0.1, 0.5, 5.0]]), lambda index: 1.0 / (1 + index)
    settings = {"num_steps": 2, "step_size": schedule, "grad_clip": 1.0, "bounds": (-1.2, 1.6)}
    states = _states(_linear(slope), np.zeros((1, 4), np.float32), **settings)
    np.testing.assert_allclose(states[1:, 0], [[-1, -0.1, 0.5, 1], [-1.2, -0.15, 0.75, 1.5]], rtol=1e-6)
    noisy = _states(_linear(0.0), np.zeros((8, 50), np.float32), noise_std=5.0, **settings)
    assert (noisy[-1].min(), noisy[-1].max()) == pytest.approx((-1.2, 1.6))


def test_a_trajectory_holds_the_states_that_the_chain_passes():
    x = _starts(6, 3)
    every_step = _states(_ripple, x, **SETTINGS)
    assert every_step.shape == (7, 6, 3)
    np.testing.assert_array_equal(every_step[0], x)
    _assert_close(every_step[-1], _chain(KEY, x))
    _assert_close(_states(_ripple, x, every=2, **SETTINGS), every_step[::2])
    np.testing.assert_array_equal(_states(_ripple, x, **SETTINGS | {"num_steps": 0}), x[None])


def test_wrong_numbers_of_steps_are_an_error():
    for every in (4, 0):
        with pytest.raises(ValueError, match="every must be positive and divide num_steps"):
            _states(_ripple, np.ones((2, 3)), every=every, **SETTINGS)
    for function, more in ((sgld.chain, {}), (sgld.trajectory, {"every": 1})):
        with pytest.raises(ValueError, match="num_steps must be at least 0, not -1"):
            function(KEY, _ripple, np.ones((2, 3)), **more, **SETTINGS | {"num_steps": -1})


def test_an_examples_chain_depends_on_its_key_and_not_on_the_batch_around_it():
    x, example_keys = _starts(6, 3), jax.random.split(KEY, 6)
    ends = np.asarray(_chain(example_keys, x))
    # Examples 4 and 0 stay, elsewhere in a batch of others.
    places = np.array([4, 2, 2, 0, 2, 2])
    _assert_close(np.asarray(_chain(example_keys[places], x[places]))[[0, 3]], ends[[4, 0]])
    np.testing.assert_array_equal(_chain(example_keys, x), ends)
    assert np.all(np.asarray(_chain(example_keys[::-1], x)) != ends)


def test_jempps_two_loops_are_a_chain_of_its_outer_steps_alone():
    """The released M × N steps (Yang and Ji 2021): an outer one keeps the gradient p at the first convolution's output,
    N inner ones move x by p pulled back through that convolution. As it is linear, they are N times the same, and
    clipping x after each of them or after all gives the same place."""
    random = np.random.default_rng(0)
    kernel, weights = (random.normal(size=shape).astype(np.float32) for shape in ((3, 3, 1, 6), (384, 3)))
    first = lambda x: convolution.conv(x, kernel)  # noqa: E731
    rest = lambda h: energy.log_density(0.3 * jnp.tanh(h).reshape(len(h), -1) @ weights)  # noqa: E731
    outer, inner, size = 2, 3, 0.3
    settings = {"step_size": inner * size, "noise_std": 0.0, "grad_clip": 1.0, "bounds": (-1.0, 1.0)}

    @jax.jit
    def both(start):
        x, clipped = start, []
        for _ in range(outer):
            p = jax.grad(lambda h: rest(h).sum())(first(x))
            for _ in range(inner):
                gradient = jax.vjp(first, x)[1](p)[0]
                clipped.append(jnp.mean(jnp.abs(gradient) > 1))
                x = jnp.clip(x + size * jnp.clip(gradient, -1, 1), -1, 1)
        return x, jnp.stack(clipped), sgld.chain(KEY, lambda x: rest(first(x)), start, num_steps=outer, **settings)

    x, clipped, chain = both(random.uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32))
    np.testing.assert_allclose(chain, x, atol=1e-4)
    assert 0.05 < clipped.max() < 0.95
    assert 0.05 < np.mean(np.abs(x) == 1) < 0.95


def test_the_chain_keeps_the_dtype_of_x():
    settings, x = SETTINGS | {"noise_std": jnp.float32(0.2)}, jnp.ones((2, 3), jnp.bfloat16)
    assert jax.eval_shape(lambda x: sgld.chain(KEY, _ripple, x, **settings), x).dtype == jnp.bfloat16


def test_a_sampler_is_compiled_once_for_all_parameters():
    traces = []

    def log_density(params, x):
        traces.append(None)
        return _linear(params["slope"])(x)

    sampler = sgld.make_sampler(log_density, num_steps=3, step_size=0.5, noise_std=0)
    ends = [sampler({"slope": jnp.float32(slope)}, jax.random.key(slope), np.zeros((2, 3))) for slope in range(3)]
    compiled = len(traces)
    ends.append(sampler({"slope": jnp.float32(3)}, jax.random.key(3), np.zeros((2, 3))))
    np.testing.assert_allclose(ends, np.broadcast_to(1.5 * np.arange(4).reshape(4, 1, 1), (4, 2, 3)), rtol=1e-6)
    assert len(traces) == compiled


def test_memory_does_not_grow_with_the_steps():
    x = np.zeros((16, 8, 8, 3), np.float32)

    def grown(function, **settings):
        """Bytes that 200 more steps take."""
        run = lambda x, num_steps: function(  # noqa: E731
            lambda x: sgld.chain(KEY, _ripple, x, num_steps=num_steps, step_size=1.0, **settings)
        )(x)
        short, long = (
            jax.jit(run, static_argnums=1).lower(x, num_steps).compile().memory_analysis().temp_size_in_bytes
            for num_steps in (10, 210)
        )
        return long - short

    assert grown(lambda chain: chain, noise_std=0.01) < 20 * 1024
    # A chain that is differentiated must keep its states, which shows that the figure counts them.
    assert grown(lambda chain: jax.grad(lambda x: chain(x).sum()), noise_std=0) > 100 * x.nbytes
