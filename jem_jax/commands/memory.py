"""What a run will take of memory, estimated before any of it is allocated.

The estimate counts the arrays that grow with the settings, and leaves out what compilers and libraries take: it is
rough, and rather too low than too high. What it refuses would otherwise end minutes later by the system's kill, or in
an allocator's error that names no setting.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax.common.errors import UserError
from jem_jax.config import Config
from jem_jax.datasets import Dataset, checks
from jem_jax.distributed import devices
from jem_jax.report import adversarial, inputs, sections
from jem_jax.training import device_data, forecast, network, sizes

_FLOAT = 4
_KEPT = 0.5
"""of what a forward pass computes, about the share that its backward pass needs again"""
_MOMENTS = {"adam": 2, "sgd": 1}
_BUFFERS = 2
"""the run's, and the copy that the step is timed with"""
_OUTSIDE_SETS = 9
"""floats of a pixel that the built-in out-of-distribution sets take for each image, one of them in float64"""
_SAMPLES = 8
"""the same for a sample: two kinds of chains, each with its start, its batches, itself, and a clipped copy"""


class Part(NamedTuple):
    """Something that takes memory."""

    what: str
    key: str
    """of the setting to lower"""
    device: float = 0
    """bytes on each device"""
    host: float = 0
    """bytes in the machine's memory beside them"""


class _Network(NamedTuple):
    parameters: int
    """bytes"""
    activations: int
    """bytes of all that a forward pass of one image computes"""


def check(config: Config, dataset: Dataset, mode: str) -> None:
    """Whether what a mode ("train", "evaluate" or "sample") needs fits the memory there is.

    On a CPU the devices share the machine's memory; an accelerator has its own, and the machine holds the rest.

    Raises:
      UserError: it does not, with what takes how much, and the setting to lower.
    """
    found = _measure(config, dataset)
    phases = {"the evaluation": _evaluation(config, dataset, found, mode)}
    if mode == "train":
        phases = {"training": _training(config, dataset, found), **phases}
    limit = devices.device_memory()
    for phase, parts in phases.items():
        if limit is None:
            each = {part: part.host + devices.local_count() * part.device for part in parts}
            _fits(phase, each, checks.memory(), "this machine has")
        else:
            _fits(phase, {part: part.device for part in parts}, limit, "each device has")
            _fits(phase, {part: part.host for part in parts}, checks.memory(), "this machine has")


def _fits(phase: str, sizes: dict[Part, float], limit: int, whose: str) -> None:
    total = sum(sizes.values())
    if total <= limit:
        return
    largest = sorted(sizes, key=lambda part: -sizes[part])[:3]
    taken = ", ".join(f"{part.what} {_gib(sizes[part])}" for part in largest)
    raise UserError(
        f"{phase} would take some {_gib(total)} of memory, and {whose} {_gib(limit)}: {taken}; "
        f"lower config.{largest[0].key} first"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB" if size < 2**40 else f"{size / 2**30:,.0f} GiB"


def _measure(config: Config, dataset: Dataset) -> _Network:
    """By tracing, which computes nothing: two thirds of a second for a WRN-100."""
    net = network.build(config.model, dataset.num_classes)

    def images(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *dataset.image_shape), jnp.float32)

    def computed(count: int) -> int:
        equations = jax.make_jaxpr(net.logits)(variables, images(count)).eqns
        return _bytes(out.aval for equation in equations for out in equation.outvars)

    variables = jax.eval_shape(net.init, jax.random.key(0), images(2))
    # What does not grow with the batch, such as another form of a kernel, is no activation.
    return _Network(_bytes(jax.tree.leaves(variables["params"])), activations=computed(3) - computed(2))


def _bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(int(np.prod(array.shape, dtype=object)) * array.dtype.itemsize for array in arrays)


def _training(config: Config, dataset: Dataset, found: _Network) -> list[Part]:
    count = devices.count()
    state = found.parameters * (1 + _MOMENTS[config.optimizer.name] + bool(config.optimizer.ema_decay))
    # Sharpness-aware minimisation holds the parameters it climbs to, and takes the gradients there.
    gradients = 3 if config.optimizer.sam_rho else 1
    buffer = _buffer(config, dataset)
    resident = dataset.train.images.nbytes if device_data.is_resident(config, dataset.train) else 0
    rows = forecast.images_in_loss(config) / count
    return [
        _data_set(dataset),
        Part("the training images on the devices", "data.image_size", device=resident),
        # A step makes a new state from the old one and the gradients; a checkpoint is written from a copy.
        Part(_PARAMETERS, "model.width", device=2 * state + gradients * found.parameters, host=state),
        Part("the replay buffer", "sampler.buffer_size", device=_BUFFERS * buffer / count, host=buffer),
        Part("a batch in the loss", "training.batch_size", device=rows * _KEPT * found.activations),
    ]


def _evaluation(config: Config, dataset: Dataset, found: _Network, mode: str) -> list[Part]:
    settings, count = config.evaluation, devices.local_count()
    pixels = _FLOAT * int(np.prod(dataset.image_shape))
    wanted = {section.name for section in sections.wanted(settings)} if mode != "sample" else {"samples"}
    samples = settings.num_samples if wanted & {"samples", "sample_quality"} else 0
    outside = settings.ood_images if "ood" in wanted else 0
    longest = max(len(dataset.test), samples, outside, _buffer(config, dataset) // pixels)
    rows = min(settings.batch_size, longest) / count
    chains = 0.0
    if "adversarial" in wanted and settings.refined_linf and _buffer(config, dataset):
        together = inputs.chain_batch(config)
        most = max(1, together // adversarial.COPIES) * count if together else settings.batch_size
        refined = min(settings.refined_images, most, len(dataset.test))
        # Through every step of a chain go a forward pass and its gradient.
        chains = refined / count * adversarial.COPIES * 2 * max(adversarial.REFINEMENTS)
    return [
        _data_set(dataset),
        Part(_PARAMETERS, "model.width", device=found.parameters, host=found.parameters),
        Part("the replay buffer", "sampler.buffer_size", host=_buffer(config, dataset)),
        Part("samples", "evaluation.num_samples", host=samples * pixels * _SAMPLES),
        Part("out-of-distribution sets", "evaluation.ood_images", host=outside * pixels * _OUTSIDE_SETS),
        Part("a batch", "evaluation.batch_size", device=rows * found.activations),
        Part("attacks through refinement", "evaluation.refined_images", device=chains * _KEPT * found.activations),
    ]


_PARAMETERS = "the network's parameters and what the optimiser keeps of them"


def _data_set(dataset: Dataset) -> Part:
    splits = (dataset.train, dataset.validation, dataset.test)
    return Part("the data set", "data.image_size", host=sum(split.images.nbytes for split in splits))


def _buffer(config: Config, dataset: Dataset) -> int:
    slots, classes = sizes.buffer_size(config, dataset.num_classes)
    return _FLOAT * slots * classes * int(np.prod(dataset.image_shape))
