"""Checks of a run before anything is computed: sizes, memory and the network, which JAX traces on shapes alone."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jem_jax.common.errors import UserError, first_line
from jem_jax.config import Config
from jem_jax.datasets import Dataset, checks
from jem_jax.distributed import devices
from jem_jax.distributed.devices import AXIS
from jem_jax.runs import checkpoint
from jem_jax.training import device_data, network, quantities, schedule
from jem_jax.training.network import Network, Variables
from jem_jax.training.state import TrainingData, TrainState
from jem_jax.training.statistics import COLLECTION
from jem_jax.training.step import Step

Array = jax.Array

_MOST_ITERATIONS = 2**31 - 3
"""they are counted in int32, and the last two numbers seed what comes before the first"""
_FLOAT = 4
_MOMENTS = {"adam": 2, "sgd": 1}
_OUTSIDE_SETS = 9
"""floats of a pixel that the built-in out-of-distribution sets take for each image, one of them in float64"""
_SAMPLES = 8
"""the same for a sample: two kinds of chains, each with its start, its batches, itself, and a clipped copy"""
_FEW = 8
"""images whose statistics batch norm can use"""
_SMALL, _LARGE = 2, 4
"""images of the batches that a network is tried on; what it keeps must not depend on their number"""


def check(config: Config, dataset: Dataset) -> None:
    """Checks that sizes, schedule and network fit the images and the devices.

    Raises:
      UserError: they do not.
    """
    check_sizes(config, dataset)
    schedule.phases(config, 10**9)
    check_network(network.build(config.model, dataset.num_classes), dataset.image_shape, dataset.num_classes)


# --- Sizes ---


def check_sizes(config: Config, dataset: Dataset) -> None:
    """Checks batch, buffer, images and devices against each other.

    Raises:
      UserError: a size that does not fit, with the nearest that does.
    """
    count, terms = devices.count(), quantities.weights(config)
    slots, classes = quantities.buffer_size(config, dataset.num_classes)
    size = config.sampler.buffer_size
    own = "labelled_" * bool(config.training.labelled_batch_size)
    names = ("config.training.batch_size", f"config.training.{own}batch_size")
    draws = (terms.needs_negatives, terms.needs_conditional_negatives)
    for name, batch, has_chains in zip(names, config.training.batch_sizes, draws, strict=True):
        if batch > len(dataset.train):
            raise UserError(f"{name} {batch} is larger than the {len(dataset.train)} training images")
        if batch % count:
            raise UserError(_indivisible(name, batch, count, f"the {count} devices"))
        if has_chains and slots < batch:
            raise UserError(
                f"config.sampler.buffer_size {size} gives {slots} slots a class, fewer than {name} {batch}; it must "
                f"be at least {batch * classes}"
            )
    if slots and size % (classes * count):
        whom = f"the {count} devices" if classes == 1 else f"{classes} classes × {count} devices"
        raise UserError(_indivisible("config.sampler.buffer_size", size, classes * count, whom))
    per_epoch = len(dataset.train) // max(config.training.batch_sizes)
    if config.training.epochs * per_epoch > _MOST_ITERATIONS:
        raise UserError(
            f"config.training.epochs {config.training.epochs} would be {config.training.epochs * per_epoch:,} "
            f"iterations, more than can be counted ({_MOST_ITERATIONS:,}); it must be at most "
            f"{_MOST_ITERATIONS // per_epoch}"
        )
    fewest = int(np.bincount(dataset.train.labels, minlength=dataset.num_classes).min())
    if config.data.labels_per_class > fewest:
        raise UserError(
            f"config.data.labels_per_class {config.data.labels_per_class} is more than the {fewest} training images of "
            "the smallest class"
        )
    if config.data.pad_mode == "reflect" and config.data.pad >= min(dataset.image_shape[:2]):
        raise UserError(
            f"config.data.pad must be less than the images' side {min(dataset.image_shape[:2])} to reflect, "
            f"not {config.data.pad}"
        )


def _indivisible(name: str, value: int, divisor: int, whom: str) -> str:
    lower, upper = value // divisor * divisor, -(-value // divisor) * divisor
    nearest = f"{lower} and {upper} do" if lower else f"{upper} does"
    return f"{name} {value} does not divide among {whom}; {nearest}"


# --- Memory ---


class _Part(NamedTuple):
    """Something that takes memory."""

    what: str
    key: str
    """of the setting to lower"""
    device: float
    """bytes on each device"""
    host: float
    """bytes in the machine's memory beside them"""


def check_memory(config: Config, dataset: Dataset, trains: bool, sections: Collection[str]) -> None:
    """Checks the arrays that grow with the settings against the memory there is.

    What passes through the network, and what compilers and libraries take, is not counted. The estimate is therefore
    rather too low than too high. On a CPU the devices share the machine's memory. An accelerator has its own, and the
    machine holds the rest.

    Args:
      trains: whether the run trains, or only evaluates.
      sections: names of the report's sections to come.

    Raises:
      UserError: they do not fit; with the largest, and the setting to lower.
    """
    parts = _parts(config, dataset, trains, sections)
    limit = devices.device_memory()
    if limit is None:
        each = {part: part.host + devices.local_count() * part.device for part in parts}
        _check_fit(each, checks.memory(), "this machine has")
    else:
        _check_fit({part: part.device for part in parts}, limit, "each device has")
        _check_fit({part: part.host for part in parts}, checks.memory(), "this machine has")


def _parts(config: Config, dataset: Dataset, trains: bool, sections: Collection[str]) -> list[_Part]:
    pixels = _FLOAT * math.prod(dataset.image_shape)
    images = sum(split.images.nbytes for split in (dataset.train, dataset.validation, dataset.test))
    slots, classes = quantities.buffer_size(config, dataset.num_classes)
    buffer = slots * classes * pixels
    parameters = _parameter_bytes(config, dataset)
    state = parameters * (1 + _MOMENTS[config.optimizer.name] + bool(config.optimizer.ema_decay))
    resident = dataset.train.images.nbytes if trains and device_data.is_resident(config, dataset.train) else 0
    samples = config.evaluation.num_samples if {"samples", "sample_quality"} & set(sections) else 0
    outside = config.evaluation.ood_images if "ood" in sections else 0
    return [
        _Part("the data set", "data.image_size", resident, images),
        # A step makes a new state from the old one and the gradients. A checkpoint is written from a copy.
        _Part("the network and its optimiser", "model.width", 2 * state * trains + parameters, state),
        # The step is timed with a copy of the buffer.
        _Part("the replay buffer", "sampler.buffer_size", 2 * buffer / devices.count() * trains, buffer),
        _Part("samples", "evaluation.num_samples", 0, samples * pixels * _SAMPLES),
        _Part("out-of-distribution sets", "evaluation.ood_images", 0, outside * pixels * _OUTSIDE_SETS),
    ]


def _parameter_bytes(config: Config, dataset: Dataset) -> int:
    images = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32)
    variables = jax.eval_shape(network.build(config.model, dataset.num_classes).init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables["params"]))


def _check_fit(sizes: dict[_Part, float], limit: int, whose: str) -> None:
    total = sum(sizes.values())
    if total > limit:
        first, second, *_ = sorted(sizes, key=lambda part: -sizes[part])
        raise UserError(
            f"the run would take some {_gib(total)} of memory, and {whose} {_gib(limit)}: {first.what} "
            f"{_gib(sizes[first])}, {second.what} {_gib(sizes[second])}; lower config.{first.key} first"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB" if size < 2**40 else f"{size / 2**30:,.0f} GiB"


# --- The network ---


def check_network(net: Network, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Traces a network as a run uses it: started, evaluated and trained, on batches of two sizes.

    Raises:
      UserError: it does not take such images, or does not give [B, num_classes] logits; it cannot be evaluated or
        trained; or a layer of it would stay in evaluation mode while it trains.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    small, large = (jax.ShapeDtypeStruct((size, *image_shape), jnp.float32) for size in (_SMALL, _LARGE))
    with _refused(f"does not take images of {'×'.join(map(str, image_shape))}"):
        variables = jax.eval_shape(net.init, key, small)
    with _refused("cannot be evaluated"):
        _check_logits(jax.eval_shape(net.evaluation_pass, variables, large), num_classes)
    _check_parameters(variables["params"])
    evaluating: set[str] = set()

    def train(variables: Variables, x: Array, key: Array) -> tuple[Array, Variables]:
        with nn.intercept_methods(functools.partial(_note_evaluating, evaluating)):
            return net.train_pass(variables, x, key)

    with _refused("cannot be trained"):
        program, (_, state) = jax.make_jaxpr(train, axis_env=[(AXIS, 1)], return_shape=True)(variables, large, key)
    before = {name: value for name, value in variables.items() if name != "params"}
    difference = checkpoint.difference(before, state, with_dtypes=False)
    if difference:
        raise UserError(f"config.model cannot be trained: after a pass its state {difference}")
    taken = {id(variable) for variable in program.jaxpr.invars}
    statistics = jax.tree.unflatten(jax.tree.structure(state), program.jaxpr.outvars[1:]).get("batch_stats", {})
    if statistics and all(id(variable) in taken for variable in jax.tree.leaves(statistics)):
        evaluating.add("batch_stats")
    if evaluating:
        raise UserError(
            f"config.model would stay in evaluation mode while it trains ({', '.join(sorted(evaluating))}); its "
            "__call__ must take train, training, deterministic or use_running_average, and hand it to such layers"
        )


def trace(step: Step, state: TrainState, buffer: Any, data: TrainingData) -> devices.Traced:
    """Traces an iteration, to be compiled, and compares what it returns with what a checkpoint can hold.

    Args:
      state, buffer, data: of the step, or their shapes.

    Raises:
      UserError: the iteration cannot be traced, or its state or buffer has another structure, shape or dtype.
    """
    with _refused("cannot be trained"):
        traced = devices.traced(step, state, buffer, data)
    after, rows = traced.returns
    differs = checkpoint.difference(checkpoint.template_of(state), checkpoint.template_of(after))
    if not differs and buffer is not None:
        differs = checkpoint.difference({"buffer": buffer}, {"buffer": rows})
    if differs:
        raise UserError(f"config.model cannot be trained: after an iteration the state {differs}")
    return traced


def few_images(config: Config, model_state: Variables) -> str | None:
    """A warning where each device's batch is too small for batch norm, whose statistics are its own; else None."""
    unlabelled, labelled = config.training.batch_sizes
    smallest = min(unlabelled, labelled) if quantities.weights(config).needs_samples else labelled
    count = devices.count()
    if COLLECTION not in model_state or smallest >= _FEW * count:
        return None
    return (
        f"warning: batch norm sees {smallest // count} images on each of {count} devices; below {_FEW} its statistics "
        f"are noise. Use batches of at least {_FEW * count}, or fewer devices"
    )


def long_warmup(config: Config, total_steps: int) -> str | None:
    """What to say of a run that ends while its learning rate still rises."""
    steps, rate = config.optimizer.warmup_steps, config.optimizer.learning_rate
    if steps <= total_steps:
        return None
    return (
        f"warning: config.optimizer.warmup_steps is {steps} and the run has {total_steps} iterations; its learning "
        f"rate only reaches {rate * total_steps / steps:.3g} of {rate:g}"
    )


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Errors of a user's network in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config.model {what}: {first_line(error)}") from error


def _check_logits(logits: Any, num_classes: int) -> None:
    is_array = isinstance(logits, jax.ShapeDtypeStruct)
    if not is_array or logits.shape != (_LARGE, num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
        given = f"{logits.dtype} {list(logits.shape)}" if is_array else type(logits).__name__
        raise UserError(f"config.model must give logits [{_LARGE}, {num_classes}] for {_LARGE} images, not {given}")


def _check_parameters(params: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise UserError("config.model has no parameters, so there is nothing to train")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"config.model has a parameter that is no float, {name} ({leaf.dtype}); keep it in a collection of "
                "its own, with self.variable"
            )


def _note_evaluating(
    paths: set[str],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Adds the path of a layer that is called as in evaluation, as Flax's own layers are told that."""
    module = context.module
    if context.method_name == "__call__" and not isinstance(module, nn.SpectralNorm):
        given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments
        for name in ("deterministic", "use_running_average"):
            value = given.get(name)
            value = getattr(module, name, None) if value is None else value
            idle = name == "deterministic" and not (getattr(module, "rate", 0) or getattr(module, "dropout_rate", 0))
            if value is True and not idle:
                paths.add("/".join(module.path) or type(module).__name__)
    return call(*args, **kwargs)
