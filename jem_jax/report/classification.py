"""Shows classification and calibration, whose metrics `evaluation` computes in files of these names."""

from typing import Any

import numpy as np

from jem_jax.augment import to_float
from jem_jax.evaluation import calibration, classification
from jem_jax.report import figures
from jem_jax.report.inputs import TITLES, Subject
from jem_jax.report.result import Result, percent

_SCALED = ("ece_scaled", "ece_scaled_interval", "ece_scaled_equal_mass", "mce_scaled", "nll_scaled")
_NO_TEMPERATURE = (
    "no temperature has the smallest NLL on the validation images, as where all of them are classified correctly"
)


def classify(subject: Subject) -> Result:
    """Accuracy, NLL and Brier score on the test split, class by class, and who is taken for whom."""
    labels, names = subject.dataset.test.labels, subject.facts.class_names
    result = Result(how={"images": len(labels), "split": "test", "input_noise": 0.0, "nll": "nats"})
    confusions = {}
    for name, logits in subject.test_logits.items():
        confusions[name] = classification.confusion_matrix(logits, labels)
        recall, precision = classification.recall_and_precision(confusions[name])
        result.models[name] = {
            "accuracy": classification.accuracy(logits, labels),
            "nll": classification.negative_log_likelihood(logits, labels),
            "brier": classification.brier_score(logits, labels),
            "images": len(labels),
            "split": "test",
            "input_noise": 0.0,
            "iteration": subject.models[name].step,
            "recall": _by_class(names, recall),
            "precision": _by_class(names, precision),
            "confusion": confusions[name].tolist(),
        }
    rows = [
        (TITLES[name], percent(row["accuracy"], 2), f"{row['nll']:.4f}", f"{row['brier']:.4f}")
        for name, row in result.models.items()
    ]
    result.table(("", "accuracy", "NLL, nats", "Brier score"), rows, f"{len(labels)} test images, none chosen on them")
    if len(names) <= 20:
        heads = [f"{TITLES[name]} {what}" for name in result.models for what in ("recall", "precision")]
        by_class = [
            (label, *(_share(row[what][label]) for row in result.models.values() for what in ("recall", "precision")))
            for label in names
        ]
        result.table(("class", *heads), by_class, "recall: found of the class; precision: right of those predicted")
    result.plot(
        figures.confusion(confusions, names, subject.folder / "confusion.png"),
        "Which class (row) was taken for which (column), in images; the shade is the share of the row.",
    )
    return result


def calibrate(subject: Subject) -> Result:
    """ECE, MCE and reliability diagrams, before and after temperature scaling fitted on the validation split."""
    settings, labels = subject.settings, subject.dataset.test.labels
    validation = subject.dataset.validation
    bins = settings.ece_bins
    result = Result(
        how={"images": len(labels), "bins": bins, "interval": "95 % percentile bootstrap of 1,000 resamples",
             "temperature": f"fitted to the NLL of {len(validation)} validation images"}
    )  # fmt: skip
    diagrams, rows = {}, []
    for name, logits in subject.test_logits.items():
        temperature = calibration.fit_temperature(subject.logits(name, to_float(validation.images)), validation.labels)
        values: dict[str, Any] = {"ece_bins": bins, "temperature": temperature}
        variants = {"": logits}
        if temperature is None:
            values |= dict.fromkeys(_SCALED) | {"temperature_missing": _NO_TEMPERATURE}
            result.text(f"The {TITLES[name]} is not temperature-scaled: {_NO_TEMPERATURE}.")
        else:
            variants["_scaled"] = logits / temperature
        for when, scaled in variants.items():
            low, high = calibration.ece_interval(scaled, labels, bins, seed=subject.facts.config.seed)
            ece = calibration.expected_calibration_error(scaled, labels, bins)
            mass = calibration.expected_calibration_error(scaled, labels, bins, equal_mass=True)
            mce = calibration.maximum_calibration_error(scaled, labels, bins)
            nll = classification.negative_log_likelihood(scaled, labels)
            values |= {f"ece{when}": ece, f"ece{when}_interval": [low, high], f"ece{when}_equal_mass": mass,
                       f"mce{when}": mce, f"nll{when}": nll}  # fmt: skip
            title = TITLES[name] + (f", temperature {temperature:.2f}" if when else "")
            interval = f"{percent(low)} to {percent(high)}"
            rows.append((title, percent(ece), interval, percent(mass), percent(mce), f"{nll:.4f}"))
            diagrams[f"{name} {when}"] = (title, calibration.reliability(scaled, labels, bins))
        confidence = np.exp(classification.log_posterior(logits).max(axis=-1)).mean()
        values["confidence_less_accuracy"] = float(confidence) - classification.accuracy(logits, labels)
        result.models[name] = values
    for name, values in result.models.items():
        gap = values["confidence_less_accuracy"]
        result.text(
            f"The {TITLES[name]} is {'over' if gap > 0 else 'under'}confident: its mean confidence is "
            f"{100 * abs(gap):.1f} points {'above' if gap > 0 else 'below'} its accuracy."
        )
    head = ("", "ECE", "95 % interval", "ECE, equal mass", "MCE", "NLL, nats")
    result.table(head, rows, f"{bins} bins; the temperature is fitted on {len(validation)} validation images")
    result.plot(
        figures.reliability(diagrams, subject.folder / "reliability.png"),
        "Reliability: accuracy over confidence. Bars above the dashed line are underconfident, below it overconfident; "
        "the lower row is the share of test images.",
    )
    return result


def _by_class(names: tuple[str, ...], values: np.ndarray) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
