"""The section of docs/results.md about Fashion-MNIST, from what fashion_mnist.py stored."""

import re
from collections.abc import Mapping
from typing import Any

from tables import table

from jem_jax.evaluation import ood

Numbers = Mapping[str, Any]
MODELS = {"jem": "JEM", "baseline": "classifier"}


def section(stored: Numbers) -> str:
    """One run's numbers of both models side by side."""
    (run,) = stored["runs"]
    minutes = {name: seconds / 60 for name, seconds in run["run"]["seconds"].items()}
    sizes = run["run"]["split_sizes"]
    return "\n\n".join(
        (
            "## Fashion-MNIST",
            f"One seed, {sizes['train']:,} training and {sizes['test']:,} test images, {run['run']['iterations']:,} "
            f"iterations, on {stored['cores']} CPU cores (`{stored['command']}`): training "
            f"{minutes['training']:.1f} minutes, the classifier {minutes['baseline']:.1f}, the report "
            f"{minutes['evaluation']:.1f}. The JEM recovered from {len(run['jem'].get('recoveries', []))} divergences. "
            "The better of the two in bold; one run has no spread.",
            _classifying(run),
            " ".join(_confidence(run, model) for model in MODELS),
            _detecting(run),
            _attacking(run),
            "![The replay buffer, one row a predicted class](../experiments/results/fashion_mnist_buffer.png)",
            "The first ten chains of each predicted class in the replay buffer, none chosen.",
        )
    )


def _classifying(run: Numbers) -> str:
    columns = {"accuracy": (100, max), "nll": (1, min), "brier": (1, min), "ece": (100, min), "ece_scaled": (100, min)}
    heads = ("accuracy, %", "NLL, nats", "Brier", "ECE, %", "ECE after temperature scaling, %")
    rows = []
    for model, title in MODELS.items():
        cells = []
        for name, (factor, best) in columns.items():
            values = [run[other][name] for other in MODELS]
            cells.append(
                _bold(f"{factor * run[model][name]:.{1 if factor == 100 else 3}f}", run[model][name], best(values))
            )
        rows.append((title, *cells))
    return table(("", *heads), rows)


def _confidence(run: Numbers, model: str) -> str:
    temperature = run[model]["temperature"]
    found = (
        "underconfident"
        if temperature < 0.95
        else "overconfident"
        if temperature > 1.05
        else "neither too sure nor unsure"
    )
    return f"The {MODELS[model]} is {found}: the validation images' best temperature is {temperature:.2f}."


def _detecting(run: Numbers) -> str:
    sets = list(run["jem"]["ood"])
    rows = []
    for score in ("approximate_mass", "log_density", "max_posterior"):
        for model, title in MODELS.items():
            cells = []
            for name in sets:
                values = [run[other]["ood"][name][score]["auroc"] for other in MODELS]
                own = run[model]["ood"][name][score]["auroc"]
                cells.append(_bold(f"{own:.3f}", own, max(values)))
            rows.append((f"{ood.SCORES[score]}, {title}".replace("|", "\\|"), *cells))
    return table(("AUROC", *(re.sub("_", " ", name) for name in sets)), rows)


def _attacking(run: Numbers) -> str:
    heads, rows = ["PGD-20, accuracy, %"], []
    for norm, words in (("linf", "L∞"), ("l2", "L2")):
        heads += [f"{words} {float(epsilon):g}" for epsilon in run["jem"]["pgd"][norm] if float(epsilon)]
    for model, title in MODELS.items():
        cells = []
        for norm in ("linf", "l2"):
            for epsilon, own in run[model]["pgd"][norm].items():
                if float(epsilon):
                    best = max(run[other]["pgd"][norm][epsilon] for other in MODELS)
                    cells.append(_bold(f"{100 * own:.1f}", own, best))
        rows.append((title, *cells))
    return table(heads, rows)


def _bold(text: str, own: float, best: float) -> str:
    return f"**{text}**" if own == best else text
