"""What a finished run shows: report.json, pictures of samples, and a short table."""

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jem_jax
from jem_jax import loading, metrics, parallel, pictures, train_step, workdir
from jem_jax.datasets import Dataset
from jem_jax.datasets.splits import to_float
from jem_jax.evaluation import calibration, classification, generation
from jem_jax.loading import Model
from jem_jax.workdir import RunFacts

_PER_CLASS = 10
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Report:
    """A report and where it lies."""

    values: dict[str, Any]
    path: Path
    pictures: list[Path]


def write(path: Path, facts: RunFacts, dataset: Dataset, seconds: dict[str, float]) -> Report:
    """Evaluates a run's last checkpoint, and its baseline's, on the test split, and writes report/.

    Args:
      path: the workdir.
      seconds: how long each part of the run took.

    Raises:
      UserError: the run has no finished checkpoint.
    """
    model = loading.read_model(path, facts)
    values: dict[str, Any] = {"jem": _classified(model, facts, dataset)}
    if (path / workdir.BASELINE).is_dir():
        baseline = loading.read_model(path, facts, baseline=True)
        values["baseline"] = _classified(baseline, facts, dataset)
    values["samples"], images = draw_samples(path / workdir.REPORT, model, facts)
    values["run"] = {
        "data": dataset.name,
        "split_sizes": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "iterations": model.step,
        "evaluation": dataclasses.asdict(facts.config.evaluation),
        "seed": facts.config.seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "devices": parallel.describe(),
        "python": platform.python_version(),
        "versions": {"jem_jax": jem_jax.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    file = path / workdir.REPORT / "report.json"
    workdir.write_text(file, json.dumps(values, indent=1) + "\n")
    return Report(values, file, images)


def read(path: Path) -> Report | None:
    """The report that lies in a workdir, if there is one and it can be read."""
    file = path / workdir.REPORT / "report.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not {"iterations", "evaluation", "seconds"} <= values["run"].keys() or "jem" not in values:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Report(values, file, sorted(file.parent.glob("*.png")))


def is_current(report: Report, facts: RunFacts, step: int, baseline: bool) -> bool:
    """Whether a report is of this iteration and of these evaluation settings, with the baseline if there is one."""
    run = report.values["run"]
    if baseline and "baseline" not in report.values:
        return False
    return run["iterations"] == step and run["evaluation"] == dataclasses.asdict(facts.config.evaluation)


def table(report: Report) -> str:
    """The short table that ends a run."""
    lines = [f"{'':<12}{'accuracy':>10}{'NLL':>10}{'ECE':>10}"]
    for name, title in (("jem", "JEM"), ("baseline", "classifier")):
        if name in report.values:
            row = report.values[name]
            lines.append(f"{title:<12}{row['accuracy']:>10.2%}{row['nll']:>10.4f}{row['ece']:>10.2%}")
    some = report.values["jem"]
    lines.append(f"on {some['images']} {some['split']} images; NLL in nats; ECE in {some['ece_bins']} bins")
    return "\n".join(lines)


def draw_samples(folder: Path, model: Model, facts: RunFacts) -> tuple[dict[str, Any], list[Path]]:
    """Samples as PNG: fresh chains, fresh chains of each class, and the buffer class by class.

    Returns:
      How they were made, and the files.
    """
    settings = facts.config.evaluation
    count = settings.num_samples
    steps, classes = settings.sample_steps, facts.num_classes
    per_class = -(-count // classes)
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    files: list[Path] = []
    made: dict[str, Any] = {"steps": steps, "start": "U(-1, 1)", "seed": facts.config.seed}
    key = jax.random.key(facts.config.seed)
    for name, conditional in (("samples_by_class", True), ("samples", False)):
        sample = generation.sampler(
            model.network, conditional=conditional, num_steps=steps, **train_step.sgld_settings(facts.config)
        )
        wanted = labels if conditional else np.zeros(count, dtype=np.int32)
        drawn = sample(
            model.variables, jax.random.fold_in(key, conditional), wanted, facts.image_shape, settings.batch_size
        )
        rows = list(drawn.reshape(classes, per_class, *facts.image_shape)) if conditional else _rows(drawn)
        names = facts.class_names if conditional else ()
        files.append(pictures.save(pictures.grid(rows, names), folder / f"{name}.png"))
        made[name] = {"images": len(drawn), "follows": "∇ f(x)[y]" if conditional else "∇ log p~(x)"}
    if model.buffer is not None:
        images = model.buffer.reshape(-1, *facts.image_shape)
        logits = _logits(model, images, settings.batch_size)
        rows = generation.by_class(images, logits, _PER_CLASS)
        files.append(pictures.save(pictures.grid(rows, facts.class_names), folder / "buffer_by_class.png"))
        made["buffer_by_class"] = {
            "images": sum(map(len, rows)),
            "chosen": f"the first {_PER_CLASS} of the buffer whose largest logit is the class's",
            "buffer_size": len(images),
        }
    return made, files


def _classified(model: Model, facts: RunFacts, dataset: Dataset) -> dict[str, Any]:
    split, bins = dataset.test, facts.config.evaluation.ece_bins
    logits = _logits(model, to_float(split.images), facts.config.evaluation.batch_size)
    return {
        "accuracy": classification.accuracy(logits, split.labels),
        "nll": classification.negative_log_likelihood(logits, split.labels),
        "ece": calibration.expected_calibration_error(logits, split.labels, bins),
        "ece_bins": bins,
        "images": len(split),
        "split": "test",
        "input_noise": 0.0,
        "iteration": model.step,
    }


def _logits(model: Model, images: np.ndarray, batch_size: int) -> np.ndarray:
    return parallel.over_examples(model.network.logits)(model.variables, images, batch_size)


def _rows(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + 10] for start in range(0, len(images), 10)]


def seconds_in_words(report: Report) -> str:
    """How long the parts of the run took."""
    parts = report.values["run"]["seconds"]
    return ", ".join(f"{name} {metrics.duration(value)}" for name, value in parts.items())
