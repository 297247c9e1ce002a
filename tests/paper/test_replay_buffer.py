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


def _numbered(num_slots, num_classes=1, shape=(2,)):
    """A buffer whose every example holds slot·1000 + class."""
    numbers = (1000.0 * np.arange(num_slots)[:, None] + np.arange(num_classes)).astype(np.float32)
    numbers = numbers.reshape(*numbers.shape, *(1,) * len(shape))
    return jnp.asarray(np.broadcast_to(numbers, (num_slots, num_classes, *shape)))


_draw, _write = jax.jit(replay_buffer.draw), jax.jit(replay_buffer.write)


@functools.cache
def _many_slots(num_slots, batch_size):
    """[draws, batch_size] slots of independent draws, 128,000 or so in all."""
    draw_keys = jax.random.split(KEY, 128_000 // batch_size)
    buffer, fresh = jnp.zeros((num_slots, 1)), jnp.zeros((batch_size,))
    draw = jax.jit(jax.vmap(lambda key: replay_buffer.draw(key, buffer, fresh, reinit_prob=0.05).slots))
    return np.asarray(draw(draw_keys))


@pytest.mark.parametrize(("num_slots", "batch_size"), [(8, 8), (103, 64), (1_000_000, 4096)])
def test_a_slot_is_uniform_in_an_interval_of_its_own(num_slots, batch_size):
    edges, slots = np.arange(batch_size + 1) * num_slots // batch_size, _many_slots(num_slots, batch_size)
    assert slots.dtype == np.int32
    assert np.all((slots >= edges[:-1]) & (slots < edges[1:]))
    statistic, freedom = 0.0, 0
    for low, high, drawn in zip(edges[:-1], edges[1:], slots.T, strict=True):
        # Bins of whole slots, at most 20.
        bins = np.linspace(low, high, min(high - low, 20) + 1).round()
        expected = len(drawn) * np.diff(bins) / (high - low)
        counts = np.histogram(drawn, bins - 0.5)[0]
        assert counts.sum() == len(drawn)
        statistic += np.sum((counts - expected) ** 2 / expected)
        freedom += len(counts) - 1
    assert freedom == 0 or 1e-4 < stats.chi2.sf(statistic, freedom) < 1 - 1e-4


def test_the_slots_of_different_examples_are_independent():
    slots = _many_slots(103, 64)
    several = slots.T[np.ptp(slots, axis=0) > 0]  # not those of a single slot
    correlation = np.corrcoef(several)[~np.eye(103 - 64, dtype=bool)]
    assert np.all(np.abs(correlation) < 5 / math.sqrt(len(slots)))


def test_without_reinitialisation_an_example_is_what_its_slot_holds_for_its_class():
    labels = np.array([2, 0, 1, 2])
    drawn = _draw(KEY, _numbered(10, 3, (4, 4, 2)), np.zeros((4, 4, 4, 2)), reinit_prob=0.0, labels=labels)
    numbers = 1000 * np.asarray(drawn.slots) + labels
    np.testing.assert_array_equal(drawn.x, np.broadcast_to(numbers.reshape(4, 1, 1, 1), (4, 4, 4, 2)))


def test_reinitialisation_has_its_probability_and_depends_on_nothing_else():
    buffer, fresh = _numbered(6400), np.repeat(-1.0 - np.arange(64, dtype=np.float32), 2).reshape(64, 2)
    draw = jax.jit(jax.vmap(lambda key, prob: replay_buffer.draw(key, buffer, fresh, reinit_prob=prob), (0, None)))
    kept, slots = map(np.asarray, draw(jax.random.split(KEY, 400), 0.0))
    np.testing.assert_array_equal(kept[..., 0], 1000 * slots)
    place = (slots % 100 - 49.5) / np.sqrt((100**2 - 1) / 12)
    for probability in (0.05, 0.5, 1.0):
        x, same_slots = map(np.asarray, draw(jax.random.split(KEY, 400), probability))
        np.testing.assert_array_equal(same_slots, slots)
        again = x[..., 0] < 0
        np.testing.assert_array_equal(x, np.where(again[..., None], fresh, kept))  # fresh as a whole, or not
        error = math.sqrt(probability * (1 - probability) / again.size)
        assert abs(again.mean() - probability) <= 5 * error
        # Per place in the batch too: 64 means, none further than chance takes them.
        assert np.all(np.abs(again.mean(axis=0) - probability) <= 5 * error * 8)
        assert abs(np.mean((again - probability) * place)) <= 5 * error


def test_fresh_chains_and_a_new_buffer_are_uniform_and_differ_between_examples_and_classes():
    @jax.jit
    def run():
        narrow = replay_buffer.uniform(KEY, 200, (5, 10), low=2.0, high=3.0)
        return replay_buffer.uniform(KEY, 200, (5, 10)), narrow, replay_buffer.init(KEY, 100, (4, 2), num_classes=3)

    x, narrow, buffer = map(np.asarray, run())
    np.testing.assert_allclose(narrow, x / 2 + 2.5, atol=1e-6)
    assert (x.shape, buffer.shape) == ((200, 5, 10), (100, 3, 4, 2))
    for values in (x, buffer):
        assert stats.kstest(values.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert len(np.unique(x[:, 0, 0])) == 200
    assert len(np.unique(buffer[..., 0, 0])) == 300
    with jax.enable_x64(True):
        one_class = jax.eval_shape(lambda: replay_buffer.init(KEY, 5, (4, 2)))
    assert (one_class.shape, one_class.dtype) == ((5, 1, 4, 2), jnp.float32)


def test_float64_changes_neither_slots_nor_who_starts_afresh():
    buffer, fresh = np.zeros((640, 1, 2), np.float32), np.ones((64, 2), np.float32)
    usual = _draw(KEY, buffer, fresh, reinit_prob=0.5)
    with jax.enable_x64(True):
        double = _draw(KEY, buffer, fresh, reinit_prob=0.5)
    assert 0 < np.mean(usual.x) < 1
    jax.tree.map(np.testing.assert_array_equal, double, usual)


def test_what_is_written_is_drawn_again_unclipped_and_to_the_last_bit():
    buffer = _numbered(10)
    x = np.array([[1e30, -3.7], [1 + 2.0**-23, 2e-38], [-0.0, np.pi], [np.inf, -1.0]], np.float32)
    slots = _draw(KEY, buffer, x, reinit_prob=0.5).slots
    drawn = _draw(KEY, _write(buffer, slots, x), x, reinit_prob=0.0)
    np.testing.assert_array_equal(drawn.slots, slots)
    assert drawn.x.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(drawn.x).view(np.int32), x.view(np.int32))


def test_a_write_leaves_other_slots_and_classes_alone_and_all_of_them_where_it_is_discarded():
    buffer, slots, labels = _numbered(10, 3), np.array([1, 2, 5, 9]), np.array([2, 0, 2, 1])
    x = -1.0 - np.arange(8, dtype=np.float32).reshape(4, 2)
    expected = np.array(buffer)
    expected[slots, labels] = x
    np.testing.assert_array_equal(_write(buffer, slots, x, labels=labels, discard=False), expected)
    np.testing.assert_array_equal(_write(buffer, slots, x * np.nan, labels=labels, discard=True), buffer)


def test_chains_of_another_precision_take_the_buffers():
    buffer, half = _numbered(4), jax.ShapeDtypeStruct((4, 2), jnp.bfloat16)
    assert jax.eval_shape(lambda x: _draw(KEY, buffer, x, reinit_prob=0.5).x, half).dtype == jnp.float32
    assert jax.eval_shape(lambda x: _write(buffer, np.arange(4), x), half).dtype == jnp.float32


def test_pieces_of_buffer_and_batch_begin_draw_and_write_what_the_whole_does():
    fresh = 10 + np.arange(24, dtype=np.float32).reshape(8, 3)
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1])

    def iteration(devices, device, fresh, labels):
        buffer_keys, example_keys = (prng.for_examples(KEY, n // devices, device * (n // devices)) for n in (20, 8))
        buffer = replay_buffer.init(buffer_keys, 20 // devices, (3,), num_classes=2)
        x, slots = replay_buffer.draw(example_keys, buffer, fresh, reinit_prob=0.5, labels=labels)
        return x, slots + device * (20 // devices), replay_buffer.write(buffer, slots, x + 100, labels=labels)

    whole = jax.jit(iteration, static_argnums=0)(1, 0, fresh, labels)
    assert 0 < np.sum(np.asarray(whole[0])[:, 0] >= 10) < 8
    pieces = jax.jit(jax.vmap(functools.partial(iteration, 4)))(
        np.arange(4), fresh.reshape(4, 2, 3), labels.reshape(4, 2)
    )
    for ours, theirs in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)


def test_memory_of_drawing_and_writing_back_does_not_grow_with_the_buffer():
    def iteration(buffer, key, fresh, discard):
        x, slots = replay_buffer.draw(key, buffer, fresh, reinit_prob=0.05)
        return replay_buffer.write(buffer, slots, x + 1, discard=discard)

    def analysed(num_slots):
        buffer = jax.ShapeDtypeStruct((num_slots, 1, 8), jnp.float32)
        lowered = jax.jit(iteration, donate_argnums=0).lower(buffer, KEY, jnp.zeros((64, 8)), False)
        return lowered.compile().memory_analysis()

    small, large = analysed(1000), analysed(1_000_000)
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 1024
    assert large.temp_size_in_bytes < 1_000_000
    assert large.alias_size_in_bytes == 1_000_000 * 8 * 4  # written in place


def test_a_buffer_that_does_not_fit_the_batch_is_an_error():
    x, buffer = np.zeros((4, 2)), _numbered(10, 3)
    with pytest.raises(ValueError, match="a buffer of 7 slots is smaller than the batch of 8"):
        _draw(KEY, _numbered(7), np.zeros((8, 2)), reinit_prob=0.0)
    for use in (lambda: _draw(KEY, buffer, x, reinit_prob=0.0), lambda: _write(buffer, np.arange(4), x)):
        with pytest.raises(ValueError, match="a buffer of 3 classes needs labels"):
            use()
    with pytest.raises(AssertionError, match="different shapes"):
        _draw(KEY, _numbered(10), np.zeros((4, 3)), reinit_prob=0.0)
