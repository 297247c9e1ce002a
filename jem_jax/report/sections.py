"""The sections of a report: which there are, and each run on its own, kept, and not run again without need."""

import dataclasses
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jem_jax import datasets
from jem_jax.common import files, paths
from jem_jax.common.errors import UserError
from jem_jax.config import Evaluation
from jem_jax.report import adversarial, classification, ood, samples, training
from jem_jax.report.inputs import Subject
from jem_jax.report.result import Result
from jem_jax.training import trained

_FORMAT = 3
"""raised where what a section measures, or how, changes"""


@dataclass(frozen=True)
class Section:
    """One question that the report answers."""

    name: str
    title: str
    about: str
    """what it asks and how to read the answer, for someone who has not read the paper"""
    measure: Callable[[Subject], Result]
    settings: tuple[str, ...] = ()
    """fields of `Evaluation` that it depends on"""


@dataclass(frozen=True)
class Outcome:
    """A section that was tried."""

    section: Section
    result: Result
    seconds: float
    failure: str = ""
    """why it failed, in a line; empty where it did not"""


_DRAWING = ("num_samples", "sample_steps")
SECTIONS = (
    Section(
        "classification",
        "Classification",
        "How often the class with the largest logit is the right one, and what the probabilities cost: NLL is the mean "
        "of -log p(y|x), the Brier score the mean squared error of the probabilities. Both are better when smaller.",
        classification.classify,
    ),
    Section(
        "calibration",
        "Calibration",
        "A calibrated classifier is right 80 % of the time where it is 80 % sure. ECE, the expected calibration error, "
        "is the mean gap between the two over bins of confidence; MCE is the largest gap. Temperature scaling divides "
        "all logits by one number, the usual remedy.",
        classification.calibrate,
        ("ece_bins",),
    ),
    Section(
        "ood",
        "Out-of-distribution detection",
        "Each score should be high for images like the training data and low for others. The paper's are log p~(x), "
        "max p(y|x), and the approximate mass -|∇ log p~(x)|, which is near 0 at a mode of the density; the "
        "refinement scores compare an image with what a short chain makes of it. A plain classifier has all of them "
        "too, since they need only logits.",
        ood.detect,
        ("ood_images", "ood_sets"),
    ),
    Section(
        "adversarial",
        "Adversarial robustness",
        "An attacker who knows the network moves every pixel by at most ε (L∞), or the whole image by a distance of at "
        "most ε (L2), so that the class comes out wrong. Pixels range over [0, 1].",
        adversarial.attack,
        ("attack_images", "attack_steps", "attack_restarts", "attack_linf", "attack_l2", "refined_images",
         "refined_linf"),
    ),
    Section(
        "distal",
        "Distal adversarial examples",
        "Start from noise and follow the gradient of log p(y|x) until the network is 90 % sure of a class. Where the "
        "result looks like the class, confidence means something far from the data as well.",
        adversarial.climb,
    ),
    Section(
        "samples",
        "Samples",
        "Samples by stochastic gradient Langevin dynamics (SGLD): from noise, step by step up the gradient of log "
        "p~(x) with a little noise in each step. The replay buffer holds the chains that training went on from.",
        samples.draw,
        _DRAWING,
    ),
    Section("sample_quality", "Sample quality", "", samples.quality,
            (*_DRAWING, "inception_weights")),
    Section(
        "inpainting",
        "Inpainting",
        "The known pixels are held fixed, the hidden ones begin as noise and follow SGLD.",
        samples.inpaint,
        _DRAWING,
    ),
    Section("training", "Training", "", training.follow),
)  # fmt: skip


def wanted(settings: Evaluation) -> list[Section]:
    """The sections that the settings name.

    Raises:
      UserError: there is no such section.
    """
    if settings.sections == "all":
        return list(SECTIONS)
    by_name = {section.name: section for section in SECTIONS}
    names = [name.strip() for name in settings.sections.split(",")]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(
            f"config.evaluation.sections: {unknown[0]!r} is not a section; there are all, {', '.join(by_name)}"
        )
    return [section for section in SECTIONS if section.name in names]


def run(subject: Subject, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Every wanted section in turn: read where it was kept, else measured and kept. A failure ends its section alone.

    Args:
      say: is given the beginning of a line as a section begins, and its end as it is done.
    """
    chosen = wanted(subject.settings)
    for number, section in enumerate(chosen, 1):
        say(f"  [{number}/{len(chosen)}] {section.name}: ")
        outcome = _kept(subject, section)
        note = "as before"
        if outcome is None:
            outcome = _measure(subject, section)
            note = f"{outcome.seconds:.1f} s" if not outcome.failure else f"FAILED: {outcome.failure}"
        say(f"{note}\n")
        yield outcome


def versions(settings: Evaluation) -> dict[str, list[Any]]:
    """A version of each file that a setting names, by setting; it changes with the file's contents."""
    setting, weights = "config.evaluation.inception_weights", settings.inception_weights
    return {
        "ood_sets": [datasets.version(name) for name in settings.ood_set_names],
        "inception_weights": files.version(paths.local(setting, weights)) if weights else [],
    }


def _measure(subject: Subject, section: Section) -> Outcome:
    started = time.monotonic()
    try:
        result = section.measure(subject)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        where = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__}: {lines[0]} ({Path(where.filename).name}:{where.lineno})"
        return Outcome(section, Result(), time.monotonic() - started, failure)
    outcome = Outcome(section, result, round(time.monotonic() - started, 1))
    if result.missing:
        return outcome
    entry = {"id": _identity(subject, section), "seconds": outcome.seconds, "result": dataclasses.asdict(result)}
    files.write_json(_file(subject, section), entry)
    return outcome


def _kept(subject: Subject, section: Section) -> Outcome | None:
    try:
        entry = json.loads(_file(subject, section).read_text(encoding="utf-8"))
        if entry["id"] != _identity(subject, section):
            return None
        result = Result(**entry["result"])
        if all((subject.folder / name).is_file() for name in result.files):
            return Outcome(section, result, float(entry["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _file(subject: Subject, section: Section) -> Path:
    return subject.folder / "sections" / f"{section.name}.json"


def _identity(subject: Subject, section: Section) -> str:
    """A hash of all inputs of a section: checkpoints and data, byte for byte, settings, and files that they name."""
    settings = dataclasses.asdict(subject.settings)
    parts: list[Any] = [_FORMAT, section.name, subject.settings.batch_size, {n: settings[n] for n in section.settings}]
    parts.append(subject.dataset.fingerprint)
    parts += [state for name, state in versions(subject.settings).items() if name in section.settings]
    for name, model in subject.models.items():
        parts.append(trained.identity(subject.path, model.step, baseline=name == "baseline"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
