"""The training loop: iterations, logging, validation, checkpoints, and going back after a divergence."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jem_jax.augment import to_float
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices, processes
from jem_jax.distributed.interrupts import Interrupted, Interrupts
from jem_jax.evaluation import classification
from jem_jax.runs import checkpoint, image_grid, metrics, workdir
from jem_jax.runs.checkpoint import Checkpoints
from jem_jax.runs.metrics import Recorder
from jem_jax.training import divergence, forecast, network, optimizer, preflight, recovery, schedule, statistics
from jem_jax.training.network import Variables
from jem_jax.training.recovery import History, Recovery
from jem_jax.training.schedule import Program
from jem_jax.training.setup import Setup, prepare
from jem_jax.training.state import TrainState
from jem_jax.training.statistics import COLLECTION
from jem_jax.training.step import Step
from jem_jax.training.trained import template, tree

Array = jax.Array

_PICTURED = 100
_AT_THE_START = {"best_accuracy": -1.0, "seconds": 0.0}


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
    setup: Setup
    estimate_statistics: Callable[[Variables], Any] | None
    """re-estimates batch statistics; None where the network keeps none, or evaluation uses the running ones"""
    compilers: ThreadPoolExecutor
    compiling: dict[Program, Future[Step]] = field(default_factory=dict)
    """the steps, which are compiled beside other work"""
    compiling_since: float = field(init=False)
    statistics_of: int | None = None
    """the iteration at which batch norm's statistics were last re-estimated; None: unknown"""
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
    def total_steps(self) -> int:
        return self.setup.total_steps

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @property
    def program(self) -> Program:
        """The next iteration's program: its phase's, with more chain steps after a recovery."""
        program = schedule.phase_at(self.setup.phases, self.step).program
        return program._replace(num_steps=recovery.chain_steps(program.num_steps, self.history, self.step))

    @property
    def programs_to_come(self) -> list[Program]:
        """The next iteration's, and those of later phases."""
        later = {phase.program: None for phase in self.setup.phases if phase.first > self.step}
        return list({self.program: None} | later)

    @property
    def step_fn(self) -> Step:
        """The compiled step of the next iteration."""
        program = self.program
        if program not in self.compiling:
            self.begin_compiling([program])
        return self.compiling[program].result()

    def begin_compiling(self, programs: Collection[Program]) -> None:
        """Begins to compile those of the programs that are not; each is checked to return what a checkpoint can hold.

        It needs shapes alone, so that the first state and buffer can be made meanwhile.
        """
        missing = [program for program in programs if program not in self.compiling]
        if not missing:
            return
        self.compiling_since = time.monotonic()
        state, buffer = template(self.config, self.dataset.image_shape, self.dataset.num_classes)
        rows, data = None if buffer is None else devices.rows_of(buffer), self.setup.data.at(self.step)
        for program in missing:
            traced = preflight.trace(self.setup.step(program), state, rows, data)
            self.compiling[program] = self.compilers.submit(traced.compile)

    @functools.cached_property
    def learning_rate(self) -> Callable[[int], Array]:
        """That of an iteration, before a recovery's factor."""
        shape = self.config.schedule.learning_rate
        return devices.once(
            optimizer.schedule(self.config.optimizer, self.setup.steps_per_epoch, shape, self.total_steps)
        )

    @property
    def freezes_at(self) -> int | None:
        """The iteration from which on batch norm is frozen."""
        return next((phase.first for phase in self.setup.phases if phase.program.frozen), None)

    def due(self, step: int, epochs: int) -> bool:
        return step % (epochs * self.setup.steps_per_epoch) == 0 or step == self.total_steps

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
      config: one that passed `preflight.check`; `objective.p_x` and `p_xy` 0 make it a plain classifier.
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
        _compile_and_announce(training, title)
        events = recovery.events(training.history)
        recorder = Recorder(directory, title, training.step, training.total_steps, events, writes=processes.is_first())
        stack.callback(recorder.close)
        while training.step < training.total_steps:
            _iterate(training)
            done, every = training.step, config.training
            validates, pictures = training.due(done, every.validate_every), training.due(done, every.sample_every)
            if training.logs(done):
                _log(training, recorder)
            # Check for divergence before saving anything.
            looks = training.logs(done) or validates or pictures or training.saves(done)
            if looks and _recover_if_diverged(training, recorder):
                continue
            if validates:
                _validate(training, recorder)
            if pictures:
                _save_buffer_picture(training)
            if training.saves(done):
                _save(training)
            if interrupts.requested(done, every.log_every) and not _recover_if_diverged(training, recorder):
                _save(training)
                training.checkpoints.finish()
                raise Interrupted(done, training.total_steps)
        training.checkpoints.finish()
        training.best.finish()
        return Trained(training.total_steps, training.seconds)


def _set_up(config: Config, dataset: Dataset, directory: Path, stack: contextlib.ExitStack) -> _Training:
    """Everything before the first iteration: begun anew, or from the last checkpoint if there is one.

    Args:
      stack: closes what was opened.
    """
    directory.mkdir(parents=True, exist_ok=True)
    setup = prepare(config, dataset)
    stack.callback(setup.data.close)
    training = _Training(
        config=config,
        dataset=dataset,
        directory=directory,
        setup=setup,
        estimate_statistics=_statistics_estimator(setup),
        compilers=stack.enter_context(ThreadPoolExecutor()),
    )
    training.started = time.monotonic()
    training.seconds_before = _begin_or_resume(training)["seconds"]
    stack.callback(training.close)
    return training


def _begin_or_resume(training: _Training) -> dict[str, float]:
    """Brings a training to its newest checkpoint, or the start, after finishing a recovery that was cut off.

    Returns:
      The checkpoint's note.
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
    restored = _newest_checkpoint(config, dataset, directory, history)
    training.step, training.history = 0 if restored is None else int(restored[0].step), history
    if restored is None and not config.training.init_from:
        training.begin_compiling(training.programs_to_come)
    state, buffer, note = (*training.setup.begin(), dict(_AT_THE_START)) if restored is None else restored
    if history and training.step <= history[-1].back_to:
        key = recovery.key(jax.random.key(config.seed), len(history))
        state = state._replace(key=key, watch=divergence.initial_watch())
        note = {"best_accuracy": history[-1].best_accuracy, "seconds": history[-1].seconds}
    training.statistics_of = None
    training.learning_rate_factor = recovery.learning_rate_factor(history, training.step)
    training.state = devices.replicate(state._replace(learning_rate_factor=jnp.float32(training.learning_rate_factor)))
    training.buffer = None if buffer is None else devices.shard_buffer(buffer)
    writes, settings = processes.is_first(), config.training
    training.best = Checkpoints(directory / workdir.BEST, 1, writes)
    training.checkpoints = Checkpoints(
        directory / workdir.CHECKPOINTS,
        settings.keep_checkpoints,
        writes,
        to_keep=lambda steps, regular: recovery.to_keep(steps, settings.keep_checkpoints, regular, training.history),
        after=training.best,
    )
    training.best_accuracy = note["best_accuracy"]
    return note


def _newest_checkpoint(
    config: Config, dataset: Dataset, directory: Path, history: History
) -> tuple[TrainState, Any, dict[str, float]] | None:
    """The newest whole checkpoint, after later ones were moved out of its way; None where there is none."""
    best_before = history[-1].best_step if history else -1
    folder, best = directory / workdir.CHECKPOINTS, directory / workdir.BEST
    # Finding a checkpoint whole means reading all of it, so the first process alone does it.
    with processes.fail_together():
        step, faults = checkpoint.newest_whole(folder) if processes.is_first() else (None, {})
    step = json.loads(processes.gather_strings(json.dumps(step))[0])
    if processes.is_first():
        for path, fault in faults.items():
            target = checkpoint.set_aside(path, directory / workdir.SET_ASIDE)
            print(f"checkpoint {path} is not used: {fault}; moved to {target}", flush=True)
        for later in checkpoint.steps(best):
            if later > (step or 0) and later != best_before:
                checkpoint.set_aside(best / str(later), directory / workdir.SET_ASIDE)
        for path in checkpoint.unfinished(best):
            checkpoint.set_aside(path, directory / workdir.SET_ASIDE)
    processes.wait("checkpoints")
    if step is None:
        return None
    state, buffer = template(config, dataset.image_shape, dataset.num_classes)
    buffer = None if buffer is None else devices.spread(buffer)
    restored = checkpoint.restore(folder, tree(checkpoint.template_of(state), buffer), step, checked=True)
    return checkpoint.from_tree(state, restored.tree["state"]), restored.tree.get("buffer"), restored.note


def _compile_and_announce(training: _Training, title: str) -> None:
    """Compiles all programs to come, and says what is about to run and how long it will take."""
    step, setup, data = training.step, training.setup, training.setup.data.at(training.step)
    if step and processes.is_first():
        print(f"{title}: going on from iteration {step} of {training.total_steps}", flush=True)
    few = preflight.few_images(training.config, training.state.model_state)
    for warning in (few, preflight.long_warmup(training.config, training.total_steps)):
        if warning and processes.is_first():
            print(f"{title}: {warning}", flush=True)
    training.begin_compiling(training.programs_to_come)
    # While the compiler works.
    phases = [phase for phase in setup.phases if phase.first > step]
    # The program of each stretch of iterations, and where it ends.
    programs = [training.program, *(phase.program for phase in phases)]
    edges = [step, *(phase.first for phase in phases), training.total_steps]
    variables = training.state.evaluation_variables
    flops = forecast.flops_per_iteration(
        training.config, setup.network, variables, training.dataset.image_shape, programs[-1]
    )
    steps = {program: compiling.result() for program, compiling in training.compiling.items()}
    compiled = time.monotonic() - training.compiling_since
    seconds = {
        program: forecast.seconds_per_iteration(step_fn, training.state, training.buffer, data)
        for program, step_fn in steps.items()
    }
    left = sum(
        (end - first) * seconds[program] for program, first, end in zip(programs, edges, edges[1:], strict=False)
    )
    if processes.is_first():
        several = f"{len(seconds)} programs " if len(seconds) > 1 else ""
        print(
            f"{title}: {devices.describe()}; {forecast.parameter_count(variables):,} parameters; "
            f"{flops / 1e9:,.3g} GFLOP an iteration; {several}compiled in {compiled:.1f} s; "
            f"{training.total_steps - step} iterations will take about {metrics.duration(left)}",
            flush=True,
        )


def _iterate(training: _Training) -> None:
    factor = recovery.learning_rate_factor(training.history, training.step)
    if factor != training.learning_rate_factor:
        training.learning_rate_factor = factor
        training.state = training.state._replace(learning_rate_factor=devices.replicate(np.float32(factor)))
    if training.step == training.freezes_at:
        _freeze(training)
    data = training.setup.data.at(training.step)
    training.state, training.buffer = training.step_fn(training.state, training.buffer, data)
    training.step += 1


def _log(training: _Training, recorder: Recorder) -> None:
    """Reads the device's sums, the only place where the loop waits for it between checkpoints."""
    window = jax.device_get(training.state.window)
    epoch = round(training.step / training.setup.steps_per_epoch, 4)
    means = {name: float(total) / int(window.steps) for name, total in window.sums.items()}
    if not schedule.phase_at(training.setup.phases, training.step - int(window.steps)).program.needs_samples:
        # Iterations without samples make the means of what is said of samples NaN.
        means = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    recorder.progress(training.step, {"epoch": epoch, **means, **_scheduled(training)})


def _scheduled(training: _Training) -> dict[str, float]:
    """The settings that the schedule gave the iteration just done, as far as they change."""
    settings, step, total = training.config.schedule, training.step - 1, training.total_steps
    values = {"learning_rate": float(training.learning_rate(step)) * training.learning_rate_factor}
    if settings.p_x_start or settings.p_x_ramp:
        values["p_x_factor"] = float(schedule.p_x_factor(settings, total, step))
    if settings.num_steps:
        values["num_steps"] = schedule.phase_at(training.setup.phases, step).program.num_steps
    return values


def _freeze(training: _Training) -> None:
    """Gives batch norm the statistics that it keeps from here on: re-estimated ones of the parameters as they are."""
    if training.estimate_statistics is not None:
        frozen = training.estimate_statistics(training.state.variables)
        model_state = {**training.state.model_state, COLLECTION: frozen}
        training.state = training.state._replace(model_state=devices.replicate(model_state))


def _reestimate(training: _Training) -> None:
    """Gives the state the batch statistics of the parameters that are evaluated."""
    # A validation and a checkpoint often fall on the same iteration.
    if training.estimate_statistics is None or training.statistics_of == training.step:
        return
    state = training.state
    if schedule.phase_at(training.setup.phases, training.step - 1).program.frozen:
        statistics = state.model_state[COLLECTION]
    else:
        statistics = training.estimate_statistics(state.evaluation_variables)
    training.state = state._replace(evaluation_stats=devices.replicate(statistics))
    training.statistics_of = training.step


def _statistics_estimator(setup: Setup) -> Callable[[Variables], Any] | None:
    count = setup.config.training.statistics_images
    shapes = jax.eval_shape(
        setup.network.init, jax.random.key(0), jax.ShapeDtypeStruct((2, *setup.dataset.image_shape), jnp.float32)
    )
    if not count or not statistics.has_statistics(shapes):
        return None
    return statistics.estimator(setup.network, setup.dataset.train, count, setup.config.seed)


def _recover_if_diverged(training: _Training, recorder: Recorder) -> bool:
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
    sound = recovery.sound_checkpoints(folder) if processes.is_first() else []
    back_to = int(processes.gather_strings(str(recovery.target(training.history, alarm.step + 1, sound)))[0])
    best = checkpoint.steps(training.directory / workdir.BEST)
    last = Recovery(
        alarm.reason, alarm.step + 1, back_to, settings.learning_rate_factor, settings.chain_steps_factor,
        max(best, default=-1), training.best_accuracy, training.seconds,
    )  # fmt: skip
    training.close()
    with processes.fail_together():
        if processes.is_first():
            recovery.write(training.directory, (*training.history, last))
    _begin_or_resume(training)
    recorder.rewind(training.step, recovery.events(training.history)[-1], recovery.in_words(last))
    return True


def _validate(training: _Training, recorder: Recorder) -> None:
    """Validation accuracy and NLL, and the best so far kept; nothing is ever chosen on the test set."""
    split = training.dataset.validation
    _reestimate(training)
    variables = training.state.evaluation_variables
    batch_size = training.config.evaluation.batch_size
    logits, _ = network.describe(training.setup.network, variables, to_float(split.images), batch_size)
    # The first process's: where rounding differs, two that each trust their own would not save together.
    accuracy = float(processes.gather_strings(repr(classification.accuracy(logits, split.labels)))[0])
    nll = classification.negative_log_likelihood(logits, split.labels)
    recorder.record(training.step, {"validation_accuracy": accuracy, "validation_nll": nll})
    if accuracy > training.best_accuracy:
        training.best_accuracy = accuracy
        # After a recovery the best so far may be of the same iteration.
        best = tree(checkpoint.to_tree(training.state), None)
        training.best.replace(training.step, best, {"validation_accuracy": accuracy})


def _save_buffer_picture(training: _Training) -> None:
    """A picture of chains spread evenly over this process's part of the buffer."""
    if training.buffer is None or not processes.is_first():
        return
    image_shape, devices_and_slots = training.dataset.image_shape, training.buffer.shape[:2]
    classes = math.prod(training.buffer.shape[2:]) // math.prod(image_shape)
    count = math.prod(devices_and_slots) * classes
    chosen = np.linspace(0, count - 1, min(_PICTURED, count)).astype(int)
    slots = np.asarray(training.buffer[np.unravel_index(chosen // classes, devices_and_slots)])
    images = slots.reshape(len(chosen), classes, *image_shape)[np.arange(len(chosen)), chosen % classes]
    image_grid.save(image_grid.square(images), training.directory / workdir.SAMPLES / f"buffer_{training.step:07d}.png")


def _save(training: _Training) -> None:
    _reestimate(training)
    rows, image_shape = training.buffer, training.dataset.image_shape
    buffer = None if rows is None else devices.whole_buffer(rows, image_shape)
    whole = tree(checkpoint.to_tree(training.state), buffer)
    note = {"best_accuracy": training.best_accuracy, "seconds": training.seconds}
    training.checkpoints.save(training.step, whole, note, is_regular=training.saves(training.step))
