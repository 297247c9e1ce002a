"""A Flax module seen as functions of (variables, x): all that the rest of the package knows of a network."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import wide_resnet
from jem_jax.common import paths
from jem_jax.common.errors import UserError, first_line, shown
from jem_jax.config import Model
from jem_jax.distributed import devices
from jem_jax.wide_resnet import WideResNet

Array = jax.Array
Variables = dict[str, Any]
_FOLDERS: ContextVar[tuple[Path, ...]] = ContextVar("folders", default=())
_ASKING = threading.Lock()
_CPU_PIXELS = 2**13
"""of images that pass a network together on a CPU: feature maps of more leave a core's cache between layers"""
_TRAINING = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode", "enable_dropout"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "inference", "is_deterministic"), False),
    **dict.fromkeys(("eval", "is_eval", "eval_mode", "evaluate", "test", "testing", "is_test", "test_mode"), False),
}
"""The names by which a module is told that it trains, and what it is then given; in evaluation the opposite."""


class Network:
    """Pure functions of one Flax module that maps images [B, H, W, C] to logits [B, K].

    It is told whether it trains by every argument of its `__call__`, and every field, that bears a usual name: `train`,
    `training`, `deterministic`, `use_running_average` and the others of `_TRAINING`, whatever their defaults. A module
    without them is the same in training and evaluation. Every PRNG stream that it asks for in training has a key.
    Layers with an `axis_name` synchronise over all devices. It may take `features`, to return what its last layer sees
    [B, D].
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Networks of equal modules share compiled programs. A module with a list among its fields has no hash.
        self._identity: object = module if _has_hash(module) else object()
        accepted = list(inspect.signature(type(module).__call__).parameters.values())[2:]
        names = [parameter.name for parameter in accepted]
        self.has_features = "features" in names
        self._flags = [name for name in names if name in _TRAINING]
        # Passed by position where possible: nn.remat and nn.jit take static arguments in no other way.
        by_place = [p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name in _TRAINING for p in accepted]
        self._by_place = names[: (*by_place, False).index(False)]
        fields = {field.name for field in dataclasses.fields(module)}
        self._fields = [name for name in _TRAINING if name in fields and name not in names]
        self._streams: tuple[str, ...] | None = ("dropout",) if isinstance(module, WideResNet) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def init(self, key: Array, x: Array) -> Variables:
        """Variables: "params", and other collections such as "batch_stats".

        Args:
          x: [B, H, W, C]; layers that start from statistics (act norm) take them from this batch.
        """
        module, places, flags = self._mode(trains=False)
        return {"params": {}, **module.init(key, x, *places, **flags)}

    def cast(self, variables: Variables) -> Variables:
        """The same variables, with parameters in the precision in which the network uses them: the same logits.

        For a loop over passes, which would cast (and lay out) all of them in every pass; XLA leaves that there.
        """
        if not isinstance(self.module, WideResNet):
            return variables
        return {**variables, "params": wide_resnet.cast(variables["params"], self.module.dtype)}

    def logits(self, variables: Variables, x: Array) -> Array:
        """Logits [B, K] in evaluation mode."""
        return _at_least_float32(self.evaluation_pass(variables, x))

    def batch_logits(self, variables: Variables, x: Array, key: Array) -> Array:
        """Logits [B, K] in training mode, from the batch's own statistics; none is updated.

        The released JEM++ and SADA-JEM let every step of a chain update the running statistics as well, and pass data,
        negatives and the labelled images in this order: with 0.9 for the newest batch the labelled, augmented images
        make them. Here passes of the loss are all that count, and the images of p(x), which may be plain as those of
        an evaluation are, pass last.

        Args:
          key: of the dropout mask and all else that is random in training.
        """
        # Layers of others, such as Flax's own batch norm, update their statistics whenever they train: dropped here.
        return self.train_pass(variables, x, key)[0]

    def features(self, variables: Variables, x: Array) -> Array:
        """Penultimate features [B, D] in evaluation mode; the logits where the module does not take `features`."""
        return _at_least_float32(
            self.evaluation_pass(variables, x, **({"features": True} if self.has_features else {}))
        )

    def described(self, variables: Variables, x: Array) -> tuple[Array, Array]:
        """Logits [B, K] and penultimate features [B, D]: in one compiled program one pass gives both."""
        return self.logits(variables, x), self.features(variables, x)

    def train_logits(self, variables: Variables, batches: Sequence[Array], key: Array) -> tuple[list[Array], Variables]:
        """Logits of each batch in training mode, and the collections that training updates.

        One forward pass takes all batches, on a CPU where it holds so many; else each is cut as `examples_a_pass` says.
        With batch norm each batch has its own pass, in order; the last pass weighs most in the running statistics.
        """
        state = {name: value for name, value in variables.items() if name != "params"}
        sizes = [len(batch) for batch in batches]
        if not state and sum(sizes) <= _most_a_pass(batches[0].shape[1:]):
            together, _ = self.train_pass(variables, jnp.concatenate(batches), key)
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return [together[end - size : end] for size, end in zip(sizes, ends, strict=True)], {}
        # Traced once for all parts of a shape, so that a run that finds its step compiled starts sooner.
        one_pass = jax.jit(self.train_pass)
        logits, passes = [], 0
        for batch in batches:
            size = len(batch) if state else examples_a_pass(len(batch), batch.shape[1:])
            parts = []
            # Not a loop of the program: XLA's CPU convolutions for kernel gradients are many times slower in one.
            for start in range(0, len(batch), size):
                part, pass_key = batch[start : start + size], jax.random.fold_in(key, passes)
                part_logits, state = one_pass({**state, "params": variables["params"]}, part, pass_key)
                parts.append(part_logits)
                passes += 1
            logits.append(jnp.concatenate(parts))
        return logits, state

    def frozen_logits(
        self, variables: Variables, batches: Sequence[Array], key: Array
    ) -> tuple[list[Array], Variables]:
        """As `train_logits`, in evaluation mode: running statistics are used and stay as they are; no dropout."""
        del key
        ends = np.cumsum([len(batch) for batch in batches])
        together = self.logits(variables, jnp.concatenate(batches))
        state = {name: value for name, value in variables.items() if name != "params"}
        return jnp.split(together, ends[:-1]), state

    def _mode(self, trains: bool) -> tuple[nn.Module, list[bool], dict[str, Any]]:
        """The module in that mode, and what its `__call__` takes after x: by place, and by name."""
        values = {name: value is trains for name, value in _TRAINING.items()}
        fields: dict[str, Any] = {name: values[name] for name in self._fields}
        module = self.module.clone(**fields) if fields else self.module
        by_name = {name: values[name] for name in self._flags if name not in self._by_place}
        return module, [values[name] for name in self._by_place], by_name

    def evaluation_pass(self, variables: Variables, x: Array, **more: Any) -> Any:
        """The module's own output in evaluation mode."""
        module, places, flags = self._mode(trains=False)
        return module.apply(variables, x, *places, **flags, **more)

    def train_pass(self, variables: Variables, x: Array, key: Array) -> tuple[Array, Variables]:
        """Logits in training mode, and the collections but for the parameters after the pass."""
        streams = self._streams = self._streams or self._find_streams(variables, x, key)
        keys = {name: jax.random.fold_in(key, number) for number, name in enumerate(streams)}
        logits, state = self._apply_in_training(variables, x, {**keys, "dropout": key})
        return _at_least_float32(logits), state

    def _apply_in_training(self, variables: Variables, x: Array, keys: dict[str, Array]) -> tuple[Array, Variables]:
        module, places, flags = self._mode(trains=True)
        collections = [name for name in variables if name != "params"]
        with nn.intercept_methods(_over_devices):
            logits, state = module.apply(variables, x, *places, rngs=keys, mutable=collections, **flags)
        return logits, dict(state)

    def _find_streams(self, variables: Variables, x: Array, key: Array) -> tuple[str, ...]:
        """The names of the PRNG streams that a training pass asks for."""
        # What has no key of its own draws from "params". A module may ask for more where it is given some.
        streams = {"dropout", "params"}
        while True:
            keys = dict.fromkeys(streams, key)
            with _streams_asked_for(streams):
                jax.eval_shape(self._apply_in_training, variables, x, keys)
            if streams == keys.keys():
                return tuple(sorted(streams))


def _at_least_float32(logits: Any) -> Array:
    """In half precision log p~ of an image would be known to two digits."""
    logits = jnp.asarray(logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@contextlib.contextmanager
def _streams_asked_for(names: set[str]) -> Iterator[None]:
    """Adds the name of every PRNG stream that a module asks for, or asks whether it is there."""
    scope: Any = flax.core.Scope

    def noted(self: flax.core.Scope, name: str) -> bool:
        names.add(name)
        return has_rng(self, name)

    # Flax has no hook for it. Programs are traced side by side, and each must find what it is to put back.
    with _ASKING:
        has_rng, scope.has_rng = scope.has_rng, noted
        try:
            yield
        finally:
            scope.has_rng = has_rng


def _over_devices(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    """Makes a layer synchronise over this package's device axis, under any name that its author gave it."""
    # Not by getattr, which a module may define by calls that come here.
    if vars(context.module).get("axis_name") is not None:
        object.__setattr__(context.module, "axis_name", devices.AXIS)
    return call(*args, **kwargs)


def examples_a_pass(batch: int, image_shape: tuple[int, ...]) -> int:
    """How many examples of a batch pass the network together, where none influences another: a divisor of `batch`.

    All of them on an accelerator. On a CPU what fills a core's cache, such as 8 images of 32×32; what it gives is
    measured by experiments/speed/levers.py.
    """
    most = _most_a_pass(image_shape)
    if batch <= most:
        return batch
    size = next(size for size in range(most, 0, -1) if batch % size == 0)
    # Where the batch can be cut into crumbs only, whole is better.
    return size if 2 * size > most else batch


def _most_a_pass(image_shape: tuple[int, ...]) -> int:
    return max(1, _CPU_PIXELS // math.prod(image_shape[:2])) if jax.default_backend() == "cpu" else sys.maxsize


def in_parts(function: Callable[[Any], Array], batch: Any, shape: tuple[int, ...]) -> Array:
    """`function` of a batch of examples that do not influence each other, for as many at a time as may pass together.

    Args:
      function: (part of `batch`) -> [b, ...].
      batch: a pytree of arrays [B, ...].
      shape: [B, H, W, C], of the images that pass the network.

    Returns:
      [B, ...].
    """
    size = examples_a_pass(shape[0], shape[1:])
    if size == shape[0]:
        return function(batch)
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batch)
    ends = jax.lax.map(function, parts)
    return ends.reshape(-1, *ends.shape[2:])


def describe(
    network: Network, variables: Variables, images: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K] and penultimate features [N, D] of images [N, H, W, C] in [-1, 1].

    One compiled program serves validation and all sections of a report.
    """
    # Sets a little smaller than a batch share its program; of few images, most of the pass would be for nothing.
    fill = batch_size if 4 * len(images) >= batch_size else 0
    return _described(network, devices.local_count())(variables, images, batch_size, fill)


@functools.lru_cache(maxsize=8)
def _described(network: Network, device_count: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    del device_count
    return devices.over_examples(network.described)


def _has_hash(module: nn.Module) -> bool:
    try:
        hash(module)
    except TypeError:
        return False
    return True


def look_in(*folders: Path) -> None:
    """Has `model.factory` looked for in these folders too, beside the working folder and Python's own."""
    _FOLDERS.set(folders)


def build(model: Model, num_classes: int) -> Network:
    """The network that the settings name: a WRN, or what `model.factory` returns for `num_classes`.

    Raises:
      UserError: the factory cannot be imported, or returns no Flax module.
    """
    if model.factory:
        return Network(_from_factory(model.factory, num_classes))
    return Network(
        WideResNet(
            num_classes=num_classes,
            depth=model.depth,
            width=model.width,
            norm=model.norm,
            norm_momentum=model.norm_momentum,
            dropout=model.dropout,
            dtype=jnp.dtype(model.dtype),
            activation=model.activation,
        )
    )


def _from_factory(path: str, num_classes: int) -> nn.Module:
    module_name, _, function_name = path.partition(":")
    try:
        # As `python -m` finds it, which puts the working folder first; the console script does not.
        with paths.importable(Path.cwd(), *_FOLDERS.get()):
            function = getattr(importlib.import_module(module_name), function_name)
            module = function(num_classes=num_classes)
    # A module that exits must not end the program as if it were done.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"config.model.factory {shown(path)} must be package.module:function, called as function(num_classes=…): "
            f"{first_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        is_nnx = any(base.__module__.startswith("flax.nnx") for base in type(module).__mro__)
        hint = "; flax.nnx.bridge.to_linen makes one of such a class" if is_nnx else ""
        raise UserError(
            f"config.model.factory {shown(path)} must return a flax.linen.Module, not {type(module).__name__}{hint}"
        )
    return module
