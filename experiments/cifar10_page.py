"""The part of docs/results.md about CIFAR-10 and its words in the README, from the stored run of cifar10_fast.py."""

import re
from collections.abc import Mapping
from typing import Any

from tables import table

from jem_jax.evaluation import ood
from jem_jax.runs.metrics import duration

Numbers = Mapping[str, Any]
PICTURE = "experiments/results/cifar10_fast_buffer.png"


def short(stored: Numbers) -> str:
    """For the README."""
    run, jem = stored["runs"][0]["run"], stored["runs"][0]["jem"]
    return (
        f"**CIFAR-10 on one {stored['device']}**: `configs/cifar10_fast.py`, a WRN-16-4 with the parts of SADA-JEM but "
        f"for its optimiser, trained for {duration(run['seconds']['training'])}: {100 * jem['accuracy']:.1f} % test "
        f"accuracy, ECE {100 * jem['ece']:.1f} %, mean AUROC of log p~(x) over {len(jem['ood'])} outside sets "
        f"{_mean(jem, 'log_density'):.2f}. One run.\n\n"
        f"![Chains of the replay buffer, one row a predicted class]({PICTURE})"
    )


def section(stored: Numbers) -> str:
    """One run's numbers; it has no classifier beside it."""
    run, jem = stored["runs"][0]["run"], stored["runs"][0]["jem"]
    sizes, seconds = run["split_sizes"], run["seconds"]
    recoveries = len(jem.get("recoveries", []))
    quality = jem["sample_quality"]
    return "\n\n".join(
        (
            "## CIFAR-10 in three minutes on one GPU",
            f"One seed of `configs/cifar10_fast.py`, {sizes['train']:,} training and {sizes['test']:,} test images, "
            f"{run['iterations']:,} iterations on one {stored['device']} (`{stored['command']}`): training "
            f"{duration(seconds['training'])}, the report {duration(seconds['evaluation'])}, {recoveries} recoveries. "
            f"No plain classifier was trained beside it. In this run {stored['note']}.",
            table(
                ("accuracy, %", "NLL, nats", "Brier", "ECE, %", "ECE after temperature scaling, %"),
                [
                    [
                        f"{100 * jem['accuracy']:.1f}",
                        f"{jem['nll']:.3f}",
                        f"{jem['brier']:.3f}",
                        f"{100 * jem['ece']:.1f}",
                        f"{100 * jem['ece_scaled']:.1f}",
                    ]
                ],
            ),
            "It is underconfident, as the smaller JEMs above are: the validation images' best temperature is "
            f"{jem['temperature']:.2f}. Validation accuracy while it trained: {_course(stored['validation'])}.",
            _detecting(jem),
            "The gradient's length, -\\|∇ log p~(x)\\|, tells nothing here, or the contrary; so it was with batch norm "
            "on the small data sets above.",
            _attacking(jem),
            f"{run['evaluation']['attack_images']} test images, ε in [0, 1] pixels.",
            f"![The replay buffer, one row a predicted class](../{PICTURE})",
            "The first ten chains of each predicted class in the replay buffer, none chosen. Their Fréchet distance to "
            f"the training images, in this network's own features, is {_distance(quality, 'replay buffer')} (test "
            f"images: {_distance(quality, 'test images')}); that of chains that start afresh and run for "
            f"1,000 steps by running statistics is {_distance(quality, 'fresh chains')}. Training ran 5 steps by the "
            "statistics of each batch; the report now samples by those too (see sampler.batch_statistics). FID and "
            "Inception score were not measured.",
        )
    )


def _detecting(jem: Numbers) -> str:
    rows = [
        (ood.SCORES[score].replace("|", "\\|"), *(f"{found[score]['auroc']:.3f}" for found in jem["ood"].values()))
        for score in ("approximate_mass", "log_density", "max_posterior")
    ]
    return table(("AUROC", *(re.sub("_", " ", name) for name in jem["ood"])), rows)


def _attacking(jem: Numbers) -> str:
    found = [
        (f"{words} {float(epsilon):g}", f"{100 * value:.1f}")
        for norm, words in (("linf", "L∞"), ("l2", "L2"))
        for epsilon, value in jem["pgd"][norm].items()
        if float(epsilon)
    ]
    return table(("PGD-20", *(head for head, _ in found)), [("accuracy, %", *(cell for _, cell in found))])


def _course(validation: Any) -> str:
    return ", ".join(f"{100 * accuracy:.1f} % after {seconds:.0f} s" for _, accuracy, seconds in validation)


def _distance(quality: Numbers, name: str) -> str:
    return f"{quality[name]['frechet_distance']:.3g}"


def _mean(jem: Numbers, score: str) -> float:
    values = [found[score]["auroc"] for found in jem["ood"].values()]
    return sum(values) / len(values)
