"""Splits and streams: what never depends on the run's seed, and what depends on it alone."""

import numpy as np
import pytest

from jem_jax.augment import to_float
from jem_jax.datasets import Split, digits
from jem_jax.datasets.batches import Stream, labelled_rows

# The order of a stream


def test_an_epoch_passes_by_every_example_at_most_once_and_drops_others_than_the_one_before():
    stream = Stream(seed=3, stream=0, count=43, batch_size=8)
    assert stream.steps_per_epoch == 5
    dropped = set()
    for epoch in range(5):
        order = stream.order(epoch)
        assert (order.shape, order.dtype) == ((40,), np.int32)
        assert len(np.unique(order)) == 40
        dropped.add(frozenset(range(43)) - frozenset(order.tolist()))
    assert {len(examples) for examples in dropped} == {3}
    assert len(dropped) == 5


def test_an_order_is_a_function_of_seed_epoch_and_stream_alone():
    def order(seed=1, stream=0, epoch=2):
        return Stream(seed, stream, 43, 8).order(epoch).tolist()

    later = Stream(1, 0, 43, 8)
    later.order(9)
    assert later.order(2).tolist() == order()
    others = [order(seed=2), order(stream=1), order(epoch=3), order(seed=0, stream=1), order(seed=2, epoch=1)]
    assert order() not in others
    assert len({tuple(other) for other in others}) == len(others)


@pytest.mark.parametrize(("count", "batch_size", "repeats"), [(3, 8, 3), (7, 8, 2), (8, 8, 1), (1, 4, 4)])
def test_fewer_examples_than_a_batch_fill_one_batch_evenly(count, batch_size, repeats):
    stream = Stream(0, 1, count, batch_size)
    order = stream.order(0)
    assert stream.steps_per_epoch == 1
    assert order.shape == (batch_size,)
    counts = np.bincount(order, minlength=count)
    assert counts.max() == repeats
    assert counts.min() >= repeats - 1
    for start in range(0, batch_size, count):
        assert len(np.unique(order[start : start + count])) == len(order[start : start + count])


def test_labels_that_are_used_are_so_many_of_each_class():
    labels = np.array([0, 1, 2] * 10 + [0] * 5, np.int32)
    rows = labelled_rows(labels, 4, seed=0)
    assert rows.dtype == np.int32
    assert np.all(np.diff(rows) > 0)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert rows.tolist() == labelled_rows(labels, 4, seed=0).tolist()
    assert rows.tolist() != labelled_rows(labels, 4, seed=1).tolist()
    # 0 stands for all; no class may have fewer.
    assert labelled_rows(np.zeros(5, np.int32), 0, seed=0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="class 1 has 2 training images, fewer than 3"):
        labelled_rows(np.array([0, 0, 0, 1, 1]), 3, seed=0)


def test_digits_are_1797_images_in_three_disjoint_splits_of_all_classes():
    from sklearn.datasets import load_digits

    np.random.seed(123)
    state = np.random.get_state()[1].tolist()
    dataset = digits.load()
    assert np.random.get_state()[1].tolist() == state
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split) for split in splits] == [1167, 130, 500]
    assert (dataset.image_shape, dataset.class_names) == ((8, 8, 1), tuple("0123456789"))
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels * 255 / 16).astype(np.uint8)
    originals = {(image.tobytes(), label) for image, label in zip(pixels, labels.tolist(), strict=True)}
    found = [
        {(image.tobytes(), label) for image, label in zip(split.images, split.labels.tolist(), strict=True)}
        for split in splits
    ]
    assert len(originals) == sum(len(part) for part in found) == 1797
    assert set.union(*found) == originals
    for split in splits:
        assert np.bincount(split.labels, minlength=10).min() > 0.05 * len(split)
    # Another split would make new results incomparable with old ones.
    assert dataset.train.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert dataset.test.labels[:12].tolist() == [0, 9, 6, 9, 8, 4, 5, 8, 1, 6, 3, 0]


def test_to_float_takes_the_range_of_uint8_to_minus_one_to_one():
    values = np.arange(256, dtype=np.uint8)
    floats = to_float(values)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, np.linspace(-1, 1, 256), atol=1e-6)
    assert (floats[0], floats.min()) == (-1, -1)
    assert floats.max() == pytest.approx(1, abs=1e-6)
    assert np.array_equal(np.round((floats + 1) * 127.5).astype(np.uint8), values)


@pytest.mark.parametrize(
    ("images", "labels"),
    [("2 8 8 1 f4", "2 i4"), ("2 8 8 u1", "2 i4"), ("2 8 8 1 u1", "3 i4"), ("2 8 8 1 u1", "2 i8")],
)
def test_a_split_of_wrong_arrays_is_an_error(images, labels):
    arrays = (np.zeros(tuple(map(int, text.split()[:-1])), text.split()[-1]) for text in (images, labels))
    with pytest.raises(ValueError, match="must be"):
        Split(*arrays)
