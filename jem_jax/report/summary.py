"""The few lines that a report begins with: what the JEM gained and lost beside the plain classifier."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jem_jax.report.inputs import TITLES
from jem_jax.report.result import percent

_OOD = {"log_density": "log p~(x)", "approximate_mass": "-|∇ log p~(x)|", "max_posterior": "max p(y|x)"}


class Line(NamedTuple):
    """One quantity of both models."""

    title: str
    cells: dict[str, str]
    """"jem" and "baseline" -> as a person reads it"""
    better: str
    """whose is better; empty where there is one model, or both read the same"""


def lines(values: Mapping[str, Any]) -> list[Line]:
    """The summary of report.json's numbers. A section that was not measured leaves its lines out."""
    models = {name: values[name] for name in TITLES if name in values}
    rows = [
        _line(models, "accuracy", lambda model: model["accuracy"], lambda value: percent(value, 2)),
        _line(models, "NLL, nats", lambda model: model["nll"], "{:.4f}".format, higher=False),
        _line(
            models, "calibration error (ECE)", lambda model: model["ece"], lambda value: percent(value, 2), higher=False
        ),
    ]
    any_model: Any = next(iter(models.values()), {})
    for score, formula in _OOD.items():
        count = len(any_model.get("ood", {}))
        title = f"AUROC of {formula}, mean of {count} outside sets"
        rows.append(_line(models, title, lambda model, score=score: _mean_auroc(model, score), "{:.3f}".format))
    for norm, symbol in (("linf", "L∞"), ("l2", "L2")):
        epsilons = [epsilon for epsilon in any_model.get("pgd", {}).get(norm, {}) if float(epsilon) > 0]
        if epsilons:
            # The middle one: at the ends all models are right, or all wrong.
            epsilon = epsilons[(len(epsilons) - 1) // 2]
            rows.append(
                _line(models, f"accuracy under PGD, {symbol} ε {epsilon}",
                      lambda model, norm=norm, epsilon=epsilon: model["pgd"][norm][epsilon], percent)
            )  # fmt: skip
    return [line for line in rows if line is not None]


def as_text(values: Mapping[str, Any]) -> str:
    """The lines as a table for a terminal."""
    rows = lines(values)
    names = [name for name in TITLES if name in values]
    width = max([len(line.title) for line in rows], default=0)
    out = [" " * width + "".join(f"{TITLES[name]:>12}" for name in names)]
    out += [line.title.ljust(width) + "".join(f"{line.cells[name]:>12}" for name in names) for line in rows]
    return "\n".join(out)


def _line(models: Mapping[str, Any], title: str, read: Any, write: Any, higher: bool = True) -> Line | None:
    try:
        numbers = {name: float(read(model)) for name, model in models.items()}
    except KeyError:
        return None
    cells = {name: write(number) for name, number in numbers.items()}
    if len(set(cells.values())) < 2 or not np.isfinite(list(numbers.values())).all():
        return Line(title, cells, "")
    return Line(title, cells, (max if higher else min)(numbers, key=lambda name: numbers[name]))


def _mean_auroc(model: Mapping[str, Any], score: str) -> float:
    return float(np.mean([scores[score]["auroc"] for scores in model["ood"].values()]))
