"""The section about the training itself, from metrics.jsonl."""

from typing import Any

from jem_jax.report import figures
from jem_jax.report.inputs import TITLES, Subject
from jem_jax.report.result import Result
from jem_jax.runs import metrics, workdir
from jem_jax.training import recovery

_CURVES = {
    "log p~": ("log p~(x), nats", {"log_px_data": "data", "log_px_samples": "samples"}),
    "accuracy": ("fraction", {"accuracy": "training", "validation_accuracy": "validation"}),
    "gradient": ("norm", {"gradient_norm": "whole gradient, before clipping"}),
    "loss": ("nats", {"loss": "joint loss", "cross_entropy": "cross-entropy"}),
}


_SCHEDULED = {"learning_rate": "learning rate", "p_x_factor": "weight of p(x)", "num_steps": "SGLD steps"}


def follow(subject: Subject) -> Result:
    """Curves of the training: whether data and samples stayed together, and how accuracy and loss went."""
    lines = metrics.read(subject.path / metrics.FILE)
    result = Result(how={"file": "metrics.jsonl", "means": "each point is the mean since the one before"})
    series = {}
    for title, (label, names) in _CURVES.items():
        curves = []
        for name, short in names.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                curves.append(figures.TrainingLine(short, *zip(*points, strict=True)))
        if curves:
            series[title] = (label, curves)
    scheduled = _scheduled(lines)
    if scheduled:
        series["schedule"] = ("share of the largest value", scheduled)
    _tell_recoveries(result, subject)
    if not series:
        result.text("There are no training metrics: the model was imported, or comes from a model folder.")
        return result
    result.plot(
        figures.training(series, subject.folder / "training.png"),
        "The JEM's training. Data and samples should keep to about the same log p~; a gap that widens is the beginning "
        "of a divergence.",
    )
    return result


def _scheduled(lines: list[dict[str, Any]]) -> list[figures.TrainingLine]:
    """The settings that changed during the run, each as a share of its largest value."""
    curves = []
    for name, short in _SCHEDULED.items():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        largest = max((value for _, value in points), default=0)
        if largest and any(value != largest for _, value in points):
            steps, values = zip(*points, strict=True)
            curves.append(figures.TrainingLine(short, steps, tuple(value / largest for value in values)))
    return curves


def _tell_recoveries(result: Result, subject: Subject) -> None:
    """Tells of the divergences and recoveries."""
    parts = {"jem": subject.path, "baseline": subject.path / workdir.BASELINE}
    for name in subject.models:
        for number, entry in enumerate(recovery.read(parts[name]), 1):
            result.text(f"Recovery {number} of the {TITLES[name]}: it {recovery.in_words(entry)}.")
        end = recovery.end(parts[name])
        if end is not None:
            result.models[name] = {"ended": end}
            result.text(f"The training of the {TITLES[name]} ended there: it {recovery.end_in_words(end)}.")
