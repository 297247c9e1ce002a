"""Every setting there is: its default, its range and its meaning, in one place.

`default()` gives an `ml_collections.ConfigDict` for config files and flags to override; `validate` turns such a
ConfigDict into frozen dataclasses, or says in one line which key is wrong and what would be right. Functions of this
package take the dataclasses.
"""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_collections

from jem_jax.common.errors import UserError, shown

_MOST_NUMBERS = 100
"""in a tuple"""
_TRAINING_ALONE = ("objective", "optimizer", "schedule", "training", "recovery", "evaluation")
"""groups of settings that a trained network's logits do not depend on"""


def _setting(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    example: tuple[float, ...] = (),
) -> Any:
    """A dataclass field with its range: low <= value <= high, value > above, or one of choices.

    `example` is what a tuple may be whose default is empty.
    """
    metadata = {"meaning": meaning, "low": low, "above": above, "high": high, "choices": choices, "example": example}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Data:
    """The data."""

    name: str = _setting(
        "digits",
        "digits | cifar10 | cifar100 | svhn_cropped | mnist | fashion_mnist | tfds:NAME | the path of an .npz, or of a "
        "folder of class folders of images",
    )
    image_size: int = _setting(0, "resize images to this side, a multiple of 4; 0: as they are", low=0, high=4096)
    data_dir: str = _setting("", "where downloads and prepared data are kept; empty: TFDS's folder")
    manual_dir: str = _setting("", "folder of archives that were fetched by hand; empty: they are downloaded")
    place: str = _setting(
        "auto", "where training images live; auto: on each device if they fit", choices=("auto", "device", "host")
    )
    labels_per_class: int = _setting(0, "labels of each class that p(y | x) learns from; 0: all", low=0, high=10**9)
    labels_seed: int = _setting(0, "which labels those are", low=0, high=2**31 - 1)
    pad: int = _setting(1, "augmentation: pad by so many pixels, then crop at random", low=0, high=64)
    pad_mode: str = _setting("constant", "what is padded; constant is -1", choices=("constant", "reflect"))
    flip: bool = _setting(False, "augmentation: mirror half of the images left to right")
    input_noise: float = _setting(0.03, "standard deviation of Gaussian noise on training images", low=0, high=10)
    augment_p_x: bool = _setting(True, "the images of p(x) are shifted and mirrored too; input noise they get anyhow")


@dataclass(frozen=True)
class Model:
    """The network: a wide residual network, or any Flax module that gives logits."""

    factory: str = _setting("", "package.module:function, called with num_classes, that returns a Flax module")
    depth: int = _setting(10, "6n + 4; deeper ones take too long to compile", low=10, high=100)
    width: int = _setting(1, "widening factor", low=1, high=64)
    norm: str = _setting("none", "norm layer", choices=("none", "batch", "instance", "layer", "act"))
    activation: str = _setting(
        "leaky_relu", "activation function; JEM's is leaky_relu", choices=("leaky_relu", "swish", "softplus")
    )
    dropout: float = _setting(0.0, "probability of dropping a unit while training", low=0, high=0.99)
    dtype: str = _setting("float32", "precision of the network's computation", choices=("float32", "bfloat16"))
    norm_momentum: float = _setting(
        0.9, "weight of the newest batch in batch norm's running statistics, as PyTorch's momentum", above=0, high=1
    )


@dataclass(frozen=True)
class Sampler:
    """SGLD and the replay buffer."""

    num_steps: int = _setting(20, "SGLD steps of an iteration, K", low=1, high=100_000)
    step_size: float = _setting(1.0, "factor of the score in a step", above=0, high=1e6)
    noise_std: float = _setting(0.01, "standard deviation of a step's noise", low=0, high=100)
    reinit_prob: float = _setting(0.05, "probability that a chain starts afresh", low=0, high=1)
    buffer_size: int = _setting(10_000, "chains in the replay buffer, all classes together", low=1, high=10**9)
    grad_clip: float = _setting(0.0, "clip the score to ± this, element by element; 0: not at all", low=0, high=1e6)
    clip_x: bool = _setting(False, "clip x to [-1, 1] after every step")
    class_conditional: bool = _setting(False, "chains for p(x) draw a class and follow its logit")
    unroll: int = _setting(
        1,
        "SGLD steps that the compiler lays out one after another; changes speed, and multiplies the compile time",
        low=1,
        high=20,
    )
    init: str = _setting(
        "uniform",
        "where chains start: uniform is U(-1, 1); class_gaussians, a Gaussian of each class's training images",
        choices=("uniform", "class_gaussians"),
    )
    batch_statistics: bool = _setting(
        False, "while training, batch norm in the chain uses the statistics of the chains rather than the running ones"
    )


@dataclass(frozen=True)
class Objective:
    """Weights of the joint loss."""

    p_x: float = _setting(1.0, "weight of log p(x); 0 with p_xy 0: a plain classifier", low=0, high=1e6)
    p_y_given_x: float = _setting(1.0, "weight of log p(y | x), the cross-entropy", low=0, high=1e6)
    p_xy: float = _setting(0.0, "weight of log p(x, y), the other factorisation", low=0, high=1e6)
    energy_l2: float = _setting(0.0, "weight of the mean squared energies of data and samples", low=0, high=1e6)
    share_batch: bool = _setting(False, "the labelled batch is the p(x) batch: one forward pass less")


@dataclass(frozen=True)
class Optimizer:
    """optax: the update rule and its schedule."""

    name: str = _setting("adam", "update rule", choices=("adam", "sgd"))
    learning_rate: float = _setting(1e-4, "after warm-up, before decay", above=0, high=100)
    beta1: float = _setting(0.9, "Adam's decay of the first moment", low=0, high=0.999999)
    beta2: float = _setting(0.999, "Adam's decay of the second moment", low=0, high=0.9999999)
    momentum: float = _setting(0.9, "of sgd", low=0, high=0.999999)
    weight_decay: float = _setting(0.0, "L2 penalty's gradient, added before the rule as PyTorch does", low=0, high=10)
    warmup_steps: int = _setting(0, "linear from 0 over so many iterations", low=0, high=10**9)
    decay_epochs: tuple[float, ...] = _setting(
        (), "the learning rate is multiplied at these epochs", above=0, high=1e9, example=(20, 30)
    )
    decay_factor: float = _setting(0.3, "by this", above=0, high=1)
    clip_norm: float = _setting(
        0.0, "largest norm of the whole gradient; a longer one is scaled down; 0: no limit", low=0, high=1e6
    )
    ema_decay: float = _setting(0.0, "decay of averaged parameters for evaluation; 0: none", low=0, high=0.9999999)
    sam_rho: float = _setting(0.0, "radius of sharpness-aware minimisation; 0: off", low=0, high=1000)
    sam_adaptive: bool = _setting(False, "measure that radius relative to each parameter's size (ASAM)")


@dataclass(frozen=True)
class Schedule:
    """Settings that change while a run goes on. A share is a fraction of all its iterations."""

    learning_rate: str = _setting(
        "steps",
        "after warm-up: steps, at optimizer.decay_epochs; linear or cosine, to 0 at the end; one_cycle, up over the "
        "first three tenths and then down to 0",
        choices=("steps", "linear", "cosine", "one_cycle"),
    )
    p_x_start: float = _setting(
        0.0, "share of iterations before p(x) is learned: cross-entropy alone", low=0, high=0.99
    )
    p_x_ramp: float = _setting(0.0, "share over which the weight of p(x) then rises from 0", low=0, high=1)
    num_steps: tuple[float, ...] = _setting(
        (),
        "share, K, share, K …: SGLD steps from each share on, such as (0.1, 1, 0.3, 5); sampler.num_steps before the "
        "first",
        low=0,
        high=100_000,
        example=(0.1, 1, 0.3, 5),
    )
    sam_start: float = _setting(0.0, "share from which on optimizer.sam_rho is used", low=0, high=0.99)
    freeze_norm: float = _setting(
        1.0,
        "share from which on batch norm's statistics stay as they are, re-estimated there; 1: never",
        above=0,
        high=1,
    )

    @property
    def chain_steps(self) -> tuple[tuple[float, int], ...]:
        """(share, K) pairs of `num_steps`."""
        return tuple(
            (share, int(steps)) for share, steps in zip(self.num_steps[::2], self.num_steps[1::2], strict=True)
        )

    @property
    def by_progress(self) -> str | None:
        """A setting here whose effect depends on the run's length; None where there is none."""
        if self.learning_rate != "steps":
            return "learning_rate"
        changed = [name for name in ("p_x_start", "p_x_ramp", "num_steps", "sam_start") if getattr(self, name)]
        return next(iter(changed), "freeze_norm" if self.freeze_norm < 1 else None)


class BatchSizes(NamedTuple):
    """Images of an iteration, all devices together."""

    p_x: int
    """of the p(x) stream, over all images"""
    labelled: int
    """of the labelled stream"""


@dataclass(frozen=True)
class Training:
    """Batches, length, devices, checkpoints and logs."""

    batch_size: int = _setting(64, "images of each branch in an iteration, all devices together", low=1, high=10**6)
    labelled_batch_size: int = _setting(0, "images of the p(y | x) branch; 0: as many as of p(x)", low=0, high=10**6)
    epochs: int = _setting(40, "passes over the training images, by the larger of the two batches", low=1, high=10**6)
    cpu_devices: int = _setting(0, "devices of a CPU; 0: the most of 4, 2, 1 that fit cores and sizes", low=0, high=256)
    init_from: str = _setting(
        "",
        "start from the parameters and batch statistics of a workdir or a model folder, and from its replay buffer "
        "where that has this run's shape; the classifier beside it starts from scratch",
    )
    baseline: bool = _setting(True, "train a plain classifier of the same shape beside it")
    statistics_images: int = _setting(
        2000,
        "plain training images from which batch norm's statistics are re-estimated before each validation and "
        "checkpoint; 0: evaluate with the running ones",
        low=0,
        high=10**9,
    )
    log_every: int = _setting(20, "iterations between two lines of metrics.jsonl", low=1, high=10**9)
    validate_every: int = _setting(2, "epochs between two validations", low=1, high=10**6)
    sample_every: int = _setting(10, "epochs between two pictures of the buffer", low=1, high=10**6)
    checkpoint_every: int = _setting(2, "epochs between two checkpoints", low=1, high=10**6)
    keep_checkpoints: int = _setting(
        2,
        "how many of the last checkpoints are kept at least; more until one has proved good, which takes 50 iterations",
        low=2,
        high=1000,
    )
    max_log_density: float = _setting(
        1e6,
        "an iteration where |log p~| of an image passes this is undone, and the run has diverged; its means stay below "
        "100 in healthy runs",
        above=0,
        high=1e30,
    )

    @property
    def batch_sizes(self) -> BatchSizes:
        """Images of an iteration in each stream."""
        return BatchSizes(self.batch_size, self.labelled_batch_size or self.batch_size)


@dataclass(frozen=True)
class Recovery:
    """When a run counts as diverged, and what is done then."""

    max_recoveries: int = _setting(
        5, "times that a run goes back to a good checkpoint; the next divergence ends it", low=0, high=1000
    )
    patience: int = _setting(
        10,
        "iterations on end that a gap, a collapse, a saturation or a forgotten classifier lasts before the run has "
        "diverged; few, since a Fashion-MNIST run went from a gap of 0.1 nats to 1e6 within 45 iterations",
        low=1,
        high=10**6,
    )
    max_gap: float = _setting(
        100.0,
        "gap: |mean log p~(data) - mean log p~(samples)| is larger than this, in nats, or than p_x / energy_l2 / 2; "
        "healthy runs have less than 5",
        above=0,
        high=1e9,
    )
    learning_rate_factor: float = _setting(
        0.5, "after a divergence the learning rate is multiplied by this for 1000 iterations", above=0, high=1
    )
    chain_steps_factor: float = _setting(
        2.0,
        "factor of the chain steps for 1000 iterations after a divergence; those of several multiply, up to 8",
        low=1,
        high=100,
    )


@dataclass(frozen=True)
class Evaluation:
    """The report's measurements."""

    batch_size: int = _setting(500, "images at a time", low=1, high=10**6)
    ece_bins: int = _setting(15, "equal-width bins of the expected calibration error", low=1, high=1000)
    num_samples: int = _setting(100, "samples that are drawn", low=1, high=10**6)
    sample_steps: int = _setting(
        0,
        "SGLD steps of a chain that starts afresh; 0: 1000, or 6 times sampler.num_steps with sampler.batch_statistics",
        low=0,
        high=10**7,
    )
    inception_weights: str = _setting(
        "", "torch-fidelity's file of Inception-v3, for FID and Inception score of the buffer; empty: neither"
    )
    sections: str = _setting("all", "sections of the report, separated by commas; all: every one")
    ood_images: int = _setting(
        2000, "images of each out-of-distribution set, and test images beside them", low=10, high=10**6
    )
    ood_sets: str = _setting("", "more such sets, separated by commas: names as of data.name")
    attack_images: int = _setting(200, "test images that are attacked", low=1, high=10**6)
    attack_steps: int = _setting(20, "steps of PGD", low=1, high=10**5)
    attack_restarts: int = _setting(1, "random starts of PGD, the best for each image", low=1, high=1000)
    attack_linf: tuple[float, ...] = _setting(
        (0.004, 0.008, 0.016, 0.03, 0.06), "ε of the L-inf attack, in [0, 1] pixels", above=0, high=1
    )
    attack_l2: tuple[float, ...] = _setting(
        (0.1, 0.25, 0.5, 1.0, 2.0), "ε of the L2 attack, in [0, 1] pixels", above=0, high=1000
    )
    refined_images: int = _setting(20, "test images attacked through SGLD refinement", low=1, high=10**6)
    refined_linf: tuple[float, ...] = _setting(
        (0.008, 0.03), "ε of the L-inf attack through refinement, in [0, 1] pixels", above=0, high=1
    )

    @property
    def ood_set_names(self) -> list[str]:
        """Names of the out-of-distribution sets that are not made from the test images."""
        return [name.strip() for name in self.ood_sets.split(",") if self.ood_sets]


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    objective: Objective = dataclasses.field(default_factory=Objective)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    training: Training = dataclasses.field(default_factory=Training)
    recovery: Recovery = dataclasses.field(default_factory=Recovery)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    seed: int = _setting(0, "of everything random", low=0, high=2**31 - 1)


def default() -> ml_collections.ConfigDict:
    """The defaults, for a config file to override: `config = default(); config.sampler.num_steps = 40`."""
    return ml_collections.ConfigDict(as_dict(Config()))


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as nested dicts of plain values."""
    return dataclasses.asdict(config)


def stored(settings: Mapping[str, Any]) -> Config:
    """Settings that an earlier version may have written.

    Settings that were removed since are left out, unless a trained network depends on them. Errors are those of
    `validate`.
    """
    known = as_dict(Config())
    groups = {
        group: {name: value for name, value in settings.get(group, {}).items() if name in known[group]}
        for group in _TRAINING_ALONE
    }
    return validate({**settings, **groups})


def validate(settings: Mapping[str, Any]) -> Config:
    """Frozen, validated settings.

    Args:
      settings: a ConfigDict or nested mapping; what it leaves out keeps its default.

    Raises:
      UserError: an unknown key, a wrong type, a value out of range, or settings that contradict each other.
    """
    config = _build(Config, settings, "")
    objective, model = config.objective, config.model
    if not model.factory and (model.depth - 4) % 6:
        raise UserError(f"config.model.depth must be 6n + 4 (10, 16, 22, 28, …), not {model.depth}")
    if not (objective.p_x or objective.p_y_given_x or objective.p_xy):
        raise UserError("config.objective: every weight is 0; set p_x, p_y_given_x or p_xy above 0")
    if objective.share_batch:
        _check_shared_batch(config)
    if config.sampler.batch_statistics and not model.factory and model.norm != "batch":
        raise UserError(f"config.sampler.batch_statistics needs config.model.norm=batch, not {model.norm}")
    if config.sampler.buffer_size < config.training.batch_size and (objective.p_x or objective.p_xy):
        raise UserError(
            f"config.sampler.buffer_size {config.sampler.buffer_size} is smaller than config.training.batch_size "
            f"{config.training.batch_size}; it must be at least as large"
        )
    _check_schedule(config)
    if not all(config.evaluation.ood_set_names):
        more = config.evaluation.ood_sets
        raise UserError(f"config.evaluation.ood_sets must be names separated by commas, not {shown(more)}")
    return config


def _check_shared_batch(config: Config) -> None:
    """A shared batch is one batch: the two branches must not differ in anything."""
    p_x, labelled = config.training.batch_sizes
    for wrong, reason in (
        (config.data.labels_per_class, "config.data.labels_per_class leaves some out"),
        (p_x != labelled, f"config.training.labelled_batch_size is {labelled} and batch_size {p_x}"),
        (not config.data.augment_p_x, "config.data.augment_p_x is false"),
    ):
        if wrong:
            raise UserError(f"config.objective.share_batch must be false where {reason}")


def _check_schedule(config: Config) -> None:
    """Checks the schedule's settings against each other and the rest."""
    schedule, name = config.schedule, "config.schedule"
    pairs = schedule.num_steps
    if len(pairs) % 2 or any(steps < 1 or steps != int(steps) for steps in pairs[1::2]):
        raise UserError(f"{name}.num_steps must be shares, each with a whole K of at least 1, not {pairs}")
    shares = pairs[::2]
    if any(share >= 1 for share in shares) or list(shares) != sorted(set(shares)):
        raise UserError(f"{name}.num_steps must have increasing shares below 1, not {shares}")
    if schedule.learning_rate != "steps" and config.optimizer.decay_epochs:
        raise UserError(
            f"config.optimizer.decay_epochs goes with {name}.learning_rate=steps, not {schedule.learning_rate}; set it "
            "to ()"
        )
    if schedule.p_x_start + schedule.p_x_ramp > 1:
        raise UserError(f"{name}.p_x_start and p_x_ramp must be at most 1 together")
    if schedule.p_x_start and not config.objective.p_y_given_x:
        raise UserError(f"{name}.p_x_start leaves nothing to learn at first, since config.objective.p_y_given_x is 0")
    if schedule.sam_start and not config.optimizer.sam_rho:
        raise UserError(f"{name}.sam_start needs config.optimizer.sam_rho above 0")
    if schedule.freeze_norm < 1 and not config.model.factory and config.model.norm != "batch":
        raise UserError(f"{name}.freeze_norm needs config.model.norm=batch, not {config.model.norm}")
    if schedule.freeze_norm < 1 and config.model.dropout:
        raise UserError(f"{name}.freeze_norm needs config.model.dropout=0: frozen batch norm means evaluation mode")


def describe() -> Iterator[str]:
    """One line for each setting: key, default, range, meaning."""
    for name, value, metadata in _leaves(Config()):
        limits = f" ({_range(metadata)})" if _range(metadata) else ""
        yield f"  --config.{name}={value}\n      {metadata['meaning']}{limits}"


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata


def _build(kind: type, settings: Any, prefix: str) -> Any:
    if not isinstance(settings, Mapping | ml_collections.ConfigDict):
        raise UserError(
            f"config{prefix and '.' + prefix.rstrip('.')} must be a group of settings, not {shown(settings)}"
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name in settings:
        if name not in fields:
            near = [f"{prefix}{key}" for key in difflib.get_close_matches(str(name), fields, n=1)]
            # Perhaps in another group.
            near += [key for key, _, _ in _leaves(Config()) if key.rpartition(".")[2] == name]
            hint = f"did you mean config.{near[0]}?" if near else f"there are: {', '.join(fields)}"
            raise UserError(f"config.{prefix}{shown(str(name))[1:-1]} is not a setting; {hint}")
        field = fields[name]
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            values[name] = _build(field.type, settings[name], f"{prefix}{name}.")
        else:
            values[name] = _value(f"config.{prefix}{name}", settings[name], field)
    return kind(**values)


def _value(key: str, value: Any, field: dataclasses.Field) -> Any:
    default, metadata = field.default, field.metadata
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or not all(_is_number(item) for item in value):
            raise UserError(
                f"{key} must be a tuple of numbers such as {default[:2] or metadata['example']}, not {shown(value)}"
            )
        if len(value) > _MOST_NUMBERS:
            raise UserError(f"{key} holds {len(value)} numbers; {_MOST_NUMBERS} is the most")
        value = tuple(float(item) for item in value)
        numbers = value
    elif isinstance(default, float) and _is_number(value):
        value = float(value)
        numbers = (value,)
    elif type(value) is not type(default):
        raise UserError(f"{key} must be of type {type(default).__name__}, not {shown(value)}")
    else:
        numbers = (value,) if isinstance(default, int) and not isinstance(default, bool) else ()
    low, above, high, choices = (metadata[name] for name in ("low", "above", "high", "choices"))
    for number in numbers:
        within = (low is None or number >= low) and (above is None or number > above)
        if not (abs(number) <= sys.float_info.max and within and (high is None or number <= high)):
            raise UserError(f"{key} must be {_range(metadata)}, not {shown(number)}")
    if choices and value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}; not {shown(value)}")
    return value


def _is_number(value: Any) -> bool:
    # An int past the largest float is no number that a setting can be.
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)


def _range(metadata: Mapping[str, Any]) -> str:
    low, above, high = metadata["low"], metadata["above"], metadata["high"]
    parts = [f"at least {low}"] if low is not None else [f"above {above}"] if above is not None else []
    parts += [f"at most {high}"] if high is not None else []
    return " and ".join(parts) or " | ".join(metadata["choices"])
