"""The cost of a training, before it starts."""

import math
import statistics
import time
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from jem_jax import convolution
from jem_jax.config import Config
from jem_jax.training import quantities
from jem_jax.training.network import Network, Variables
from jem_jax.training.schedule import Program
from jem_jax.training.state import TrainingData, TrainState
from jem_jax.training.step import Step

Array = jax.Array

_TIMED_ITERATIONS = 5


def seconds_per_iteration(step: Step, state: TrainState, buffer: Array | None, data: TrainingData) -> float:
    """The median of five warm iterations of a compiled step, whose results are thrown away."""
    # The step takes its buffer over, and the run's own must stay what it is.
    buffer = None if buffer is None else jax.jit(jnp.copy)(buffer)
    state, buffer = jax.block_until_ready(step(state, buffer, data))
    times = []
    for _ in range(_TIMED_ITERATIONS):
        started = time.monotonic()
        state, buffer = jax.block_until_ready(step(state, buffer, data))
        times.append(time.monotonic() - started)
    return statistics.median(times)


def flops_per_iteration(
    config: Config, network: Network, variables: Variables, image_shape: tuple[int, int, int], program: Program
) -> float:
    """Arithmetic of an iteration's convolutions and matrix products, on all devices, in FLOP (a multiply-add is two).

    Products with the padding's zeros count too, as the hardware computes them.
    A chain step is a forward pass and an input gradient, two passes' worth; a batch in the loss has a weight gradient
    besides, three.
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with convolution.plain():
        forward = _flops(jax.make_jaxpr(network.logits)(variables, x).jaxpr)
    gradients = 2 if program.sam else 1
    chain_steps = program.num_steps * quantities.chains(config)
    terms = quantities.weights(config)
    unlabelled, labelled = config.training.batch_sizes
    images = labelled
    if program.needs_samples:
        # The data and the negatives of p(x), and the negatives of p(x, y).
        images += (2 - config.objective.share_batch) * unlabelled * terms.needs_negatives
        images += labelled * terms.needs_conditional_negatives
    return forward * (2 * chain_steps + 3 * gradients * images)


def _flops(jaxpr: Any) -> int:
    """FLOP of all convolutions and matrix products of a program. XLA gives its own count on a CPU alone."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
        if equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec
            each = math.prod(kernel.shape) // kernel.shape[numbers[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            each = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        else:
            continue
        total += 2 * each * math.prod(equation.outvars[0].aval.shape)
    return total


def parameter_count(variables: Variables) -> int:
    """How many numbers are learned."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
