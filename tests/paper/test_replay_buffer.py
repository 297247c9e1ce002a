"""The replay buffer: which slots a batch draws, what it finds there, and what is written back."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jem_jax import prng, replay_buffer

KEY = jax.random.key(0)


def _interval_edges(num_slots, batch_size):
    """In Python's integers, which do not overflow."""
    return np.array([index * num_slots // batch_size for index in range(batch_size + 1)])


def _numbered(num_slots, num_classes=1, shape=(2,)):
    """A buffer whose every example holds slot·1000 + class."""
    numbers = 1000.0 * jnp.arange(num_slots)[:, None] + jnp.arange(num_classes)
    return jnp.broadcast_to(numbers.reshape(num_slots, num_classes, *(1,) * len(shape)), (*numbers.shape, *shape))


@jax.jit
def _draw(key, buffer, fresh, *, reinit_prob, labels=None):
    return replay_buffer.draw(key, buffer, fresh, reinit_prob=reinit_prob, labels=labels)


@functools.cache
def _many_slots(num_slots, batch_size):
    """[draws, batch_size] slots of independent draws, 128,000 or so in all."""
    draw_keys = jax.random.split(KEY, 128_000 // batch_size)
    buffer, fresh = jnp.zeros((num_slots, 1)), jnp.zeros((batch_size,))
    draw = jax.jit(jax.vmap(lambda key: replay_buffer.draw(key, buffer, fresh, reinit_prob=0.05).slots))
    return np.asarray(draw(draw_keys))


# Which slots.


@pytest.mark.parametrize(("num_slots", "batch_size"), [(8, 8), (10, 4), (103, 64), (1_000_003, 64), (1_000_000, 4096)])
def test_slots_lie_in_their_intervals_and_are_distinct(num_slots, batch_size):
    edges, slots = _interval_edges(num_slots, batch_size), _many_slots(num_slots, batch_size)
    assert slots.dtype == np.int32
    assert np.all(slots >= edges[:-1])
    assert np.all(slots < edges[1:])
    assert np.all(np.diff(slots, axis=1) > 0)


@pytest.mark.parametrize(("num_slots", "batch_size"), [(10, 4), (103, 64), (1_000_003, 64)])
def test_a_slot_is_uniform_in_its_interval(num_slots, batch_size):
    edges, slots = _interval_edges(num_slots, batch_size), _many_slots(num_slots, batch_size)
    statistic, freedom = 0.0, 0
    for low, high, drawn in zip(edges[:-1], edges[1:], slots.T, strict=True):
        # Bins of whole slots, at most 20.
        bins = np.linspace(low, high, min(high - low, 20) + 1).round()
        expected = len(drawn) * np.diff(bins) / (high - low)
        counts = np.histogram(drawn, bins - 0.5)[0]
        assert counts.sum() == len(drawn)
        statistic += np.sum((counts - expected) ** 2 / expected)
        freedom += len(counts) - 1
    assert 1e-4 < stats.chi2.sf(statistic, freedom) < 1 - 1e-4


def test_the_slots_of_different_examples_are_independent():
    slots = _many_slots(1_000_003, 64)
    correlation = np.corrcoef(slots.T)[~np.eye(64, dtype=bool)]
    assert np.all(np.abs(correlation) < 5 / math.sqrt(len(slots)))


# What is drawn.


@pytest.mark.parametrize("shape", [(), (2,), (4, 4, 2)])
def test_without_reinitialisation_an_example_is_what_its_slot_holds(shape):
    drawn = _draw(KEY, _numbered(10, shape=shape), jnp.zeros((4, *shape)), reinit_prob=0.0)
    assert drawn.x.shape == (4, *shape)
    np.testing.assert_array_equal(
        drawn.x, np.broadcast_to(drawn.slots.reshape(4, *(1,) * len(shape)), (4, *shape)) * 1e3
    )


def test_an_example_is_drawn_from_the_class_of_its_label():
    labels = jnp.array([2, 0, 1, 2])
    drawn = _draw(KEY, _numbered(10, 3), jnp.zeros((4, 2)), reinit_prob=0.0, labels=labels)
    np.testing.assert_array_equal(drawn.x[:, 0], 1000 * drawn.slots + labels)


def test_probability_one_takes_every_example_fresh_and_zero_none():
    fresh = -1 - jnp.arange(64.0)[:, None]
    buffer = _numbered(64, shape=(1,))
    draw = jax.jit(jax.vmap(lambda key, prob: _draw(key, buffer, fresh, reinit_prob=prob).x, (0, None)))
    never, always = (draw(jax.random.split(KEY, 100), prob) for prob in (0.0, 1.0))
    assert jnp.all(never >= 0)
    np.testing.assert_array_equal(always, jnp.broadcast_to(fresh, (100, 64, 1)))


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_the_rate_of_reinitialisation_is_its_probability(probability):
    buffer, fresh = jnp.zeros((64, 1, 2)), jnp.ones((64, 2))
    draw = jax.jit(jax.vmap(lambda key: _draw(key, buffer, fresh, reinit_prob=probability).x))
    x = np.asarray(draw(jax.random.split(KEY, 400)))
    np.testing.assert_array_equal(x[..., 0], x[..., 1])  # an example is fresh as a whole
    again = x[..., 0]
    error = math.sqrt(probability * (1 - probability) / again.size)
    assert abs(again.mean() - probability) < 5 * error
    # Per place in the batch too: 64 means, none further than chance takes them.
    assert np.all(np.abs(again.mean(axis=0) - probability) < 5 * error * 8)


def test_reinitialisation_does_not_depend_on_the_slot():
    buffer, fresh = _numbered(64 * 100, shape=()), jnp.full(64, -1.0)
    draw = jax.jit(jax.vmap(lambda key: replay_buffer.draw(key, buffer, fresh, reinit_prob=0.5)))
    x, slots = map(np.asarray, draw(jax.random.split(KEY, 400)))
    correlation = np.corrcoef((x < 0).ravel(), (slots % 100).ravel())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(x.size)


def test_reinitialisation_does_not_move_the_slots():
    buffer, fresh = _numbered(10), jnp.zeros((4, 2))
    kept, again = (_draw(KEY, buffer, fresh, reinit_prob=prob) for prob in (0.0, 1.0))
    np.testing.assert_array_equal(kept.slots, again.slots)


def test_fresh_chains_are_uniform_and_differ_between_examples():
    x = np.asarray(replay_buffer.uniform(KEY, 200, (5, 10)))
    assert x.dtype == np.float32
    assert x.shape == (200, 5, 10)
    assert stats.kstest(x.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert len(np.unique(x[:, 0, 0])) == 200
    narrow = replay_buffer.uniform(KEY, 200, (5, 10), low=2.0, high=3.0)
    np.testing.assert_allclose(narrow, x / 2 + 2.5, atol=1e-6)


def test_a_new_buffer_holds_uniform_chains_of_every_class():
    buffer = np.asarray(replay_buffer.init(KEY, 100, (4, 2), num_classes=3))
    assert buffer.shape == (100, 3, 4, 2)
    assert buffer.dtype == np.float32
    assert stats.kstest(buffer.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert len(np.unique(buffer[..., 0, 0])) == 300
    assert replay_buffer.init(KEY, 5, (4, 2)).shape == (5, 1, 4, 2)
    with jax.enable_x64(True):
        assert replay_buffer.init(KEY, 4, (2,)).dtype == jnp.float32


# What is written.


def test_what_is_written_is_drawn_again_unclipped_and_to_the_last_bit():
    buffer = _numbered(10)
    x = jnp.array([[1e30, -3.7], [1 + 2.0**-23, 2e-38], [-0.0, jnp.pi], [jnp.inf, -1.0]], jnp.float32)
    slots = _draw(KEY, buffer, jnp.zeros_like(x), reinit_prob=0.5).slots
    drawn = _draw(KEY, replay_buffer.write(buffer, slots, x), jnp.zeros_like(x), reinit_prob=0.0)
    np.testing.assert_array_equal(drawn.slots, slots)
    assert drawn.x.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(drawn.x).view(np.int32), np.asarray(x).view(np.int32))


def test_a_write_leaves_other_slots_and_classes_alone():
    buffer = _numbered(10, 3)
    slots, labels = jnp.array([1, 2, 5, 9]), jnp.array([2, 0, 2, 1])
    x = -1.0 - jnp.arange(8.0).reshape(4, 2)
    expected = np.array(buffer)
    for index in range(4):
        expected[slots[index], labels[index]] = x[index]
    np.testing.assert_array_equal(replay_buffer.write(buffer, slots, x, labels=labels), expected)


def test_a_discarded_write_leaves_the_buffer_as_it_was():
    buffer, slots, labels = _numbered(10, 3), jnp.array([1, 2, 5, 9]), jnp.array([2, 0, 2, 1])
    write = jax.jit(
        lambda discard: replay_buffer.write(buffer, slots, jnp.full((4, 2), jnp.nan), labels=labels, discard=discard)
    )
    np.testing.assert_array_equal(write(True), buffer)
    assert np.isnan(write(False)).sum() == 8


def test_chains_of_another_precision_take_the_buffers():
    buffer = replay_buffer.init(KEY, 4, (3,))
    half = jnp.full((4, 3), 0.1, jnp.bfloat16)
    assert _draw(KEY, buffer, half, reinit_prob=0.5).x.dtype == jnp.float32
    assert replay_buffer.write(buffer, jnp.arange(4), half).dtype == jnp.float32


# Cut over devices.


@pytest.mark.parametrize("devices", [2, 4])
def test_pieces_of_buffer_and_batch_draw_and_write_what_the_whole_does(devices):
    buffer = replay_buffer.init(KEY, 20, (3,), num_classes=2)
    fresh = 10 + jnp.arange(24.0).reshape(8, 3)
    labels = jnp.array([0, 1, 1, 0, 1, 0, 0, 1])

    @jax.jit
    def iteration(example_keys, buffer, fresh, labels):
        x, slots = _draw(example_keys, buffer, fresh, reinit_prob=0.5, labels=labels)
        return x, slots, replay_buffer.write(buffer, slots, x + 100, labels=labels)

    def piece(*arrays):
        first = jax.lax.axis_index("devices") * (8 // devices)
        return iteration(prng.for_examples(KEY, 8 // devices, first), *arrays)

    x, slots, written = iteration(KEY, buffer, fresh, labels)
    assert 0 < jnp.sum(x[:, 0] >= 10) < 8
    cut = [array.reshape(devices, -1, *array.shape[1:]) for array in (buffer, fresh, labels)]
    x_cut, slots_cut, written_cut = jax.vmap(piece, axis_name="devices")(*cut)
    np.testing.assert_array_equal(x_cut.reshape(x.shape), x)
    np.testing.assert_array_equal((slots_cut + jnp.arange(devices)[:, None] * (20 // devices)).ravel(), slots)
    np.testing.assert_array_equal(written_cut.reshape(written.shape), written)


def test_pieces_of_a_new_buffer_are_cut_from_the_whole():
    whole = replay_buffer.init(KEY, 12, (3,), num_classes=2)
    for first in (0, 4, 8):
        piece = replay_buffer.init(prng.for_examples(KEY, 4, first), 4, (3,), num_classes=2)
        np.testing.assert_array_equal(piece, whole[first : first + 4])


# Cost.


def test_memory_of_drawing_and_writing_back_does_not_grow_with_the_buffer():
    def iteration(buffer, key, fresh, discard):
        x, slots = _draw(key, buffer, fresh, reinit_prob=0.05)
        return replay_buffer.write(buffer, slots, x + 1, discard=discard)

    def analysed(num_slots):
        buffer = jax.ShapeDtypeStruct((num_slots, 1, 8), jnp.float32)
        lowered = jax.jit(iteration, donate_argnums=0).lower(buffer, KEY, jnp.zeros((64, 8)), False)
        return lowered.compile().memory_analysis()

    small, large = analysed(1000), analysed(1_000_000)
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 1024
    assert large.temp_size_in_bytes < 1_000_000
    assert large.alias_size_in_bytes == 1_000_000 * 8 * 4  # written in place


# Errors.


def test_a_batch_larger_than_the_buffer_is_an_error():
    with pytest.raises(ValueError, match="a buffer of 7 slots is smaller than the batch of 8"):
        _draw(KEY, _numbered(7), jnp.zeros((8, 2)), reinit_prob=0.0)


def test_a_buffer_with_classes_needs_labels():
    buffer = _numbered(10, 3)
    with pytest.raises(ValueError, match="a buffer of 3 classes needs labels"):
        _draw(KEY, buffer, jnp.zeros((4, 2)), reinit_prob=0.0)
    with pytest.raises(ValueError, match="a buffer of 3 classes needs labels"):
        replay_buffer.write(buffer, jnp.arange(4), jnp.zeros((4, 2)))


def test_examples_of_another_shape_are_an_error():
    with pytest.raises(AssertionError, match="different shapes"):
        _draw(KEY, _numbered(10), jnp.zeros((4, 3)), reinit_prob=0.0)
