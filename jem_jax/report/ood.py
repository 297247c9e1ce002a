"""Shows out-of-distribution detection, which `evaluation.ood` computes: every score, every set, both models."""

from typing import Any

import numpy as np

from jem_jax.augment import to_float
from jem_jax.common.errors import UserError
from jem_jax.datasets import ood_sets
from jem_jax.datasets.ood_sets import OutsideSet
from jem_jax.evaluation import ood
from jem_jax.report import figures
from jem_jax.report.inputs import TITLES, Subject, chains_in_words, how_chains_pass
from jem_jax.report.result import Result
from jem_jax.training import quantities

_DRAWN = ("log_density", "max_posterior", "approximate_mass")
_STEPS = 20
_STREAM = 101


def detect(subject: Subject) -> Result:
    """AUROC, AUPR and FPR at 95 % TPR of every score on every set, and histograms of the paper's three."""
    settings = subject.settings
    few = len(subject.test) > settings.ood_images
    test = to_float(subject.some_test(settings.ood_images).images) if few else subject.test
    result = Result(how={
        "inside": f"{len(test)} of {len(subject.test)} test images", "scores": dict(ood.SCORES),
        "refinement_steps": _STEPS, "refinement": how_chains_pass(subject.facts.config),
        "aupr": "test images are the positive class", "fpr95": "share let in where 95 % of test images are",
        "nan": "a score that is NaN counts as the lowest",
    })  # fmt: skip
    sets = _sets(subject, result)
    chain = {"num_steps": _STEPS, **quantities.sgld_settings(subject.facts.config.sampler)}
    score = subject.over_examples(
        lambda keys, logits_fn, chain_logits_fn, x: ood.scores(
            keys, logits_fn, x, chain_logits_fn=chain_logits_fn, **chain
        ),
        chains=1,
    )
    scores: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    images = {"test": test} | {key: outside.images for key, outside in sets.items()}
    for name in subject.models:
        scores[name] = {key: score(name, subject.key(_STREAM), outside) for key, outside in images.items()}
        result.models[name] = {"ood": {key: _detections(scores[name], key) for key in sets}}
    _tables(result, sets, chains_in_words(subject.facts.config, "The chains of the refinement scores"))
    histograms, formulas = {}, {}
    for name in subject.models:
        for kind in _DRAWN:
            title = f"{TITLES[name]}, {kind.replace('_', ' ')}"
            histograms[title] = {key: values[kind] for key, values in scores[name].items()}
            formulas[title] = ood.SCORES[kind]
    result.plot(
        figures.histograms(histograms, list(sets), formulas, subject.folder / "ood_histograms.png"),
        "Scores of test images (grey) and of each set (blue: JEM, orange: classifier); the less they overlap, the "
        "better. The outermost 0.5 % on either side are drawn at the edge.",
    )
    return result


def _sets(subject: Subject, result: Result) -> dict[str, OutsideSet]:
    settings, seed = subject.settings, subject.facts.config.seed
    sets = ood_sets.builtin(subject.dataset.test, settings.ood_images, seed)
    empty = [name for name, outside in sets.items() if not len(outside.images)]
    if empty:
        names = " and ".join(name.replace("_", " ") for name in empty)
        result.text(f"Left out: {names}. They take test images of several classes, or several at all.")
    sets = {name: outside for name, outside in sets.items() if name not in empty}
    for name in settings.ood_set_names:
        try:
            sets[name] = ood_sets.named(
                subject.facts.config.data, name, subject.facts.image_shape, settings.ood_images, seed
            )
        except UserError as error:
            result.text(f"{name} is missing: {error}")
            result.missing.append(name)
    result.how["sets"] = {
        name: {"is": outside.description, "images": len(outside.images)} for name, outside in sets.items()
    }
    return sets


def _detections(scores: dict[str, dict[str, np.ndarray]], outside: str) -> dict[str, dict[str, Any]]:
    inside = scores["test"]
    return {kind: ood.detection(inside[kind], scores[outside][kind])._asdict() for kind in ood.SCORES}


def _tables(result: Result, sets: dict[str, OutsideSet], passing: str) -> None:
    result.text(
        "AUROC is the probability that a test image scores higher than an image of the set: 0.5 is chance, 1 perfect, "
        "below 0.5 the score ranks images of the set above test images. "
        + "; ".join(f"{name.replace('_', ' ')}: {outside.description}" for name, outside in sets.items())
        + "."
        + passing
    )
    for measure, title, better in (("auroc", "AUROC", max), ("fpr95", "FPR at 95 % TPR", min), ("aupr", "AUPR", max)):
        rows = []
        for kind in ood.SCORES:
            both = {name: [values["ood"][key][kind][measure] for key in sets] for name, values in result.models.items()}
            best = [better(numbers) if len(set(numbers)) > 1 else None for numbers in zip(*both.values(), strict=True)]
            for name, numbers in both.items():
                cells = [
                    f"{number:.3f}{' ✓' if number == top else ''}" for number, top in zip(numbers, best, strict=True)
                ]
                rows.append((f"{TITLES[name]}, {kind.replace('_', ' ')}", *cells))
        head = (title, *(name.replace("_", " ") for name in sets))
        direction = "greater" if better is max else "smaller"
        caption = f"{title} of each score, on each set; {direction} is better, ✓ marks the better of the two models"
        result.table(head, rows, caption, folded=measure != "auroc")
