"""How batches reach the devices: resident or streamed, the same rows."""

import numpy as np
import pytest

from jem_jax.datasets.batches import Stream, labelled_rows
from jem_jax.distributed import devices
from jem_jax.training import device_data
from jem_jax.training.device_data import Order

STEPS = 5
"""in an epoch of 43 images in batches of 8"""


def _data(config, dataset):
    order = Order(config, dataset.train.labels)
    return order, device_data.build(config, dataset.train, order)


def _gathered(data, step, sizes):
    """What the step makes of resident data: the batches of the p(x) and of the labelled stream."""
    batches = []
    for order, size in ((np.array(data.order), sizes[0]), (np.array(data.labelled_order), sizes[1])):
        start = step % (len(order) // size) * size
        rows = order[start : start + size]
        batches += [np.array(data.images)[rows].reshape(size, 8, 8, 1), np.array(data.labels)[rows]]
    return batches


@pytest.mark.parametrize(("labels_per_class", "labelled_batch"), [(0, 0), (1, 0), (5, 4), (0, 16)])
def test_resident_and_streamed_batches_are_the_same(tiny_config, tiny_dataset, labels_per_class, labelled_batch):
    labels = {"data.labels_per_class": labels_per_class, "training.labelled_batch_size": labelled_batch}
    sizes = (8, labelled_batch or 8)
    _, resident = _data(tiny_config(**labels, **{"data.place": "device"}), tiny_dataset)
    _, streamed = _data(tiny_config(**labels, **{"data.place": "host"}), tiny_dataset)
    assert (resident.streamed, streamed.streamed) == (False, True)
    # Out of order too: a resumed run begins anywhere, and the first iteration is timed before it counts.
    for step in (0, 0, 1, 4, 5, 6, 14, 3):
        batch = streamed.at(step)
        assert batch.starts is None
        # Each device is sent its own part alone.
        assert all(len(array.addressable_shards) == len(array) == 4 for array in batch[:4])
        for ours, theirs in zip(_gathered(resident.at(step), step, sizes), batch[:4], strict=True):
            assert np.array_equal(ours, np.array(theirs).reshape(ours.shape))


def test_the_two_streams_have_their_own_order_and_the_labelled_one_its_own_rows(tiny_config, tiny_dataset):
    config = tiny_config(**{"seed": 5, "data.labels_per_class": 5, "data.labels_seed": 2})
    order, _ = _data(config, tiny_dataset)
    labelled = labelled_rows(tiny_dataset.train.labels, 5, 2)
    assert order.steps_per_epoch == STEPS
    for step in (0, 4, 5, 12):
        epoch, place = divmod(step, STEPS)
        rows = Stream(5, 0, 43, 8).order(epoch)[8 * place : 8 * place + 8]
        assert np.array_equal(order.batch(0, step), rows)
        # 15 labelled images make one batch of 8 an epoch of their own.
        rows = labelled[Stream(5, 1, 15, 8).order(step)]
        assert np.array_equal(order.batch(1, step), rows)


@pytest.mark.parametrize(("labelled_batch", "steps"), [(4, 5), (16, 2)])
def test_an_epoch_is_a_pass_by_the_larger_batch(tiny_config, tiny_dataset, labelled_batch, steps):
    order, _ = _data(tiny_config(**{"training.labelled_batch_size": labelled_batch}), tiny_dataset)
    assert order.steps_per_epoch == steps
    # The p(x) stream goes on where the epoch's end finds it: all its rows come before any comes again.
    rows = np.concatenate([order.batch(0, step) for step in range(STEPS)])
    assert len(set(rows.tolist())) == len(rows) == 8 * STEPS


def test_resident_data_is_placed_whole_on_every_device_and_once_an_epoch(tiny_config, tiny_dataset):
    _, resident = _data(tiny_config(**{"data.place": "device"}), tiny_dataset)
    first, second, next_epoch = (resident.at(step) for step in (1, STEPS - 1, STEPS))
    assert first.starts is None
    assert all(len(array.sharding.device_set) == 4 and array.sharding.is_fully_replicated for array in first[:4])
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert next_epoch.images is first.images
    assert not np.array_equal(next_epoch.order, first.order)
    assert not np.array_equal(next_epoch.labelled_order, first.labelled_order)


@pytest.mark.parametrize(("room", "streamed"), [(43 * 64, False), (43 * 64 - 1, True)])
def test_images_are_resident_where_they_fit(tiny_config, tiny_dataset, monkeypatch, room, streamed):
    monkeypatch.setattr(devices, "memory_for_data", lambda: room)
    assert _data(tiny_config(), tiny_dataset)[1].streamed is streamed
