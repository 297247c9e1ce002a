"""Training: everything that an iteration needs, and the loop."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import (
    checkpoint,
    device_data,
    forecast,
    metrics,
    network,
    optimizer,
    parallel,
    pictures,
    replay_buffer,
    sizes,
    train_step,
    workdir,
)
from jem_jax.checkpoint import Checkpoints
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.datasets.splits import to_float
from jem_jax.device_data import DeviceData, Order
from jem_jax.errors import UserError
from jem_jax.evaluation import classification
from jem_jax.interrupts import Interrupted, Interrupts
from jem_jax.metrics import Recorder
from jem_jax.network import Network
from jem_jax.train_step import Step, TrainState

Array = jax.Array

_PICTURED = 100


@dataclass(frozen=True)
class Trained:
    """A training that reached its end."""

    steps: int
    seconds: float
    """of all its parts, where it was interrupted"""


@dataclass
class _Training:
    """A training's parts, and where it stands."""

    config: Config
    dataset: Dataset
    directory: Path
    network: Network
    step_fn: Step
    logits_fn: Callable[..., np.ndarray]
    data: DeviceData
    steps_per_epoch: int
    state: TrainState
    buffer: Array | None
    checkpoints: Checkpoints
    best: Checkpoints
    best_accuracy: float
    seconds_before: float
    started: float

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.steps_per_epoch

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def due(self, step: int, epochs: int) -> bool:
        return step % (epochs * self.steps_per_epoch) == 0 or step == self.total_steps


def train(config: Config, dataset: Dataset, directory: Path, title: str, interrupts: Interrupts) -> Trained:
    """Trains, or goes on with, the run in a directory until its last epoch.

    Args:
      config: one that passed `check`; `objective.p_x` and `p_xy` 0 make it a plain classifier.
      directory: gets checkpoints/, best/, samples/, metrics.jsonl and tensorboard/.
      title: stands before the progress bar.
      interrupts: asked after every iteration whether to stop.

    Raises:
      Interrupted: a signal came; everything is saved.
      UserError: sizes that do not fit, a damaged or foreign checkpoint, or an iteration that had to be undone.
    """
    with contextlib.ExitStack() as stack:
        training = _set_up(config, dataset, directory, stack)
        first_step, every = int(training.state.step), config.training
        if first_step >= training.total_steps:
            return Trained(first_step, training.seconds_before)
        _announce(training, title)
        recorder = Recorder(directory, title, first_step, training.total_steps, writes=parallel.is_first())
        stack.callback(recorder.close)
        for step in range(first_step, training.total_steps):
            data = training.data.at(step)
            training.state, training.buffer = training.step_fn(training.state, training.buffer, data)
            done = step + 1
            if done % every.log_every == 0 or done == training.total_steps:
                _log(training, recorder, done)
            if training.due(done, every.validate_every):
                _validate(training, recorder, done)
            if training.due(done, every.sample_every):
                _draw_buffer(training, done)
            if training.due(done, every.checkpoint_every):
                _save(training, done)
            if interrupts.requested(done, every.log_every):
                _save(training, done)
                training.checkpoints.finish()
                raise Interrupted(done, training.total_steps)
        training.checkpoints.finish()
        training.best.finish()
        return Trained(training.total_steps, training.seconds)


def check(config: Config, dataset: Dataset) -> None:
    """Whether sizes and network fit the images and the devices, without computing anything.

    Raises:
      UserError: they do not.
    """
    sizes.check(config, dataset)
    net = network.build(config.model, dataset.num_classes)
    network.check(net, dataset.image_shape, dataset.num_classes)


def classifier_config(config: Config) -> Config:
    """The same settings for a plain classifier: cross-entropy alone."""
    weights = dataclasses.replace(config.objective, p_x=0.0, p_y_given_x=1.0, p_xy=0.0, energy_l2=0.0)
    return dataclasses.replace(config, objective=weights)


def template(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> tuple[TrainState, Any]:
    """Shapes of a run's state and whole buffer (None where there is none), without computing anything."""
    net = network.build(config.model, num_classes)
    rule = optimizer.build(config.optimizer, 1)
    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key, x: train_step.init_state(config, net, rule, key, x), key, image)
    slots, classes = sizes.buffer_size(config, num_classes)
    return state, jax.ShapeDtypeStruct((slots, classes, *image_shape), jnp.float32) if slots else None


def tree(state: Any, buffer: Any) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"state": state} if buffer is None else {"state": state, "buffer": buffer}


def _set_up(config: Config, dataset: Dataset, directory: Path, stack: contextlib.ExitStack) -> _Training:
    """Everything before the first iteration: begun anew, or from the last checkpoint if there is one.

    Args:
      stack: closes what was opened.
    """
    sizes.check(config, dataset)
    directory.mkdir(parents=True, exist_ok=True)
    net = network.build(config.model, dataset.num_classes)
    order = Order(config, dataset.train.labels)
    data = device_data.build(config, dataset.train, order)
    rule = optimizer.build(config.optimizer, order.steps_per_epoch)
    restored = _restore(config, dataset, directory)
    buffer: Array | np.ndarray | None
    if restored is None:
        first_batch = to_float(dataset.train.images[order.batch(0, 0)])
        state, buffer, note = _begin(config, dataset, net, rule, first_batch)
    else:
        state, buffer, note = restored
    writes = parallel.is_first()
    checkpoints = Checkpoints(directory / workdir.CHECKPOINTS, config.training.keep_checkpoints, writes)
    best = Checkpoints(directory / workdir.BEST, 1, writes)
    for part in (data, checkpoints, best):
        stack.callback(part.close)
    return _Training(
        config=config,
        dataset=dataset,
        directory=directory,
        network=net,
        step_fn=train_step.build(config, net, rule, dataset.num_classes, data.streamed),
        logits_fn=parallel.over_examples(lambda variables, images: net.logits(variables, to_float(images))),
        data=data,
        steps_per_epoch=order.steps_per_epoch,
        state=parallel.replicate(state),
        buffer=None if buffer is None else parallel.shard(buffer),
        checkpoints=checkpoints,
        best=best,
        best_accuracy=note["best_accuracy"],
        seconds_before=note["seconds"],
        started=time.monotonic(),
    )


def _begin(
    config: Config, dataset: Dataset, net: Network, rule: Any, first_batch: np.ndarray
) -> tuple[TrainState, Array | None, dict[str, float]]:
    key = jax.random.key(config.seed)
    state = jax.jit(lambda key, x: train_step.init_state(config, net, rule, key, x))(key, first_batch)
    slots, classes = sizes.buffer_size(config, dataset.num_classes)
    buffer = None
    if slots:
        buffer_key = jax.random.fold_in(key, 2**31 - 2)
        buffer = jax.jit(lambda key: replay_buffer.init(key, slots, dataset.image_shape, num_classes=classes))(
            buffer_key
        )
    return state, buffer, {"best_accuracy": -1.0, "seconds": 0.0}


def _restore(
    config: Config, dataset: Dataset, directory: Path
) -> tuple[TrainState, np.ndarray | None, dict[str, float]] | None:
    """The newest whole checkpoint, after everything later was moved out of its way; None where there is none."""
    folder, best = directory / workdir.CHECKPOINTS, directory / workdir.BEST
    # All have looked before the first one moves anything.
    with parallel.all_or_none():
        step, faults = checkpoint.newest_whole(folder)
    if parallel.is_first():
        for path, fault in faults.items():
            target = workdir.set_aside(path, directory)
            print(f"checkpoint {path} is not used: {fault}; moved to {target}", flush=True)
        for later in checkpoint.steps(best):
            if later > (step or 0):
                workdir.set_aside(best / str(later), directory)
        for path in checkpoint.unfinished(best):
            workdir.set_aside(path, directory)
    parallel.wait("checkpoints")
    if step is None:
        return None
    state, buffer = template(config, dataset.image_shape, dataset.num_classes)
    found = checkpoint.restore(folder, tree(checkpoint.template_of(state), buffer), step)
    return checkpoint.from_tree(state, found.tree["state"]), found.tree.get("buffer"), found.note


def _announce(training: _Training, title: str) -> None:
    """Says what is about to run and how long it will take."""
    step = int(training.state.step)
    variables = training.state.evaluation_variables
    flops = forecast.flops_per_iteration(training.config, training.network, variables, training.dataset.image_shape)
    if step and parallel.is_first():
        print(f"{title}: going on from iteration {step} of {training.total_steps}", flush=True)
    compiled, each = forecast.seconds_per_iteration(
        training.step_fn, training.state, training.buffer, training.data.at(step)
    )
    left = training.total_steps - step
    if parallel.is_first():
        print(
            f"{title}: {parallel.describe()}; {forecast.parameter_count(variables):,} parameters; "
            f"{flops / 1e9:,.3g} GFLOP an iteration; compiled in {compiled:.1f} s; {left} iterations will take about "
            f"{metrics.duration(left * each)}",
            flush=True,
        )


def _log(training: _Training, recorder: Recorder, step: int) -> None:
    """Reads the device's sums, the only place where the loop waits for it between checkpoints.

    Raises:
      UserError: an iteration since the last line was undone.
    """
    window = jax.device_get(training.state.window)
    epoch = round(step / training.steps_per_epoch, 4)
    means = {name: float(total) / int(window.steps) for name, total in window.sums.items()}
    recorder.progress(step, {"epoch": epoch, **means})
    _stop_if_diverged(training)


def _stop_if_diverged(training: _Training) -> None:
    """Asked before a checkpoint too, which would push the last good one out.

    Raises:
      UserError: an iteration was undone.
    """
    bad_step = int(training.state.window.bad_step)
    if bad_step >= 0:
        training.checkpoints.finish()
        last = checkpoint.steps(training.directory / workdir.CHECKPOINTS)
        kept = f"the checkpoint of iteration {last[-1]} is kept" if last else "there is no checkpoint yet"
        raise UserError(
            f"training diverged at iteration {bad_step + 1}: loss, gradient or log p~ was not finite, or "
            f"|log p~| passed config.training.max_log_density; {kept}. A smaller learning rate or step size, or more "
            "SGLD steps, may help"
        )


def _validate(training: _Training, recorder: Recorder, step: int) -> None:
    """Validation accuracy and NLL, and the best so far kept; nothing is ever chosen on the test set."""
    split = training.dataset.validation
    variables = training.state.evaluation_variables
    logits = training.logits_fn(variables, split.images, training.config.evaluation.batch_size)
    # The first process's: where rounding differs, two that each trust their own would not save together.
    accuracy = float(parallel.from_all(repr(classification.accuracy(logits, split.labels)))[0])
    nll = classification.negative_log_likelihood(logits, split.labels)
    recorder.record(step, {"validation_accuracy": accuracy, "validation_nll": nll})
    if accuracy > training.best_accuracy:
        training.best_accuracy = accuracy
        kept = tree(checkpoint.to_tree(training.state), None)
        training.best.save(step, kept, {"validation_accuracy": accuracy})


def _draw_buffer(training: _Training, step: int) -> None:
    """A picture of chains spread evenly over this process's part of the buffer."""
    if training.buffer is None or not parallel.is_first():
        return
    axes = training.buffer.shape[:3]
    count = int(np.prod(axes))
    chosen = np.linspace(0, count - 1, min(_PICTURED, count)).astype(int)
    images = np.asarray(training.buffer[np.unravel_index(chosen, axes)])
    pictures.save(pictures.square(images), training.directory / workdir.SAMPLES / f"buffer_{step:07d}.png")


def _save(training: _Training, step: int) -> None:
    _stop_if_diverged(training)
    buffer = None if training.buffer is None else parallel.whole(training.buffer)
    whole = tree(checkpoint.to_tree(training.state), buffer)
    training.checkpoints.save(step, whole, {"best_accuracy": training.best_accuracy, "seconds": training.seconds})
