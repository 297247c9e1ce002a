"""The estimate of memory: what cannot fit is refused in one line before it is allocated, and what fits is not."""

import numpy as np
import pytest
import tiny

from jem_jax.commands import config_files
from jem_jax.common.errors import UserError
from jem_jax.datasets import Dataset, Split, checks
from jem_jax.distributed import devices
from jem_jax.training import preflight

IMAGES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10_small": (32, 32, 3)}
SIZES = {"digits": 1437, "fashion_mnist": 60_000, "cifar10_small": 50_000}


def _dataset(shape, count, classes=10):
    """Images that take no memory."""

    def split(count):
        images = np.broadcast_to(np.uint8(0), (count, *shape))
        return Split(images, (np.arange(count) % classes).astype(np.int32))

    return Dataset("blank", tuple(map(str, range(classes))), split(count), split(count // 10), split(count // 5))


def _check(config, dataset, trains=True, sections=("samples", "ood")):
    preflight.check_memory(config, dataset, trains, sections)


def _refused(*args, **how):
    with pytest.raises(UserError) as caught:
        _check(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(config_files.packaged()))
def test_every_config_fits_where_it_should(name, monkeypatch):
    config, dataset = config_files.read(name), _dataset(IMAGES.get(name, (32, 32, 3)), SIZES.get(name, 50_000))
    # A WRN-28-10 is for an accelerator: an 80 GB card, in a machine with as much.
    small = name in SIZES
    monkeypatch.setattr(checks, "memory", lambda: (8 if small else 80) * 2**30)
    monkeypatch.setattr(devices, "device_memory", lambda: None if small else 70 * 2**30)
    _check(config, dataset)


@pytest.mark.parametrize(
    ("settings", "how", "what"),
    [
        ({"data.image_size": 1024}, {"sections": ()}, "the data set"),
        ({"sampler.buffer_size": 10**9}, {}, "the replay buffer"),
        ({"model.width": 64, "model.depth": 100}, {}, "the network and its optimiser"),
        ({"evaluation.num_samples": 10**6}, {"trains": False}, "samples"),
        ({"evaluation.ood_images": 10**6}, {"trains": False}, "out-of-distribution sets"),
    ],
)
def test_what_takes_most_is_named_with_its_size_and_its_key(settings, how, what, monkeypatch):
    monkeypatch.setattr(checks, "memory", lambda: 4 * 2**30)
    config, side = tiny.config(**settings), settings.get("data.image_size", 8)
    dataset = _dataset((side, side, 3), 10_000)
    line = _refused(config, dataset, **how)
    if not how.get("trains", True):
        # Sections that are not wanted take nothing.
        _check(config, dataset, **how, sections=("classification",))
    assert f"this machine has 4 GiB: {what}" in line
    assert line.endswith(f"lower config.{next(iter(settings))} first")


def test_an_accelerator_is_filled_by_its_own_part_alone(monkeypatch):
    monkeypatch.setattr(checks, "memory", lambda: 2**40)
    monkeypatch.setattr(devices, "device_memory", lambda: 2**30)
    dataset = _dataset((8, 8, 3), 1000)
    # A quarter of 1.9 GB, twice, on each of the four devices.
    _check(tiny.config(**{"sampler.buffer_size": 2_500_000}), dataset)
    line = _refused(tiny.config(**{"sampler.buffer_size": 3_100_000}), dataset)
    assert "each device has 1 GiB: the replay buffer 1.1" in line
