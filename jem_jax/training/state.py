"""The state of a run, and an iteration's data, keys and constants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jem_jax import objective, prng
from jem_jax.config import BatchSizes, Config, Data, Sampler
from jem_jax.distributed import devices
from jem_jax.training import divergence, quantities
from jem_jax.training.network import Network, Variables
from jem_jax.training.schedule import Program
from jem_jax.training.statistics import COLLECTION

Array = jax.Array


class Window(NamedTuple):
    """Metrics summed on the device since the last line of the log, so that logging alone reads them."""

    sums: dict[str, Array]
    """of float32 [] each"""
    steps: Array
    """int32 []: iterations in the sums"""


class TrainState(NamedTuple):
    """The state of a run, apart from the replay buffer."""

    step: Array
    """int32 []: iterations done"""
    params: Any
    model_state: Variables
    """the network's other collections: batch statistics"""
    opt_state: Any
    ema: Any
    """averaged parameters, or None"""
    evaluation_stats: Any
    """batch statistics re-estimated for evaluation, as of the last validation or checkpoint; None: the running ones"""
    key: Array
    """the run's PRNG key, another after each recovery; an iteration folds its number in"""
    learning_rate_factor: Array
    """float32 []: 1 but for a while after a recovery"""
    watch: divergence.Watch
    window: Window

    @property
    def evaluation_variables(self) -> Variables:
        """The variables for evaluation: averaged parameters and re-estimated statistics where there are any."""
        own = {} if self.evaluation_stats is None else {COLLECTION: self.evaluation_stats}
        return {**self.model_state, **own, "params": self.params if self.ema is None else self.ema}

    @property
    def variables(self) -> Variables:
        """The variables for training."""
        return {**self.model_state, "params": self.params}


class ResidentData(NamedTuple):
    """The training images, whole on every device, and the order of their batches."""

    images: Array
    """uint8 [N, *flat], images as `devices.flat` has them"""
    labels: Array
    """int32 [N]"""
    order: Array
    """int32 [steps · batch]: this epoch's order of the p(x) stream"""
    labelled_order: Array
    """int32 [steps · labelled batch]: that of the labelled stream"""
    starts: Array | None = None
    """float32 [P, K, *flat]: starts of this epoch's fresh chains; None: U(-1, 1)"""


class StreamedBatch(NamedTuple):
    """An iteration's batches, cut by device: [devices, b, ...] outside the step, [b, ...] in it."""

    images: Array
    """uint8 [b, H, W, C] of the p(x) stream"""
    labels: Array
    """int32 [b]"""
    labelled_images: Array
    """uint8 [b', H, W, C] of the labelled stream"""
    labelled_labels: Array
    """int32 [b']"""
    starts: Array | None = None
    """float32 [P, K, *flat] as of `ResidentData`: whole on every device"""


TrainingData = ResidentData | StreamedBatch


class StepSpec(NamedTuple):
    """Functions and settings of a step, constants of its compiled program."""

    network: Network
    optimizer: optax.GradientTransformation
    program: Program
    terms: objective.Weights
    """without the terms that need negatives where the program takes no samples"""
    p_x_factor: Callable[[Array], Array]
    """iteration -> factor of the weight of p(x)"""
    share_batch: bool
    batch_sizes: BatchSizes
    data: Data
    sampler: Sampler
    sam: tuple[float, bool]
    """radius ρ, and whether it is relative to each parameter's size"""
    clips: bool
    """whether the gradient's norm is limited; it is then recorded"""
    ema_decay: float
    limits: divergence.Limits
    max_log_density: float
    log_every: int
    num_classes: int
    image_shape: tuple[int, ...]

    def local_batch(self, labelled: bool) -> int:
        """Images of one stream's batch on each device."""
        size = self.batch_sizes.labelled if labelled else self.batch_sizes.p_x
        return size // devices.count()


class Keys(NamedTuple):
    """One key for each use in an iteration, the same on all devices."""

    augment: Array
    augment_labelled: Array
    classes: Array
    marginal: Array
    conditional: Array
    dropout: Array


def init_state(
    config: Config, network: Network, optimizer: optax.GradientTransformation, key: Array, batch: Array
) -> TrainState:
    """The state before the first iteration.

    Args:
      key: the run's PRNG key.
      batch: [B, H, W, C], the first global batch of data, from which act norm starts.
    """
    return first_state(config, key, *initialised(network, optimizer, key, batch))


def initialised(
    network: Network, optimizer: optax.GradientTransformation, key: Array, batch: Array
) -> tuple[Variables, optax.OptState]:
    """The network's variables and the optimiser's state before the first iteration; arguments as of `init_state`."""
    variables = network.init(prng.stream(key, "initialisation"), batch)
    return variables, optimizer.init(variables["params"])


def first_state(config: Config, key: Array, variables: Variables, opt_state: optax.OptState) -> TrainState:
    """The state before the first iteration, of these variables. What it adds is NumPy's: nothing is compiled for it."""
    variables = dict(variables)
    params = variables.pop("params")
    step: Any = np.int32(0)
    factor: Any = np.float32(1)
    return TrainState(
        step=step,
        params=params,
        model_state=variables,
        opt_state=opt_state,
        ema=params if config.optimizer.ema_decay else None,
        evaluation_stats=variables.get(COLLECTION) if config.training.statistics_images else None,
        key=key,
        learning_rate_factor=factor,
        watch=divergence.initial_watch(),
        window=_empty_window(quantities.weights(config), clips=config.optimizer.clip_norm > 0),
    )


def window_with(window: Window, step: Array, metrics: dict[str, Array], log_every: int) -> Window:
    """The sums with one more iteration. Without samples an iteration lacks metrics, whose sums become NaN."""
    fresh = step % log_every == 0
    sums = {name: jnp.where(fresh, 0, total) + metrics.get(name, jnp.nan) for name, total in window.sums.items()}
    return Window(sums, jnp.where(fresh, 0, window.steps) + 1)


def _empty_window(terms: objective.Weights, clips: bool) -> Window:
    def metrics() -> dict[str, Array]:
        zeros = jnp.zeros((1, 2))
        of_loss = objective.joint_loss(objective.Logits(zeros, zeros, zeros, zeros), jnp.zeros(1, jnp.int32), terms)[1]
        return of_loss | divergence.measures(divergence.moments(zeros, [zeros] if terms.needs_samples else []))

    # The largest |log p~| only guards the iteration: a mean of it would depend on the number of devices.
    sums: dict[str, Any] = {name: np.float32(0) for name in jax.eval_shape(metrics) if name != "log_px_max"}
    if clips:
        sums["gradient_norm"] = np.float32(0)
    count: Any = np.int32(0)
    return Window(sums, count)
