"""Training: everything that an iteration needs, and the loop."""

import dataclasses
import statistics
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
    keys,
    metrics,
    network,
    optimizer,
    parallel,
    pictures,
    replay_buffer,
    train_step,
    workdir,
)
from jem_jax.checkpoint import Checkpoints
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.datasets.batches import Stream
from jem_jax.datasets.splits import to_float
from jem_jax.errors import UserError
from jem_jax.evaluation import classification
from jem_jax.interrupts import Interrupted, Interrupts
from jem_jax.metrics import Recorder
from jem_jax.network import Network, Variables
from jem_jax.train_step import TrainingData, TrainState

Array = jax.Array
Step = Callable[[TrainState, Array | None, TrainingData], tuple[TrainState, Array | None]]

_TIMED_ITERATIONS = 5


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    network: Network
    variables: Variables
    """for evaluation: averaged parameters where there are any"""
    buffer: np.ndarray | None
    """[S, C, H, W, channels]"""
    steps: int
    seconds: float
    """of training, interrupted parts added up"""

    @property
    def has_negatives(self) -> bool:
        """Whether there was a density to learn, or a classifier alone."""
        return self.buffer is not None


@dataclass
class _Training:
    """One training's parts, and where it stands."""

    config: Config
    dataset: Dataset
    directory: Path
    network: Network
    step_fn: Step
    batches: "_Batches"
    total_steps: int
    state: TrainState
    buffer: Array | None
    checkpoints: Checkpoints
    best: Checkpoints
    best_accuracy: float
    seconds_before: float
    started: float
    logits: Callable[..., np.ndarray]

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


def train(config: Config, dataset: Dataset, directory: Path, title: str, interrupts: Interrupts) -> Trained:
    """Trains, or goes on with, the run in a directory until its last epoch.

    Args:
      config: `objective.p_x` and `p_xy` 0 make it a plain classifier.
      directory: gets checkpoints/, best/, samples/, metrics.jsonl and tensorboard/.
      title: stands before the progress bar.
      interrupts: asked after every iteration whether to stop.

    Raises:
      Interrupted: a signal came; everything is saved.
      UserError: sizes that do not fit, a damaged or foreign checkpoint, or an iteration that had to be undone.
    """
    training = _set_up(config, dataset, directory)
    first_step = int(training.state.step)
    recorder = Recorder(directory, title, first_step, training.total_steps, writes=parallel.is_first())
    try:
        if first_step < training.total_steps:
            _announce(training, recorder, title)
        for step in range(first_step, training.total_steps):
            training.state, training.buffer = training.step_fn(
                training.state, training.buffer, training.batches.at(step)
            )
            done = step + 1
            if done % config.training.log_every == 0 or done == training.total_steps:
                _log(training, recorder, done)
            if _due(training, done, config.training.validate_every):
                _validate(training, recorder, done)
            if _due(training, done, config.training.sample_every):
                _draw_buffer(training, done)
            if _due(training, done, config.training.checkpoint_every):
                _save(training, done)
            if interrupts.requested(done, training.checkpoints):
                _save(training, done)
                training.checkpoints.finish()
                raise Interrupted(done, training.total_steps)
        return _trained(training)
    finally:
        recorder.close()
        training.checkpoints.close()
        training.best.close()


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
    slots, classes = _buffer_size(config, num_classes)
    shape = (slots, classes, *image_shape)
    return state, jax.ShapeDtypeStruct(shape, jnp.float32) if slots else None


def _set_up(config: Config, dataset: Dataset, directory: Path) -> _Training:
    """Everything before the first iteration: built anew, then overwritten by the last checkpoint if there is one."""
    _check_sizes(config, dataset)
    directory.mkdir(parents=True, exist_ok=True)
    net = network.build(config.model, dataset.num_classes)
    network.check(net, dataset.image_shape, dataset.num_classes)
    batches = _Batches(config, dataset)
    rule = optimizer.build(config.optimizer, batches.steps_per_epoch)
    writes = parallel.is_first()
    restored = _restore(config, dataset, directory)
    note = {"best_accuracy": -1.0, "seconds": 0.0}
    buffer: np.ndarray | Array | None
    if restored is None:
        key = jax.random.key(config.seed)
        batch = jnp.asarray(to_float(dataset.train.images[batches.first_rows()]))
        state = jax.jit(lambda key, x: train_step.init_state(config, net, rule, key, x))(key, batch)
        buffer = _fresh_buffer(config, dataset, jax.random.fold_in(key, 2**31 - 2))
    else:
        state, buffer, note = restored
    logits = parallel.over_examples(lambda variables, images: net.logits(variables, to_float(images)))
    return _Training(
        config=config,
        dataset=dataset,
        directory=directory,
        network=net,
        step_fn=train_step.build(config, net, rule, dataset.num_classes),
        batches=batches,
        total_steps=config.training.epochs * batches.steps_per_epoch,
        state=parallel.replicate(state),
        buffer=None if buffer is None else parallel.shard(buffer),
        checkpoints=Checkpoints(directory / workdir.CHECKPOINTS, config.training.keep_checkpoints, writes),
        best=Checkpoints(directory / workdir.BEST, 1, writes),
        best_accuracy=note["best_accuracy"],
        seconds_before=note["seconds"],
        started=time.monotonic(),
        logits=logits,
    )


def _check_sizes(config: Config, dataset: Dataset) -> None:
    batch, devices = config.training.batch_size, parallel.count()
    if batch > len(dataset.train):
        raise UserError(f"config.training.batch_size {batch} is larger than the {len(dataset.train)} training images")
    if config.data.pad_mode == "reflect" and config.data.pad >= min(dataset.image_shape[:2]):
        raise UserError(f"config.data.pad {config.data.pad} must be less than the image's side to reflect")
    if batch % devices:
        raise UserError(_indivisible("config.training.batch_size", batch, devices, "devices"))
    slots, classes = _buffer_size(config, dataset.num_classes)
    if not slots:
        return
    size = config.sampler.buffer_size
    if size % (classes * devices):
        raise UserError(_indivisible("config.sampler.buffer_size", size, classes * devices, "classes × devices"))
    if slots < batch:
        raise UserError(
            f"config.sampler.buffer_size {size} gives {slots} slots a class, fewer than config.training.batch_size "
            f"{batch}; it must be at least {batch * classes}"
        )


def _indivisible(name: str, value: int, divisor: int, of: str) -> str:
    lower, upper = value // divisor * divisor, -(-value // divisor) * divisor
    nearest = f"{lower} or {upper}" if lower else f"{upper}"
    return f"{name} {value} is not divisible by {divisor} ({of}); the nearest that works: {nearest}"


def buffer_slots(config: Config, num_classes: int) -> int:
    """Slots of the replay buffer; 0 where the objective needs no negatives."""
    return _buffer_size(config, num_classes)[0]


def _buffer_size(config: Config, num_classes: int) -> tuple[int, int]:
    """Slots and class axis; no slots where the objective needs no negatives."""
    terms = train_step.weights(config)
    if not (terms.needs_negatives or terms.needs_conditional_negatives):
        return 0, 1
    classes = train_step.buffer_classes(config, num_classes)
    return config.sampler.buffer_size // classes, classes


def _fresh_buffer(config: Config, dataset: Dataset, key: Array) -> Array | None:
    slots, classes = _buffer_size(config, dataset.num_classes)
    if not slots:
        return None
    return jax.jit(
        lambda key: replay_buffer.init(keys.for_examples(key, slots), slots, dataset.image_shape, num_classes=classes)
    )(key)


def _restore(
    config: Config, dataset: Dataset, directory: Path
) -> tuple[TrainState, np.ndarray | None, dict[str, float]] | None:
    """The newest whole checkpoint; what is not whole is moved aside and named."""
    folder = directory / workdir.CHECKPOINTS
    step = usable_step(folder, directory)
    if step is None:
        return None
    state, buffer = template(config, dataset.image_shape, dataset.num_classes)
    found = checkpoint.restore(folder, tree(checkpoint.template_of(state), buffer), step)
    return checkpoint.from_tree(state, found.tree["state"]), found.tree.get("buffer"), found.note


def usable_step(folder: Path, root: Path) -> int | None:
    """The step of the newest whole checkpoint, after those that are not were moved aside; None where there is none.

    Raises:
      UserError: there are finished checkpoints, and all of them are damaged.
    """
    finished = checkpoint.steps(folder)
    faults = {}
    for step in reversed(finished):
        fault = checkpoint.damage(folder / str(step))
        if fault is None:
            break
        faults[step] = fault
    if finished and len(faults) == len(finished):
        step, fault = next(iter(faults.items()))
        raise UserError(
            f"checkpoint {folder / str(step)} is damaged ({fault}) and no other is left; "
            "restore it from a copy, or start anew with --overwrite"
        )
    if parallel.is_first():
        for path in [*checkpoint.unfinished(folder), *(folder / str(step) for step in faults)]:
            target = workdir.set_aside(path, root)
            why = faults.get(int(path.name), "it was never finished")
            print(f"checkpoint {path} is not used: {why}; moved to {target}", flush=True)
    parallel.wait("checkpoints")
    return max((step for step in finished if step not in faults), default=None)


def tree(state: Any, buffer: Any) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"state": state} if buffer is None else {"state": state, "buffer": buffer}


def _announce(training: _Training, recorder: Recorder, title: str) -> None:
    """Says what is about to run and how long it will take, timed on iterations whose result is thrown away."""
    started = time.monotonic()
    data = training.batches.at(int(training.state.step))
    buffer = None if training.buffer is None else jax.jit(jnp.copy)(training.buffer)
    state, buffer = training.step_fn(training.state, buffer, data)
    jax.block_until_ready(state)
    compiled = time.monotonic() - started
    times = []
    for _ in range(_TIMED_ITERATIONS):
        started = time.monotonic()
        state, buffer = training.step_fn(training.state, buffer, data)
        jax.block_until_ready(state)
        times.append(time.monotonic() - started)
    left = (training.total_steps - int(training.state.step)) * statistics.median(times)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(training.state.params))
    recorder.say(
        f"{title}: {parallel.describe()}; {parameters:,} parameters; {_flops(training):.3g} FLOP an iteration; "
        f"compiled in {compiled:.1f} s; {training.total_steps} iterations will take about {metrics.duration(left)}"
    )


def _flops(training: _Training) -> float:
    """Arithmetic of an iteration: a chain step is two forward passes' worth, a pass of the loss three."""
    config = training.config
    batch = config.training.batch_size
    x = jax.ShapeDtypeStruct((batch, *training.dataset.image_shape), jnp.float32)
    cost = jax.jit(training.network.logits).lower(training.state.evaluation_variables, x).cost_analysis()
    forward = float((cost or {}).get("flops", 0.0))
    terms = train_step.weights(config)
    chains = int(terms.needs_negatives) + int(terms.needs_conditional_negatives)
    passes = 1 + chains + int(terms.needs_negatives and not config.objective.share_batch)
    return forward * (2 * config.sampler.num_steps * chains + 3 * passes)


def _log(training: _Training, recorder: Recorder, step: int) -> None:
    """Reads the device's sums, the only place where the loop waits for it between checkpoints.

    Raises:
      UserError: an iteration since the last line was undone.
    """
    window = jax.device_get(training.state.window)
    count = int(window.steps)
    epoch = step / training.steps_per_epoch
    recorder.progress(step, {"epoch": round(epoch, 4), **{k: float(v) / count for k, v in window.sums.items()}})
    if window.bad_step >= 0:
        last = checkpoint.steps(training.directory / workdir.CHECKPOINTS)
        kept = f"the checkpoint of iteration {last[-1]} is kept" if last else "there is no checkpoint yet"
        raise UserError(
            f"training diverged at iteration {int(window.bad_step)}: loss, gradient or log p~ was not finite, or "
            f"|log p~| passed config.training.max_log_density; {kept}. A smaller learning rate or step size, or more "
            "SGLD steps, may help"
        )


def _due(training: _Training, step: int, epochs: int) -> bool:
    return step % (epochs * training.steps_per_epoch) == 0 or step == training.total_steps


def _validate(training: _Training, recorder: Recorder, step: int) -> None:
    """Validation accuracy and NLL, and the best so far kept; nothing is ever chosen on the test set."""
    split = training.dataset.validation
    variables = training.state.evaluation_variables
    logits = training.logits(variables, split.images, training.config.evaluation.batch_size)
    accuracy = classification.accuracy(logits, split.labels)
    nll = classification.negative_log_likelihood(logits, split.labels)
    recorder.record(step, {"validation_accuracy": accuracy, "validation_nll": nll})
    if accuracy > training.best_accuracy:
        training.best_accuracy = accuracy
        best = tree(checkpoint.to_tree(training.state), None)
        training.best.save(step, best, {"validation_accuracy": accuracy})


def _draw_buffer(training: _Training, step: int) -> None:
    """A picture of chains spread evenly over the buffer."""
    if training.buffer is None:
        return
    local = training.buffer.reshape(-1, *training.dataset.image_shape)
    chosen = np.asarray(local[np.linspace(0, len(local) - 1, min(100, len(local))).astype(int)])
    if parallel.is_first():
        pictures.save(pictures.square(chosen), training.directory / workdir.SAMPLES / f"buffer_{step:07d}.png")


def _save(training: _Training, step: int) -> None:
    buffer = None if training.buffer is None else parallel.whole(training.buffer)
    whole = tree(checkpoint.to_tree(training.state), buffer)
    training.checkpoints.save(step, whole, {"best_accuracy": training.best_accuracy, "seconds": training.seconds})


def _trained(training: _Training) -> Trained:
    variables = jax.device_get(training.state.evaluation_variables)
    buffer = None if training.buffer is None else parallel.gather(training.buffer)
    return Trained(training.network, variables, buffer, int(training.state.step), training.seconds)


class _Batches:
    """The images on every device, and each epoch's order put there once."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        split, batch_size = dataset.train, config.training.batch_size
        self._streams = [Stream(config.seed, i, len(split), batch_size) for i in range(2)]
        self._images, self._labels = parallel.replicate((split.images, split.labels))
        self._orders: dict[int, tuple[int, Array]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Iterations of an epoch of the p(x) stream."""
        return self._streams[0].steps_per_epoch

    def first_rows(self) -> np.ndarray:
        """The rows of the first batch of the p(x) stream."""
        stream = self._streams[0]
        order = stream.order(0)
        return order[: len(order) // stream.steps_per_epoch]

    def at(self, step: int) -> TrainingData:
        """What the iteration gathers its batches from."""
        return TrainingData(self._images, self._labels, *(self._order(i, step) for i in range(2)))

    def _order(self, stream: int, step: int) -> Array:
        epoch = step // self._streams[stream].steps_per_epoch
        if stream not in self._orders or self._orders[stream][0] != epoch:
            self._orders[stream] = (epoch, parallel.replicate(self._streams[stream].order(epoch)))
        return self._orders[stream][1]
