"""Training: everything that an iteration needs, and the loop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax import class_gaussians, replay_buffer
from jem_jax.augment import to_float
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices, processes
from jem_jax.distributed.interrupts import Interrupted, Interrupts
from jem_jax.evaluation import classification
from jem_jax.runs import checkpoint, image_grid, metrics, workdir
from jem_jax.runs.checkpoint import Checkpoints
from jem_jax.runs.metrics import Recorder
from jem_jax.training import device_data, divergence, forecast, network, optimizer, recovery, sizes, trained
from jem_jax.training import step as train_step
from jem_jax.training.device_data import DeviceData, Order
from jem_jax.training.network import Network
from jem_jax.training.recovery import History, Recovery
from jem_jax.training.step import Step, TrainState
from jem_jax.training.trained import classifier_config, template, tree

__all__ = ["Trained", "check", "classifier_config", "template", "train", "tree"]

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
    """A training's parts, and where it stands once it was placed there."""

    config: Config
    dataset: Dataset
    directory: Path
    network: Network
    rule: Any
    logits_fn: Callable[..., np.ndarray]
    data: DeviceData
    order: Order
    programs: dict[int, Step] = field(default_factory=dict)
    """the step of each number of chain steps that was needed so far"""
    step: int = field(init=False)
    state: TrainState = field(init=False)
    buffer: Array | None = field(init=False)
    learning_rate_factor: float = field(init=False)
    history: History = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    best: Checkpoints = field(init=False)
    best_accuracy: float = field(init=False)
    seconds_before: float = field(init=False)
    started: float = field(init=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.steps_per_epoch

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @property
    def step_fn(self) -> Step:
        """Of as many chain steps as the next iteration is to have."""
        count = recovery.chain_steps(self.config.sampler.num_steps, self.history, self.step)
        if count not in self.programs:
            sampler = dataclasses.replace(self.config.sampler, num_steps=count)
            config = dataclasses.replace(self.config, sampler=sampler)
            self.programs[count] = train_step.build(
                config, self.network, self.rule, self.dataset.num_classes, self.data.streamed
            )
        return self.programs[count]

    def due(self, step: int, epochs: int) -> bool:
        return step % (epochs * self.steps_per_epoch) == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        return self.due(step, self.config.training.checkpoint_every)

    def logs(self, step: int) -> bool:
        return step % self.config.training.log_every == 0 or step == self.total_steps

    def close(self) -> None:
        """Closes the checkpoints, which are opened anew where the training is placed elsewhere."""
        self.checkpoints.close()
        self.best.close()


def train(config: Config, dataset: Dataset, directory: Path, title: str, interrupts: Interrupts) -> Trained:
    """Trains, or goes on with, the run in a directory until its last epoch.

    Args:
      config: one that passed `check`; `objective.p_x` and `p_xy` 0 make it a plain classifier.
      directory: gets checkpoints/, best/, samples/, metrics.jsonl and tensorboard/.
      title: stands before the progress bar.
      interrupts: asked after every iteration whether to stop.

    A run that diverges goes back to its last good checkpoint, as `config.recovery` says.

    Raises:
      Interrupted: a signal came; everything is saved.
      UserError: sizes that do not fit, a damaged or foreign checkpoint, or a divergence too many.
    """
    with contextlib.ExitStack() as stack:
        training = _set_up(config, dataset, directory, stack)
        if training.step >= training.total_steps:
            return Trained(training.step, training.seconds_before)
        _announce(training, title)
        events = recovery.events(training.history)
        recorder = Recorder(directory, title, training.step, training.total_steps, events, writes=processes.is_first())
        stack.callback(recorder.close)
        while training.step < training.total_steps:
            _iterate(training)
            done, every = training.step, config.training
            validates, draws = training.due(done, every.validate_every), training.due(done, every.sample_every)
            if training.logs(done):
                _log(training, recorder)
            # Nothing that lasts is made of a run that has gone wrong.
            looks = training.logs(done) or validates or draws or training.saves(done)
            if looks and _recovered(training, recorder):
                continue
            if validates:
                _validate(training, recorder)
            if draws:
                _draw_buffer(training)
            if training.saves(done):
                _save(training)
            if interrupts.requested(done, every.log_every) and not _recovered(training, recorder):
                _save(training)
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
    stack.callback(data.close)
    training = _Training(
        config=config,
        dataset=dataset,
        directory=directory,
        network=net,
        rule=optimizer.build(config.optimizer, order.steps_per_epoch),
        logits_fn=devices.over_examples(lambda variables, images: net.logits(variables, to_float(images))),
        data=data,
        order=order,
    )
    note = _place(training)
    stack.callback(training.close)
    training.seconds_before, training.started = note["seconds"], time.monotonic()
    return training


def _place(training: _Training) -> dict[str, float]:
    """Puts a training where its directory says that it stands, after a recovery that was cut off was finished.

    Returns:
      The note of the checkpoint, or what stands for it.
    """
    config, dataset, directory = training.config, training.dataset, training.directory
    with processes.fail_together():
        history = recovery.read(directory)
    # All have read before the first one writes.
    processes.wait("recoveries")
    if processes.is_first():
        recovery.settle(directory, directory / workdir.CHECKPOINTS, history)
    history = recovery.settled(history)
    processes.wait("settled")
    restored = _restore(config, dataset, directory, history)
    state, buffer, note = _begin(training) if restored is None else restored
    if history and int(state.step) <= history[-1].back_to:
        state, buffer, note = _otherwise(config, dataset, state, buffer, history)
    training.step, training.history = int(state.step), history
    training.learning_rate_factor = recovery.learning_rate_factor(history, training.step)
    training.state = devices.replicate(state._replace(learning_rate_factor=jnp.float32(training.learning_rate_factor)))
    training.buffer = None if buffer is None else devices.shard_buffer(buffer)
    writes, settings = processes.is_first(), config.training
    training.best = Checkpoints(directory / workdir.BEST, 1, writes)
    training.checkpoints = Checkpoints(
        directory / workdir.CHECKPOINTS,
        settings.keep_checkpoints,
        writes,
        lambda steps, regular: recovery.kept(
            steps, settings.keep_checkpoints, config.recovery.proof, regular, training.history
        ),
        after=training.best,
    )
    training.best_accuracy = note["best_accuracy"]
    return note


def _otherwise(
    config: Config, dataset: Dataset, state: TrainState, buffer: Any, history: History
) -> tuple[TrainState, Any, dict[str, float]]:
    """A checkpoint that a run went back to, as it goes on from there."""
    last = history[-1]
    key = recovery.key(jax.random.key(config.seed), len(history))
    state = state._replace(key=key, watch=divergence.quiet())
    if buffer is not None and last.buffer == "fresh":
        buffer = _fresh_buffer(config, dataset, key)
    return state, buffer, {"best_accuracy": last.best_accuracy, "seconds": last.seconds}


def _begin(training: _Training) -> tuple[TrainState, Any, dict[str, float]]:
    config, dataset = training.config, training.dataset
    first_batch = to_float(dataset.train.images[training.order.batch(0, 0)])
    key = jax.random.key(config.seed)
    begin = jax.jit(lambda key, x: train_step.init_state(config, training.network, training.rule, key, x))
    state = begin(key, first_batch)
    buffer: Array | np.ndarray | None = None
    if config.training.init_from:
        with processes.fail_together():
            state, buffer = trained.begin_from(config, dataset, state)
    buffer = _fresh_buffer(config, dataset, key) if buffer is None else buffer
    return state, buffer, {"best_accuracy": -1.0, "seconds": 0.0}


def _fresh_buffer(config: Config, dataset: Dataset, key: Array) -> Array | None:
    slots, classes = sizes.buffer_size(config, dataset.num_classes)
    if not slots:
        return None
    if config.sampler.init == "class_gaussians":
        buffer_key = jax.random.fold_in(key, 2**31 - 2)
        return class_gaussians.init(device_data.draws(config, dataset.train), buffer_key, slots, classes)
    make = jax.jit(lambda key: replay_buffer.init(key, slots, dataset.image_shape, num_classes=classes))
    return make(jax.random.fold_in(key, 2**31 - 2))


def _restore(
    config: Config, dataset: Dataset, directory: Path, history: History
) -> tuple[TrainState, Any, dict[str, float]] | None:
    """The newest whole checkpoint, after everything later was moved out of its way; None where there is none."""
    best_before = history[-1].best_step if history else -1
    folder, best = directory / workdir.CHECKPOINTS, directory / workdir.BEST
    # All have looked before the first one moves anything.
    with processes.fail_together():
        step, faults = checkpoint.newest_whole(folder)
    if processes.is_first():
        for path, fault in faults.items():
            target = workdir.set_aside(path, directory)
            print(f"checkpoint {path} is not used: {fault}; moved to {target}", flush=True)
        for later in checkpoint.steps(best):
            if later > (step or 0) and later != best_before:
                workdir.set_aside(best / str(later), directory)
        for path in checkpoint.unfinished(best):
            workdir.set_aside(path, directory)
    processes.wait("checkpoints")
    if step is None:
        return None
    state, buffer = template(config, dataset.image_shape, dataset.num_classes)
    found = checkpoint.restore(folder, tree(checkpoint.template_of(state), buffer), step)
    return checkpoint.from_tree(state, found.tree["state"]), found.tree.get("buffer"), found.note


def _announce(training: _Training, title: str) -> None:
    """Says what is about to run and how long it will take."""
    step = training.step
    variables = training.state.evaluation_variables
    flops = forecast.flops_per_iteration(training.config, training.network, variables, training.dataset.image_shape)
    if step and processes.is_first():
        print(f"{title}: going on from iteration {step} of {training.total_steps}", flush=True)
    compiled, each = forecast.seconds_per_iteration(
        training.step_fn, training.state, training.buffer, training.data.at(step)
    )
    left = training.total_steps - step
    if processes.is_first():
        print(
            f"{title}: {devices.describe()}; {forecast.parameter_count(variables):,} parameters; "
            f"{flops / 1e9:,.3g} GFLOP an iteration; compiled in {compiled:.1f} s; {left} iterations will take about "
            f"{metrics.duration(left * each)}",
            flush=True,
        )


def _iterate(training: _Training) -> None:
    factor = recovery.learning_rate_factor(training.history, training.step)
    if factor != training.learning_rate_factor:
        training.learning_rate_factor = factor
        training.state = training.state._replace(learning_rate_factor=devices.replicate(np.float32(factor)))
    data = training.data.at(training.step)
    training.state, training.buffer = training.step_fn(training.state, training.buffer, data)
    training.step += 1


def _log(training: _Training, recorder: Recorder) -> None:
    """Reads the device's sums, the only place where the loop waits for it between checkpoints."""
    window = jax.device_get(training.state.window)
    epoch = round(training.step / training.steps_per_epoch, 4)
    means = {name: float(total) / int(window.steps) for name, total in window.sums.items()}
    recorder.progress(training.step, {"epoch": epoch, **means})


def _recovered(training: _Training, recorder: Recorder) -> bool:
    """Whether the run had diverged, and was put back to where it had not.

    All processes read the same alarm, and the first one looks for a checkpoint for all of them.

    Raises:
      UserError: it has diverged once too often.
    """
    settings = training.config.recovery
    alarm = divergence.alarm(training.state.watch)
    if alarm is None:
        return False
    training.checkpoints.finish()
    training.best.finish()
    folder = training.directory / workdir.CHECKPOINTS
    if len(training.history) >= settings.max_recoveries:
        ended = recovery.exhausted(alarm, training.history, max(checkpoint.steps(folder), default=None))
        recorder.end(training.step, recovery.final(alarm, training.history), str(ended))
        raise ended
    found = recovery.sound_checkpoints(folder) if processes.is_first() else []
    wanted = recovery.target(training.history, alarm.step + 1, found, settings.proof)
    back_to = int(processes.gather_strings(str(wanted))[0])
    best = checkpoint.steps(training.directory / workdir.BEST)
    last = Recovery(
        alarm.reason, alarm.step + 1, back_to, settings.learning_rate_factor, settings.chain_steps_factor,
        settings.iterations, settings.buffer, max(best, default=-1), training.best_accuracy, training.seconds,
    )  # fmt: skip
    training.close()
    with processes.fail_together():
        if processes.is_first():
            recovery.write(training.directory, (*training.history, last))
    _place(training)
    recorder.rewind(training.step, recovery.event(training.history, len(training.history)), recovery.in_words(last))
    return True


def _validate(training: _Training, recorder: Recorder) -> None:
    """Validation accuracy and NLL, and the best so far kept; nothing is ever chosen on the test set."""
    split = training.dataset.validation
    variables = training.state.evaluation_variables
    logits = training.logits_fn(variables, split.images, training.config.evaluation.batch_size)
    # The first process's: where rounding differs, two that each trust their own would not save together.
    accuracy = float(processes.gather_strings(repr(classification.accuracy(logits, split.labels)))[0])
    nll = classification.negative_log_likelihood(logits, split.labels)
    recorder.record(training.step, {"validation_accuracy": accuracy, "validation_nll": nll})
    if accuracy > training.best_accuracy:
        training.best_accuracy = accuracy
        kept = tree(checkpoint.to_tree(training.state), None)
        # After a recovery the best so far may bear the same number.
        training.best.replace(training.step, kept, {"validation_accuracy": accuracy})


def _draw_buffer(training: _Training) -> None:
    """A picture of chains spread evenly over this process's part of the buffer."""
    if training.buffer is None or not processes.is_first():
        return
    image_shape, devices_and_slots = training.dataset.image_shape, training.buffer.shape[:2]
    classes = training.buffer.shape[2] // math.prod(image_shape)
    count = math.prod(devices_and_slots) * classes
    chosen = np.linspace(0, count - 1, min(_PICTURED, count)).astype(int)
    slots = np.asarray(training.buffer[np.unravel_index(chosen // classes, devices_and_slots)])
    images = slots.reshape(len(chosen), classes, *image_shape)[np.arange(len(chosen)), chosen % classes]
    image_grid.save(image_grid.square(images), training.directory / workdir.SAMPLES / f"buffer_{training.step:07d}.png")


def _save(training: _Training) -> None:
    rows, image_shape = training.buffer, training.dataset.image_shape
    buffer = None if rows is None else devices.whole_buffer(rows, image_shape)
    whole = tree(checkpoint.to_tree(training.state), buffer)
    note = {"best_accuracy": training.best_accuracy, "seconds": training.seconds}
    training.checkpoints.save(training.step, whole, note, is_regular=training.saves(training.step))
