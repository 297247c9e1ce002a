"""Random keys belong to an example's place in the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jem_jax import prng
from jem_jax.training import recovery


def _data(key):
    return np.asarray(jax.random.key_data(key))


def test_every_example_has_a_key_of_its_own_and_pieces_have_those_of_the_whole():
    whole = _data(prng.for_examples(jax.random.key(0), 4096))
    assert len(np.unique(whole, axis=0)) == 4096
    cut = [prng.for_examples(jax.random.key(0), 1024, first=first) for first in range(0, 4096, 1024)]
    np.testing.assert_array_equal(np.concatenate([_data(piece) for piece in cut]), whole)


def test_one_key_is_folded_and_an_array_of_keys_is_taken_as_it_is_typed_or_legacy():
    typed, legacy = jax.random.key(7), jax.random.PRNGKey(7)
    per_example, pairs = jax.random.split(typed, 5), jax.random.split(legacy, 5)
    assert pairs.dtype == jnp.uint32
    for key, several in ((typed, per_example), (legacy, pairs)):
        np.testing.assert_array_equal(_data(prng.of_batch(key, 5)), _data(prng.for_examples(typed, 5)))
        np.testing.assert_array_equal(_data(prng.of_batch(several, 5)), _data(per_example))


@pytest.mark.parametrize("shape", [(4,), (5, 1)])
def test_another_number_of_keys_is_an_error(shape):
    with pytest.raises(ValueError, match="one PRNG key or one per example"):
        prng.of_batch(jax.random.split(jax.random.key(0), shape), 5)


def test_integers_are_uniform_below_their_bounds_in_float64_too():
    count, cells = 100_000, {1: 1, 7: 7, 160: 32, 2**31 - 1: 64}
    draw = jax.jit(lambda: prng.integers(jax.random.key(0), (count, len(cells)), np.array(list(cells))))
    drawn = np.asarray(draw())
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(), drawn)
    for column, (bound, number) in zip(drawn.T, cells.items(), strict=True):
        observed = np.histogram(column, number, (-0.5, bound - 0.5))[0]
        assert observed.sum() == count, "none is past the bound"
        assert np.sum((observed - count / number) ** 2) / (count / number) < number + 5 * np.sqrt(2 * number)


def test_streams_differ_from_each_other_from_iterations_and_from_recoveries():
    run = jax.random.key(0)
    streams = [prng.stream(run, name) for name in prng.STREAMS]
    iterations = [jax.random.fold_in(run, step) for step in (0, 1, 2, 101, 2**31 - 3, 2**31 - 1)]
    recoveries = [recovery.key(run, number) for number in (1, 2, 3)]
    data = np.stack([_data(key) for key in (*streams, *iterations, *recoveries)])
    assert len(np.unique(data, axis=0)) == len(data)
    with pytest.raises(ValueError, match="nowhere"):
        prng.stream(run, "nowhere")
