"""A run's setup: everything that iterations need, from settings and a data set."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np
import optax

from jem_jax import class_gaussians, objective, prng, replay_buffer
from jem_jax.augment import to_float
from jem_jax.config import Config, Optimizer
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices, processes
from jem_jax.training import device_data, network, optimizer, preflight, quantities, schedule, state, trained
from jem_jax.training import step as train_step
from jem_jax.training.device_data import DeviceData, Order
from jem_jax.training.network import Network, Variables
from jem_jax.training.schedule import Phase, Program
from jem_jax.training.state import StepSpec, TrainState
from jem_jax.training.step import Step

Array = jax.Array


@dataclass(frozen=True)
class Setup:
    """What stays constant during a run. The caller holds the state and the buffer."""

    config: Config
    dataset: Dataset
    network: Network
    optimizer: optax.GradientTransformation
    order: Order
    data: DeviceData
    """where batches come from; to be closed"""
    phases: tuple[Phase, ...]
    _steps: dict[Program, Step] = field(default_factory=dict, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Iterations of an epoch."""
        return self.order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Iterations of the whole run."""
        return self.config.training.epochs * self.steps_per_epoch

    def step(self, program: Program | None = None) -> Step:
        """The training step of a program, by default the last phase's; made once, compiled at its first call."""
        program = self.phases[-1].program if program is None else program
        if program not in self._steps:
            spec = step_spec(
                self.config,
                self.network,
                self.optimizer,
                self.dataset.image_shape,
                self.dataset.num_classes,
                program,
                self.total_steps,
            )
            self._steps[program] = train_step.per_device(spec, self.data.streamed)
        return self._steps[program]

    def begin(self) -> tuple[TrainState, Array | np.ndarray | None]:
        """The state and the whole buffer [S, C, H, W, channels] before the first iteration.

        Raises:
          UserError: there is no such model as `training.init_from` names, or it does not fit.
        """
        config = self.config
        first = to_float(self.dataset.train.images[self.order.batch(0, 0)])
        key = jax.random.key(config.seed)
        begun = state.first_state(config, key, *_initialiser(self.network, config.optimizer)(key, first))
        buffer: Array | np.ndarray | None = None
        if config.training.init_from:
            with processes.fail_together():
                begun, buffer = trained.begin_from(config, self.dataset, begun)
        return begun, self.fresh_buffer(key) if buffer is None else buffer

    def fresh_buffer(self, key: Array) -> Array | None:
        """A whole buffer of chains that have not begun; None where the objective needs none."""
        slots, classes = quantities.buffer_size(self.config, self.dataset.num_classes)
        if not slots:
            return None
        if self.config.sampler.init == "class_gaussians":
            draws = device_data.draws(self.config, self.dataset.train)
            return class_gaussians.init(draws, prng.stream(key, "buffer"), slots, classes)

        def uniform(key: Array) -> Array:
            return replay_buffer.init(prng.stream(key, "buffer"), slots, self.dataset.image_shape, num_classes=classes)

        return devices.once(uniform)(key)


@functools.lru_cache(maxsize=2)
def _initialiser(network: Network, settings: Optimizer) -> Callable[[Array, Array], tuple[Variables, optax.OptState]]:
    """(key, images) -> variables, optimiser's state; a JEM and the classifier beside it share the program."""
    return devices.once(functools.partial(state.initialised, network, optimizer.build(settings, 1)))


def step_spec(
    config: Config,
    network: Network,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    num_classes: int,
    program: Program,
    total_steps: int,
) -> StepSpec:
    """The constants of a program's step."""
    terms = quantities.weights(config)
    if not program.needs_samples:
        terms = objective.Weights(p_x=0.0, p_y_given_x=terms.p_y_given_x)
    return StepSpec(
        network=network,
        optimizer=optimizer,
        program=program,
        terms=terms,
        p_x_factor=functools.partial(schedule.p_x_factor, config.schedule, total_steps),
        share_batch=config.objective.share_batch,
        batch_sizes=config.training.batch_sizes,
        data=config.data,
        sampler=config.sampler,
        sam=(config.optimizer.sam_rho, config.optimizer.sam_adaptive),
        clips=config.optimizer.clip_norm > 0,
        ema_decay=config.optimizer.ema_decay,
        limits=quantities.limits(config),
        max_log_density=config.training.max_log_density,
        log_every=config.training.log_every,
        num_classes=num_classes,
        image_shape=image_shape,
    )


def prepare(config: Config, dataset: Dataset) -> Setup:
    """Network, optimiser, data and steps of a run; nothing is computed or compiled yet.

    Raises:
      UserError: sizes that do not fit the data set or the devices, or a schedule of too many programs.
    """
    preflight.check_sizes(config, dataset)
    order = Order(config, dataset.train.labels)
    total = config.training.epochs * order.steps_per_epoch
    rate = config.schedule.learning_rate
    return Setup(
        config=config,
        dataset=dataset,
        network=network.build(config.model, dataset.num_classes),
        optimizer=optimizer.build(config.optimizer, order.steps_per_epoch, rate, total),
        order=order,
        data=device_data.build(config, dataset.train, order),
        phases=schedule.phases(config, total),
    )
