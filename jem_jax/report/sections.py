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

from jem_jax import workdir
from jem_jax.config import Evaluation
from jem_jax.errors import UserError
from jem_jax.report import attacking, classifying, detecting, progress, sampling
from jem_jax.report.result import Result
from jem_jax.report.subject import Subject

_FORMAT = 1
"""raised where what a section measures, or how, changes"""


@dataclass(frozen=True)
class Section:
    """One question that the report answers."""

    name: str
    title: str
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
    Section("classification", "What it classifies", classifying.classify),
    Section("calibration", "Whether its confidence can be trusted", classifying.calibrate, ("ece_bins",)),
    Section("ood", "Whether it notices what it was not made for", detecting.detect, ("ood_images", "ood_sets")),
    Section(
        "adversarial", "Whether it can be fooled", attacking.attack,
        ("attack_images", "attack_steps", "attack_restarts", "attack_linf", "attack_l2", "refined_images",
         "refined_linf"),
    ),
    Section("distal", "What it takes noise for", attacking.climb),
    Section("samples", "What it draws", sampling.draw, _DRAWING),
    Section("sample_quality", "How good what it draws is", sampling.judge, _DRAWING),
    Section("inpainting", "What it makes of half an image", sampling.inpaint, _DRAWING),
    Section("training", "How it was trained", progress.follow),
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
      say: is given a line as each section is done.
    """
    some = wanted(subject.settings)
    for number, section in enumerate(some, 1):
        outcome = _kept(subject, section)
        note = "as before"
        if outcome is None:
            outcome = _measure(subject, section)
            note = f"{outcome.seconds:.1f} s" if not outcome.failure else f"FAILED: {outcome.failure}"
        say(f"  [{number}/{len(some)}] {section.name}: {note}")
        yield outcome


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
    kept = {"id": _identity(subject, section), "seconds": outcome.seconds, "result": dataclasses.asdict(result)}
    workdir.write_text(_file(subject, section), json.dumps(kept, indent=1) + "\n")
    return outcome


def _kept(subject: Subject, section: Section) -> Outcome | None:
    try:
        kept = json.loads(_file(subject, section).read_text(encoding="utf-8"))
        if kept["id"] != _identity(subject, section):
            return None
        result = Result(**kept["result"])
        if all((subject.folder / name).is_file() for name in result.files):
            return Outcome(section, result, float(kept["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _file(subject: Subject, section: Section) -> Path:
    return subject.folder / "sections" / f"{section.name}.json"


def _identity(subject: Subject, section: Section) -> str:
    """What a section's outcome depends on: the checkpoints, byte for byte, and its settings."""
    settings = dataclasses.asdict(subject.settings)
    parts: list[Any] = [_FORMAT, section.name, subject.settings.batch_size, {n: settings[n] for n in section.settings}]
    for name, model in subject.models.items():
        part = subject.path / workdir.BASELINE if name == "baseline" else subject.path
        parts.append((part / workdir.CHECKPOINTS / str(model.step) / "manifest.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
