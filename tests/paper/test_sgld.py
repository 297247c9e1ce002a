"""The SGLD chain, against closed forms, a published implementation and its own contract."""

import math

import blackjax
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jem_jax import convolution, energy, prng, sgld, wide_resnet

KEY = jax.random.key(0)
SETTINGS = {"num_steps": 6, "step_size": 0.3, "noise_std": 0.2}


def _gaussian(precision):
    return lambda x: -0.5 * precision * jnp.sum(x**2, axis=tuple(range(1, x.ndim)))


def _linear(slope):
    """A log density whose gradient is `slope` everywhere."""
    return lambda x: jnp.sum(slope * x, axis=tuple(range(1, x.ndim)))


def _ripple(x):
    """A log density with no symmetry to hide behind."""
    return jnp.sum(jnp.sin(1.3 * x + 0.4) - 0.1 * x**2, axis=tuple(range(1, x.ndim)))


@jax.jit
def _chain(key, x):
    return sgld.chain(key, _ripple, x, **SETTINGS)


def _starts(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def _assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


# The distribution that a chain samples.


@jax.jit
def _gaussian_ends(precision, step_size, noise_std):
    """50,000 independent values after 70 steps from zero."""
    settings = {"num_steps": 70, "step_size": step_size, "noise_std": noise_std}
    return sgld.chain(KEY, _gaussian(precision), jnp.zeros((250, 200)), **settings)


@pytest.mark.parametrize(
    ("precision", "step_size", "noise_std"),
    [(1.0, 0.1, 0.3), (4.0, 0.25, 1.0), (2.5, 0.6, 0.7), (0.5, 1.0, 0.01), (1.0, 1.9, 0.5)],
)
def test_a_gaussian_chain_has_the_stationary_variance_of_its_discretisation(precision, step_size, noise_std):
    contraction = 1 - step_size * precision
    assert contraction**140 < 1e-6  # what is left of the start
    variance = noise_std**2 / (1 - contraction**2)
    values = np.asarray(_gaussian_ends(precision, step_size, noise_std), np.float64).ravel()
    assert abs(values.mean()) < 5 * math.sqrt(variance / values.size)
    assert abs(np.mean(values**2) / variance - 1) < 5 * math.sqrt(2 / values.size)


def test_the_textbook_noise_visits_the_modes_of_a_mixture_by_their_weights():
    step_size, num_chains = 0.01, 4000
    means, weights = np.array([-1.5, 1.5]), np.array([0.3, 0.7])

    def logits_fn(x):
        return jnp.log(weights) - 0.5 * (x[:, None] - means) ** 2

    start = jnp.full((num_chains,), -1.5)  # all in the lighter mode
    x = jax.jit(
        lambda key, x: sgld.chain(
            key,
            energy.marginal(logits_fn),
            x,
            num_steps=1500,
            step_size=step_size,
            noise_std=math.sqrt(2 * step_size),
        )
    )(KEY, start)
    responsibility = np.exp(np.asarray(energy.log_posterior(logits_fn(x)), np.float64))[:, 0]
    assert abs(responsibility.mean() - weights[0]) < 5 * responsibility.std() / math.sqrt(num_chains)
    left = np.mean(np.asarray(x) < 0)
    expected = np.sum(weights * stats.norm.cdf(0, loc=means))
    assert abs(left - expected) < 5 * math.sqrt(expected * (1 - expected) / num_chains)


def test_noise_is_standard_normal_and_independent_over_steps_examples_and_pixels():
    states = sgld.trajectory(
        KEY, _linear(0.0), jnp.zeros((100, 100)), num_steps=4, every=1, step_size=1.0, noise_std=2.0
    )
    noise = np.diff(np.asarray(states, np.float64), axis=0) / 2.0
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    limit = 5 / math.sqrt(noise[0].size)
    for axis in range(3):
        neighbours = np.mean(noise * np.roll(noise, 1, axis=axis))
        assert abs(neighbours) < limit, axis


# One step and the chain, value by value.


def test_without_noise_the_chain_is_gradient_ascent():
    start = np.random.default_rng(0).normal(size=(4, 3))
    expected = start.copy()
    for _ in range(7):
        expected += 0.3 * (1.3 * np.cos(1.3 * expected + 0.4) - 0.2 * expected)
    with jax.enable_x64(True):
        for noise_std in (0, 0.0, jnp.zeros(())):
            ends = sgld.chain(KEY, _ripple, jnp.asarray(start), num_steps=7, step_size=0.3, noise_std=noise_std)
            np.testing.assert_allclose(ends, expected, rtol=1e-13)


def test_a_step_without_noise_draws_none():
    jaxpr = str(jax.make_jaxpr(lambda x: sgld.step(KEY, _ripple, x, step_size=0.3, noise_std=0))(jnp.ones((4, 3))))
    assert "random_bits" not in jaxpr
    jaxpr = str(jax.make_jaxpr(lambda x: sgld.step(KEY, _ripple, x, step_size=0.3, noise_std=0.1))(jnp.ones((4, 3))))
    assert "random_bits" in jaxpr


def test_a_step_equals_blackjax():
    oracle = blackjax.sgld(lambda x, _: jax.grad(lambda x: _ripple(x[None])[0])(x))

    @jax.jit
    def both(example_keys, x, step_size, noise_std):
        temperature = noise_std**2 / (2 * step_size)
        theirs = jax.vmap(lambda key, x: oracle.step(key, x, None, step_size, temperature))(example_keys, x)
        return sgld.step(example_keys, _ripple, x, step_size=step_size, noise_std=noise_std), theirs

    with jax.enable_x64(True):
        x = _starts(5, 3, 2)
        assert x.dtype == jnp.float64
        for step_size, noise_std in [(1.0, 0.01), (0.1, 0.7)]:
            ours, theirs = both(jax.random.split(KEY, 5), x, step_size, noise_std)
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_the_gradient_is_clipped_value_by_value_and_before_the_step_size():
    slope = jnp.array([[-5.0, -0.5, 0.0, 0.5, 5.0]])
    x = sgld.step(KEY, _linear(slope), jnp.ones((1, 5)), step_size=3.0, noise_std=0, grad_clip=1.0)
    np.testing.assert_allclose(x, [[-2.0, -0.5, 1.0, 2.5, 4.0]])


def test_bounds_clip_x_after_every_step():
    slope = jnp.array([[-0.4, 0.1, 0.4]])
    settings = {"num_steps": 4, "every": 1, "step_size": 1.0, "noise_std": 0, "bounds": (-1.0, 0.5)}
    states = sgld.trajectory(KEY, _linear(slope), jnp.zeros((1, 3)), **settings)
    np.testing.assert_allclose(states[2, 0], [-0.8, 0.2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(states[4, 0], [-1.0, 0.4, 0.5], rtol=1e-6)


def test_bounds_hold_for_the_noise_too():
    x = sgld.chain(KEY, _linear(0.0), jnp.zeros((8, 50)), num_steps=3, step_size=1.0, noise_std=5.0, bounds=(-1.0, 0.5))
    assert x.min() == -1.0
    assert x.max() == 0.5


def test_a_schedule_gives_each_step_its_size():
    states = sgld.trajectory(
        KEY,
        _linear(1.0),
        jnp.zeros((2, 3)),
        num_steps=5,
        every=1,
        step_size=lambda index: 1.0 / (1 + index),
        noise_std=0,
    )
    expected = np.broadcast_to(np.reshape([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], (5, 1, 1)), (5, 2, 3))
    np.testing.assert_allclose(np.diff(states, axis=0), expected, rtol=1e-5)


def test_a_trajectory_holds_the_states_that_the_chain_passes():
    x = _starts(6, 3)
    every_step = sgld.trajectory(KEY, _ripple, x, every=1, **SETTINGS)
    assert every_step.shape == (7, 6, 3)
    np.testing.assert_array_equal(every_step[0], x)
    _assert_close(every_step[-1], _chain(KEY, x))
    _assert_close(sgld.trajectory(KEY, _ripple, x, every=2, **SETTINGS), every_step[::2])


@pytest.mark.parametrize("every", [4, 7, 12, 0, -1])
def test_a_trajectory_must_keep_a_divisor_of_the_steps(every):
    with pytest.raises(ValueError, match="every must be positive and divide num_steps"):
        sgld.trajectory(KEY, _ripple, jnp.ones((2, 3)), every=every, **SETTINGS)


def test_no_steps_change_nothing():
    x = jax.random.normal(KEY, (4, 3))
    np.testing.assert_array_equal(sgld.chain(KEY, _ripple, x, **SETTINGS | {"num_steps": 0}), x)
    np.testing.assert_array_equal(sgld.trajectory(KEY, _ripple, x, every=1, **SETTINGS | {"num_steps": 0}), x[None])


def test_a_negative_number_of_steps_is_an_error():
    with pytest.raises(ValueError, match="num_steps must be at least 0, not -1"):
        sgld.chain(KEY, _ripple, jnp.ones((2, 3)), **SETTINGS | {"num_steps": -1})
    with pytest.raises(ValueError, match="num_steps must be at least 0, not -2"):
        sgld.trajectory(KEY, _ripple, jnp.ones((2, 3)), every=1, **SETTINGS | {"num_steps": -2})


# Randomness belongs to the example.


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2, 2)])
def test_an_examples_chain_does_not_depend_on_the_batch_around_it(shape):
    x, example_keys = _starts(6, *shape), jax.random.split(KEY, 6)
    ends = _chain(example_keys, x)
    assert ends.shape == x.shape
    # Examples 4 and 0 stay, elsewhere in a batch of others.
    places = jnp.array([4, 2, 2, 0, 2, 2])
    _assert_close(_chain(example_keys[places], x[places])[jnp.array([0, 3])], ends[jnp.array([4, 0])])


def test_the_key_decides_the_chain():
    x = _starts(6, 3)
    np.testing.assert_array_equal(_chain(KEY, x), _chain(KEY, x))
    assert jnp.all(_chain(KEY, x) != _chain(jax.random.key(1), x))


def test_jempps_two_loops_are_a_chain_of_its_outer_steps_alone():
    """The released M × N steps (Yang and Ji 2021): an outer one keeps the gradient p at the first convolution's output,
    N inner ones move x by p pulled back through that convolution. As it is linear, they are N times the same, and
    clipping x after each of them or after all gives the same place."""
    kernel, weights = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(KEY), ((3, 3, 1, 6), (384, 3)), strict=True)
    )
    first = lambda x: convolution.conv(x, kernel)  # noqa: E731
    rest = lambda h: energy.log_density(0.3 * jnp.tanh(h).reshape(len(h), -1) @ weights)  # noqa: E731
    x = start = jax.random.uniform(jax.random.key(5), (4, 8, 8, 1), minval=-1, maxval=1)
    outer, inner, size, clipped = 3, 5, 0.2, 0.0
    for _ in range(outer):
        p = jax.grad(lambda h: rest(h).sum())(first(x))
        for _ in range(inner):
            gradient = jax.vjp(first, x)[1](p)[0]
            clipped = max(clipped, np.mean(np.abs(gradient) > 1))
            x = jnp.clip(x + size * jnp.clip(gradient, -1, 1), -1, 1)
    settings = {"step_size": inner * size, "noise_std": 0.0, "grad_clip": 1.0, "bounds": (-1.0, 1.0)}
    chain = sgld.chain(KEY, lambda x: rest(first(x)), start, num_steps=outer, **settings)
    np.testing.assert_allclose(chain, x, atol=1e-4)
    assert 0.05 < clipped < 0.95
    assert 0.05 < np.mean(np.abs(x) == 1) < 0.95


def test_the_chain_keeps_the_dtype_of_x():
    ends = sgld.chain(KEY, _ripple, jnp.ones((2, 3), jnp.bfloat16), **SETTINGS | {"noise_std": jnp.float32(0.2)})
    assert ends.dtype == jnp.bfloat16


# Transformations.


def test_the_chain_is_differentiable_in_its_start_and_its_parameters():
    # Without noise a Gaussian chain ends in (1 - αλ)^K x.
    def end(precision, x):
        return sgld.chain(KEY, _gaussian(precision), x, num_steps=5, step_size=0.3, noise_std=0).sum()

    by_precision, by_x = jax.grad(end, argnums=(0, 1))(0.7, jnp.ones((1, 1)))
    contraction = 1 - 0.3 * 0.7
    np.testing.assert_allclose(by_precision, -0.3 * 5 * contraction**4, rtol=1e-5)
    np.testing.assert_allclose(by_x, [[contraction**5]], rtol=1e-5)


def test_vmap_runs_chains_of_many_settings():
    x = _starts(4, 3)
    chain_keys, step_sizes, noises = jax.random.split(KEY, 3), jnp.array([0.1, 0.2, 0.5]), jnp.array([0.0, 0.1, 1.0])

    @jax.jit
    def run(key, step_size, noise_std):
        return sgld.chain(key, _ripple, x, num_steps=5, step_size=step_size, noise_std=noise_std)

    one_by_one = jnp.stack([run(*settings) for settings in zip(chain_keys, step_sizes, noises, strict=True)])
    _assert_close(jax.vmap(run)(chain_keys, step_sizes, noises), one_by_one)


def test_pmap_runs_the_chains_of_one_device():
    devices = jax.local_devices()[:3]  # 1, 2 or 3 divide the batch
    x = _starts(6, 3)

    def run(key, x):
        first = jax.lax.axis_index("devices") * x.shape[0]
        return sgld.chain(prng.for_examples(key, x.shape[0], first), _ripple, x, **SETTINGS)

    cut = x.reshape(len(devices), -1, 3)
    ends = jax.pmap(run, axis_name="devices", in_axes=(None, 0), devices=devices)(KEY, cut)
    _assert_close(ends.reshape(x.shape), _chain(KEY, x))


def test_a_step_is_traced_once_for_all_settings_and_states():
    def step(key, slope, x, step_size, noise_std):
        return sgld.step(key, _linear(slope), x, step_size=step_size, noise_std=noise_std)

    step = jax.jit(chex.assert_max_traces(step, n=1))
    x = jnp.zeros((2, 3))
    for index in range(4):
        x = step(jax.random.key(index), float(index), x, 0.1 * index, 0.01 * index)
    assert jnp.all(x != 0)


def test_a_sampler_is_compiled_once_for_all_parameters():
    traces = []

    def log_density(params, x):
        traces.append(None)
        return _linear(params["slope"])(x)

    sampler = sgld.make_sampler(log_density, num_steps=3, step_size=0.5, noise_std=0)
    sampler({"slope": jnp.float32(0)}, KEY, jnp.zeros((2, 3)))
    compiled = len(traces)
    for slope in range(1, 4):
        ends = sampler({"slope": jnp.float32(slope)}, jax.random.key(slope), jnp.zeros((2, 3)))
        np.testing.assert_allclose(ends, 1.5 * slope, rtol=1e-6)
    assert len(traces) == compiled


# Memory.


def _temporary_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def _end(log_density, num_steps):
    return lambda key, x: sgld.chain(key, log_density, x, num_steps=num_steps, step_size=1.0, noise_std=0.01)


def test_memory_does_not_grow_with_the_steps():
    x = jnp.zeros((16, 8, 8, 3))
    short, long = (_temporary_bytes(_end(_ripple, num_steps), KEY, x) for num_steps in (10, 210))
    assert long - short < 20 * 1024


def test_memory_of_a_chain_that_is_differentiated_does_grow():
    # It must keep its states, which shows that the figure above would count them.
    x = jnp.zeros((16, 8, 8, 3))

    def loss(num_steps):
        return lambda x: sgld.chain(KEY, _ripple, x, num_steps=num_steps, step_size=1.0, noise_std=0).sum()

    short, long = (_temporary_bytes(jax.grad(loss(num_steps)), x) for num_steps in (10, 210))
    assert long - short > 100 * x.nbytes


def test_memory_does_not_grow_with_the_steps_of_a_network():
    network = wide_resnet.WideResNet(10, depth=10, width=1)
    x = jnp.zeros((4, 8, 8, 3))
    variables = jax.eval_shape(network.init, KEY, x)

    def run(num_steps):
        def end(variables, key, x):
            return _end(energy.marginal(lambda x: network.apply(variables, x)), num_steps)(key, x)

        return _temporary_bytes(end, variables, KEY, x)

    assert run(60) - run(10) < 5 * 1024


def test_unrolling_changes_nothing_but_the_program():
    x = _starts(4, 3)
    chain = jax.jit(lambda x, unroll: sgld.chain(KEY, _ripple, x, unroll=unroll, **SETTINGS), static_argnums=1)
    _assert_close(chain(x, 4), chain(x, 1))  # 4 does not divide the 6 steps
    loops = [
        str(jax.make_jaxpr(lambda x, unroll=unroll: sgld.chain(KEY, _ripple, x, unroll=unroll, **SETTINGS))(x))
        for unroll in (1, 4)
    ]
    assert ["unroll=1" in loops[0], "unroll=4" in loops[1]] == [True, True]
