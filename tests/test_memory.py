"""The estimate of memory: what cannot fit is refused in one line before it is allocated, and what fits is not."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import TINY

from jem_jax import config as configuration
from jem_jax.commands import memory
from jem_jax.common.errors import UserError
from jem_jax.datasets import Dataset, Split, checks
from jem_jax.distributed import devices
from jem_jax.main import main
from jem_jax.training import network

CONFIGS = {
    path.stem: path for path in (Path(__file__).parent.parent / "configs").glob("*.py") if path.stem != "__init__"
}
IMAGES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10_small": (32, 32, 3)}
SIZES = {"digits": 1437, "fashion_mnist": 60_000, "cifar10_small": 50_000}


def _dataset(shape, count, classes=10):
    """Images that take no memory."""

    def split(count):
        images = np.broadcast_to(np.uint8(0), (count, *shape))
        return Split(images, (np.arange(count) % classes).astype(np.int32))

    return Dataset("blank", tuple(map(str, range(classes))), split(count), split(count // 10), split(count // 5))


def _settings(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configuration.validate(module.get_config())


def _refused(config, dataset, mode="train"):
    with pytest.raises(UserError) as caught:
        memory.check(config, dataset, mode)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_where_it_should(name, monkeypatch):
    config, dataset = _settings(name), _dataset(IMAGES.get(name, (32, 32, 3)), SIZES.get(name, 50_000))
    # A WRN-28-10 is for an accelerator: an 80 GB card, in a machine with as much.
    small = name in SIZES
    monkeypatch.setattr(checks, "memory", lambda: (8 if small else 80) * 2**30)
    monkeypatch.setattr(devices, "device_memory", lambda: None if small else 70 * 2**30)
    for mode in ("train", "evaluate", "sample"):
        memory.check(config, dataset, mode)
    # The check sees this config's own size: memory for half of the images is not enough.
    monkeypatch.setattr(devices, "device_memory", lambda: None)
    monkeypatch.setattr(checks, "memory", lambda: dataset.train.images.nbytes // 2)
    assert "of memory, and this machine has" in _refused(config, dataset, "train")


@pytest.mark.parametrize(
    ("settings", "mode", "what"),
    [
        ({"sampler.buffer_size": 10**9}, "train", "the replay buffer"),
        ({"training.batch_size": 10**6, "sampler.buffer_size": 10**6}, "train", "a batch in the loss"),
        ({"model.depth": 100, "model.width": 64}, "train", "the network's parameters"),
        ({"evaluation.num_samples": 10**6}, "train", "samples"),
        ({"evaluation.num_samples": 10**6}, "sample", "samples"),
        ({"evaluation.ood_images": 10**6}, "evaluate", "out-of-distribution sets"),
        ({"evaluation.batch_size": 10**6, "model.width": 16}, "evaluate", "a batch"),
        (
            {"evaluation.refined_images": 10**6, "evaluation.batch_size": 10**4},
            "evaluate",
            "attacks through refinement",
        ),
    ],
)
def test_what_takes_most_is_named_with_its_size_and_its_key(settings, mode, what, monkeypatch):
    monkeypatch.setattr(checks, "memory", lambda: 4 * 2**30)
    line = _refused(tiny.config(**settings), _dataset((8, 8, 3), 10_000), mode)
    assert f"this machine has 4 GiB: {what}" in line
    largest = next(iter(settings))
    assert line.endswith(f"lower config.{largest if largest != 'model.depth' else 'model.width'} first")


def test_a_mode_is_refused_only_for_what_it_needs(monkeypatch):
    monkeypatch.setattr(checks, "memory", lambda: 4 * 2**30)
    dataset = _dataset((8, 8, 3), 1000)
    memory.check(tiny.config(**{"training.batch_size": 10**6, "sampler.buffer_size": 10**6}), dataset, "sample")
    memory.check(tiny.config(**{"evaluation.ood_images": 10**6}), dataset, "sample")
    unwanted = {"evaluation.num_samples": 10**6, "evaluation.sections": "classification"}
    memory.check(tiny.config(**unwanted), dataset, "evaluate")


def test_an_accelerator_is_filled_by_its_own_part_alone(monkeypatch):
    monkeypatch.setattr(checks, "memory", lambda: 2**40)
    monkeypatch.setattr(devices, "device_memory", lambda: 2**30)
    dataset = _dataset((8, 8, 3), 1000)
    # A quarter of 1.9 GB, twice, on each of the four devices.
    memory.check(tiny.config(**{"sampler.buffer_size": 2_500_000}), dataset, "train")
    assert "each device has 1 GiB: the replay buffer 1.1" in _refused(
        tiny.config(**{"sampler.buffer_size": 3_100_000}), dataset
    )


def test_activations_are_about_what_the_compiler_reserves():
    """Within a factor of three of XLA's own account of the loss's gradient."""
    config, dataset = tiny.config(**{"model.depth": 10, "model.width": 2}), _dataset((16, 16, 3), 100)
    net = network.build(config.model, 10)
    variables = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    loss = jax.grad(lambda variables, x: net.logits(variables, x).sum())
    compiled = jax.jit(loss).lower(variables, jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.float32)).compile()
    reserved = compiled.memory_analysis().temp_size_in_bytes
    estimated = 64 * memory._KEPT * memory._measure(config, dataset).activations
    assert 1 / 3 < estimated / reserved < 3


def test_the_command_refuses_before_it_compiles_or_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "memory", lambda: 2**30)
    arguments = [*TINY, f"--workdir={tmp_path / 'run'}", "--config.sampler.buffer_size=400000000"]
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert "lower config.sampler.buffer_size first" in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "run").exists()
