"""A Flax module seen as functions of (variables, x): all that the rest of the package knows of a network."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jem_jax import wide_resnet
from jem_jax.common import paths
from jem_jax.common.errors import UserError, shown
from jem_jax.config import Model
from jem_jax.wide_resnet import WideResNet

Array = jax.Array
Variables = dict[str, Any]
_FOLDERS: ContextVar[tuple[Path, ...]] = ContextVar("folders", default=())
_CPU_PIXELS = 2**13
"""of images that pass a network together on a CPU: feature maps of more leave a core's cache between layers"""


class Network:
    """Pure functions of one Flax module that maps images [B, H, W, C] to logits [B, K].

    Its `__call__` may take `train`; a module without it is the same in training and evaluation. It may take `features`,
    to return what its last layer sees [B, D] instead of the logits.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        accepted = inspect.signature(type(module).__call__).parameters
        self._takes_train = "train" in accepted
        self.has_features = "features" in accepted

    def init(self, key: Array, x: Array) -> Variables:
        """Variables: "params", and other collections such as "batch_stats".

        Args:
          x: [B, H, W, C]; layers that start from statistics (act norm) take them from this batch.
        """
        return dict(self.module.init(key, x))

    def cast(self, variables: Variables) -> Variables:
        """The same variables, with parameters in the precision in which the network uses them: the same logits.

        For a loop over passes, which would cast (and lay out) all of them in every pass; XLA leaves that there.
        """
        if not isinstance(self.module, WideResNet):
            return variables
        return {**variables, "params": wide_resnet.cast(variables["params"], self.module.dtype)}

    def logits(self, variables: Variables, x: Array) -> Array:
        """Logits [B, K] in evaluation mode."""
        return jnp.asarray(self.module.apply(variables, x))

    def batch_logits(self, variables: Variables, x: Array, key: Array) -> Array:
        """Logits [B, K] in training mode, from the batch's own statistics; none is updated.

        The released JEM++ and SADA-JEM let every step of a chain update the running statistics as well, and pass data,
        negatives and the labelled images in this order: with 0.9 for the newest batch the labelled, augmented images
        make them. Here passes of the loss are all that count, and the images of p(x), which may be plain as those of
        an evaluation are, pass last.

        Args:
          key: of the dropout mask.
        """
        # Layers of others, such as Flax's own batch norm, update their statistics whenever they train: dropped here.
        return jnp.asarray(self._train(variables, x, key)[0])

    def features(self, variables: Variables, x: Array) -> Array:
        """Penultimate features [B, D] in evaluation mode; the logits where the module does not take `features`."""
        if not self.has_features:
            return self.logits(variables, x)
        return jnp.asarray(self.module.apply(variables, x, features=True))

    def train_logits(self, variables: Variables, batches: Sequence[Array], key: Array) -> tuple[list[Array], Variables]:
        """Logits of each batch in training mode, and the collections that training updates.

        On an accelerator one forward pass takes all batches, unless the network keeps statistics of a batch: then each
        has its own, in order, and the last counts most in the running ones. On a CPU each is cut as `examples_a_pass`
        says.
        """
        state = {name: value for name, value in variables.items() if name != "params"}
        if not state and jax.default_backend() != "cpu":
            sizes = [len(batch) for batch in batches]
            together, _ = self._train(variables, jnp.concatenate(batches), key)
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return [together[end - size : end] for size, end in zip(sizes, ends, strict=True)], {}
        # Traced once for all parts of a shape, so that a run that finds its step compiled starts sooner.
        one_pass = jax.jit(self._train)
        logits, passes = [], 0
        for batch in batches:
            size = len(batch) if state else examples_a_pass(len(batch), batch.shape[1:])
            parts = []
            # Not a loop of the program: XLA's CPU convolutions for kernel gradients are many times slower in one.
            for start in range(0, len(batch), size):
                part, pass_key = batch[start : start + size], jax.random.fold_in(key, passes)
                one, state = one_pass({**state, "params": variables["params"]}, part, pass_key)
                parts.append(one)
                passes += 1
            logits.append(jnp.concatenate(parts))
        return logits, state

    def _train(self, variables: Variables, x: Array, key: Array) -> tuple[Array, Variables]:
        collections = [name for name in variables if name != "params"]
        kwargs: dict[str, Any] = {"train": True} if self._takes_train else {}
        logits, state = self.module.apply(variables, x, rngs={"dropout": key}, mutable=collections, **kwargs)
        return logits, dict(state)


def examples_a_pass(batch: int, image_shape: tuple[int, ...]) -> int:
    """How many examples of a batch pass the network together, where none influences another: a divisor of `batch`.

    All of them on an accelerator. On a CPU what fills a core's cache, such as 8 images of 32×32; what it gives is
    measured by experiments/levers.py.
    """
    most = max(1, _CPU_PIXELS // math.prod(image_shape[:2]))
    if jax.default_backend() != "cpu" or batch <= most:
        return batch
    size = next(size for size in range(most, 0, -1) if batch % size == 0)
    # Where the batch can be cut into crumbs only, whole is better.
    return size if 2 * size > most else batch


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
    found = jax.lax.map(function, parts)
    return found.reshape(-1, *found.shape[2:])


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
            dropout=model.dropout,
            dtype=jnp.dtype(model.dtype),
            activation=model.activation,
        )
    )


def check(network: Network, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Traces the network on one image's shape.

    Raises:
      UserError: it does not take such images, or does not give [B, num_classes] logits.
    """
    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    try:
        logits = jax.eval_shape(lambda x: network.module.init_with_output(jax.random.key(0), x)[0], x)
    except Exception as error:
        raise UserError(f"config.model does not take images of {_times(image_shape)}: {_first_line(error)}") from error
    if getattr(logits, "shape", None) != (2, num_classes):
        raise UserError(f"config.model must give logits [B, {num_classes}], not {getattr(logits, 'shape', logits)}")


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
            f"{_first_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"config.model.factory {shown(path)} must return a flax.linen.Module, not {type(module).__name__}"
        )
    return module


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
