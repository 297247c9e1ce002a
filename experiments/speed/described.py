"""A training step compiled for chips that are described to XLA. It needs no such chip, and nothing runs."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jem_jax.config import Config
from jem_jax.distributed import devices
from jem_jax.training import network, optimizer, quantities, schedule
from jem_jax.training import step as train_step
from jem_jax.training.quantities import buffer_size
from jem_jax.training.setup import step_spec
from jem_jax.training.state import ResidentData, init_state

CLASSES, IMAGES, IMAGE = 10, 45_000, (32, 32, 3)
"""CIFAR-10's, of the training split"""


def compiled(config: Config, chips: Sequence[jax.Device], backend: str) -> jax.stages.Compiled:
    """The step of a run's last phase on CIFAR-10, by the function that a run compiles it with.

    Args:
      chips: of a `jax.experimental.topologies` description.
      backend: what `jax.default_backend` says on such chips.
    """

    def per_device(step: Callable[..., Any], *, in_axes: Any, out_axes: Any, donate_argnums: Any = ()) -> Any:
        mapped = devices.mapped_over(chips, step, in_axes, out_axes, donate_argnums)
        return functools.partial(mapped.lower, jax.ShapeDtypeStruct((len(chips),), jnp.int32))

    steps = IMAGES // max(config.training.batch_sizes)
    net, rule = network.build(config.model, CLASSES), optimizer.build(config.optimizer, steps)
    total = steps * config.training.epochs
    program = schedule.phases(config, total)[-1].program
    spec = step_spec(config, net, rule, IMAGE, CLASSES, program, total)
    with (
        mock.patch.object(jax, "default_backend", return_value=backend),
        mock.patch.object(devices, "count", return_value=len(chips)),
        mock.patch.object(devices, "per_device", per_device),
    ):
        lowered: Any = train_step.per_device(spec)(*_arguments(config, net, rule, len(chips), steps))
    return lowered.compile()


def _arguments(config: Config, net: network.Network, rule: Any, chips: int, steps: int) -> tuple[Any, ...]:
    """Shapes of a step's arguments: state, buffer and data that lie on every chip."""
    array, flat = jax.ShapeDtypeStruct, devices.flat(IMAGE)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key, x: init_state(config, net, rule, key, x), key, array((2, *IMAGE), jnp.float32))
    slots, classes = buffer_size(config, CLASSES)
    orders = [array((steps * size,), jnp.int32) for size in config.training.batch_sizes]
    fresh = max(1, math.ceil(config.sampler.reinit_prob * steps * quantities.chains(config) / CLASSES))
    starts = array((fresh, CLASSES, *flat), jnp.float32) if config.sampler.init == "class_gaussians" else None
    data = ResidentData(array((IMAGES, *flat), jnp.uint8), array((IMAGES,), jnp.int32), *orders, starts=starts)
    rows = array((chips, slots // chips, *devices.flat((classes, *IMAGE))), jnp.float32)
    return state, rows if slots else None, data


def computations(text: str) -> dict[str, str]:
    """The text of every computation of a compiled program by its name; the entry's is "ENTRY"."""
    found = re.findall(r"^((?:ENTRY )?)%([\w.-]+) \((.*?)^}", text, re.MULTILINE | re.DOTALL)
    return {"ENTRY" if entry else name: body.partition("\n")[2] for entry, name, body in found}
