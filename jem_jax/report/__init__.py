"""The report of a finished run: report.html for people, report.json for programs. `evaluation` computes its metrics."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jem_jax
from jem_jax import datasets
from jem_jax.common import files, paths
from jem_jax.common.errors import UserError
from jem_jax.config import Evaluation
from jem_jax.datasets import Dataset, ood_sets
from jem_jax.distributed import devices
from jem_jax.report import html, inputs, samples, sections, summary
from jem_jax.report.inputs import Subject
from jem_jax.runs import metrics, workdir
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import recovery

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_NUMBERS, _PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class Report:
    """A report and where it lies."""

    values: dict[str, Any]
    folder: Path

    @property
    def numbers(self) -> Path:
        """report.json"""
        return self.folder / _NUMBERS

    @property
    def page(self) -> Path:
        """report.html"""
        return self.folder / _PAGE

    @property
    def samples(self) -> list[Path]:
        """The pictures of samples, as far as they were drawn."""
        return [path for name in samples.PICTURES if (path := self.folder / name).is_file()]

    @property
    def failures(self) -> dict[str, str]:
        """section -> why it failed"""
        return {name: section["failure"] for name, section in self.values["sections"].items() if section["failure"]}


def check(settings: Evaluation) -> None:
    """Makes sure that the settings name sections and outside sets that there are, and paths of this machine.

    Raises:
      UserError: they do not.
    """
    if any("ood_sets" in section.settings for section in sections.wanted(settings)):
        for name in settings.ood_set_names:
            datasets.check_name("config.evaluation.ood_sets", name)
    if settings.inception_weights:
        paths.local("config.evaluation.inception_weights", settings.inception_weights)


def missing(facts: RunFacts) -> dict[str, str]:
    """Outside sets that the report is to measure and that cannot be had, and why; those still to fetch are fetched.

    The report reads them again: their images would take memory for the whole training.
    """
    settings, absent = facts.config.evaluation, {}
    if any("ood_sets" in section.settings for section in sections.wanted(settings)):
        for name in settings.ood_set_names:
            try:
                ood_sets.named(facts.config.data, name, facts.image_shape, 1, 0)
            except UserError as error:
                absent[name] = str(error)
    return absent


def write(
    path: Path,
    facts: RunFacts,
    dataset: Dataset,
    seconds: dict[str, float],
    say: Callable[[str], None],
    report_dir: Path | None = None,
) -> Report:
    """Measures a run's last checkpoint, and its baseline's, and writes report/.

    Args:
      path: the workdir, or a model folder.
      seconds: how long each part of the run took.
      say: is given the progress, piece by piece.
      report_dir: gets report/; the workdir by default.

    Raises:
      UserError: the run has no finished checkpoint.
    """
    about = inputs.read(path, facts, dataset, report_dir)
    outcomes = list(sections.run(about, say))
    values: dict[str, Any] = {name: {"iteration": model.step} for name, model in about.models.items()}
    for outcome in outcomes:
        for name, numbers in outcome.result.models.items():
            _merge(values[name], numbers)
    values["sections"] = {
        each.section.name: {
            "seconds": each.seconds,
            "failure": each.failure,
            "how": each.result.how,
            "missing": each.result.missing,
        }
        for each in outcomes
    }
    measured = sum(outcome.seconds for outcome in outcomes)
    for name, part in (("jem", path), ("baseline", path / workdir.BASELINE)):
        if name in values:
            values[name]["recoveries"] = recovery.events(recovery.read(part))
    values["run"] = _about_run(about, dict(seconds) | {"evaluation": measured})
    report = Report(values, about.folder)
    files.write_text(report.page, html.render(values, outcomes, about.folder))
    # Last, since this file is what tells that a report is whole.
    files.write_json(report.numbers, values)
    return report


def read(path: Path) -> Report | None:
    """The report that lies in a workdir, if there is one and it can be read."""
    folder = path / workdir.REPORT
    try:
        report = Report(json.loads((folder / _NUMBERS).read_text(encoding="utf-8")), folder)
        is_whole = {"iterations", "evaluation", "seconds"} <= report.values["run"].keys() and "jem" in report.values
        return report if is_whole and report.page.is_file() and isinstance(report.failures, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_current(report: Report, facts: RunFacts, step: int, baseline: bool) -> bool:
    """Whether a report is whole, of this iteration, data and settings, with the baseline if there is one."""
    run = report.values["run"]
    if baseline != ("baseline" in report.values) or report.failures:
        return False
    if any(section.get("missing") for section in report.values["sections"].values()):
        return False
    settings = facts.config.evaluation
    written = (run.get("iterations"), run["evaluation"], run.get("data_fingerprint"), run.get("files"))
    return written == (step, _as_json(settings), facts.fingerprint, sections.versions(settings))


def table(report: Report) -> str:
    """The short table that ends a run."""
    return summary.as_text(report.values)


def seconds_in_words(report: Report) -> str:
    """The durations of the run's parts, in words."""
    parts = report.values["run"]["seconds"]
    return ", ".join(f"{name} {metrics.duration(value)}" for name, value in parts.items())


def _about_run(about: Subject, seconds: dict[str, float]) -> dict[str, Any]:
    config, dataset = about.facts.config, about.dataset
    started = workdir.find_facts(about.path)
    return {
        "data": dataset.name,
        "data_fingerprint": dataset.fingerprint,
        "trained_on_other_data": bool(started and started.fingerprint not in ("", dataset.fingerprint)),
        "split_sizes": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "iterations": about.jem.step,
        "evaluation": _as_json(config.evaluation),
        "files": sections.versions(config.evaluation),
        "seed": config.seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "devices": devices.describe(),
        "python": platform.python_version(),
        "versions": {"jem_jax": jem_jax.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _as_json(settings: Evaluation) -> dict[str, Any]:
    """As JSON reads it back, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Sections of one model side by side; of nested dicts too."""
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
