"""The page of results, docs/results.md, with its picture, and the short table of the README, from stored results.

    python experiments/results_page.py

Reads experiments/results/*.json and *.png, which the other experiments wrote; writes docs/results.md,
docs/images/digits_results.png, and what stands in README.md between the marks of the results. Nothing in them is
written by hand, so that numbers on the pages are those that were measured.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import ablation
import ablation_page
import cifar10_page
import divergence_page
import fashion_mnist_page
from matplotlib import image as mpl_image
from matplotlib import pyplot
from tables import table

from jem_jax.evaluation import ood
from jem_jax.report import figures

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE, PICTURE, README = (
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "images" / "digits_results.png",
    ROOT / "README.md",
)
MARKS = ("<!-- results: made by experiments/results_page.py -->", "<!-- end of results -->")

Numbers = Mapping[str, Any]
MODELS = {"jem": "JEM", "baseline": "classifier"}
SCORES = ("approximate_mass", "log_density", "max_posterior", "refine_distance")


def main() -> None:
    digits, claims = read("digits_seeds"), read("digits_claims")
    picture(digits["summary"], PICTURE)
    PAGE.write_text(page(digits, claims))
    ablation_page.picture(ablations(), PAGE.parent / ablation_page.PICTURE)
    README.write_text(readme(README.read_text(), digits, read("cifar10_fast")))
    print(f"wrote {PAGE.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)} and the results in {README.name}")


def read(name: str) -> dict[str, Any]:
    """experiments/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def ablations() -> dict[str, Any]:
    """What ablation.py stored of each data set."""
    return {name: ablation.read(name) for name in ablation.BENCHES}


def readme(text: str, digits: Numbers, cifar10: Numbers) -> str:
    """The README with its results between the marks replaced."""
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{_short(digits)}\n\n{cifar10_page.short(cifar10)}\n{MARKS[1]}{after}"


def page(digits: Numbers, claims: Numbers) -> str:
    """docs/results.md."""
    summary = digits["summary"]
    parts = [
        "# Results",
        "Made by `python experiments/results_page.py` from the raw results in "
        "[experiments/results](../experiments/results); each names the command that made it. None of the paper's "
        "own CIFAR-10, CIFAR-100 and SVHN runs has been trained to its end with this program yet; a shorter one of "
        "CIFAR-10 has, [below](#cifar-10-in-three-minutes-on-one-gpu).",
        "## Digits: a JEM beside the classifier of the same shape",
        f"{_of_what(digits)}. The classifier is the same WRN-10-1 with the same schedule and augmentation, trained by "
        "cross-entropy alone. Means over the seeds, in brackets the least and the greatest. One run takes "
        f"{_range(summary['command']['command_seconds'], 's')}, of which training "
        f"{_range(summary['command']['training_seconds'], 's')} and the report "
        f"{_range(summary['command']['evaluation_seconds'], 's')}, with at most "
        f"{summary['command']['peak_memory_mib']['high']:.0f} MiB of memory.",
        "![Samples, detection and robustness of the two models](images/digits_results.png)",
        "### As classifiers",
        _classifying(summary),
        "JEM is **less** well calibrated here: it is underconfident. Temperature scaling is fitted on 130 validation "
        "images, which is too few for a classifier that makes hardly a mistake on them: where the fitted temperature "
        "is small, the scaled NLL of the test images is large.",
        "### Out-of-distribution detection",
        "AUROC with the 500 test images inside; the better of the two models in bold. 0.5 is chance. The log density "
        "and the gradient mean something in the JEM; the classifier's max p is the better score on some sets.",
        _detecting(summary),
        "### Adversarial attacks",
        "Accuracy under PGD of 20 steps, ε in [0, 1] pixels, 500 test images.",
        *(_attacking(summary, norm) for norm in ("linf", "l2")),
        "JEM-n classifies after n SGLD steps, averaged over 5 chains from noisy copies of the input; 50 test images, "
        "L∞. The official attack passes the gradient at the chain's end straight to the input; backpropagated through "
        "the chain it is stronger, and that is the number to go by.",
        _refined(summary),
        "### Distal adversarials and samples",
        _drawing(summary),
        "![The replay buffer, one row a predicted class](../experiments/results/digits_buffer.png)",
        "The first ten chains of each predicted class in the replay buffer of seed 0, none chosen.",
        "## Digits: two of the paper's claims",
        f"{_of_what(claims)}; accuracy, in brackets the least and the greatest. With few labels p(y|x) learns from "
        "those and p(x) from all images; the classifier has the labelled images alone.",
        _claims(claims["summary"]),
        ablation_page.section(ablations()),
        fashion_mnist_page.section(read("fashion_mnist")),
        cifar10_page.section(read("cifar10_fast")),
        *divergence_page.sections(RESULTS / "divergence.json"),
    ]
    return "\n\n".join(parts) + "\n"


def picture(summary: Numbers, path: Path) -> None:
    """Samples, AUROC and robustness side by side."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), width_ratios=(1, 1.15, 1), layout="constrained")
        axes[0].imshow(mpl_image.imread(RESULTS / "digits_buffer.png"), cmap="gray", interpolation="nearest")
        axes[0].set_axis_off()
        axes[0].set_title("samples: the replay buffer, by class")
        _draw_detection(axes[1], summary)
        _draw_robustness(axes[2], summary)
        figures.save(figure, path)


def _draw_detection(axis: Any, summary: Numbers) -> None:
    sets = list(summary["jem"]["auroc"])
    for offset, (model, title) in zip((-0.14, 0.14), MODELS.items(), strict=True):
        values = [summary[model]["auroc"][name]["approximate_mass"] for name in sets]
        means = [value["mean"] for value in values]
        spans = [
            [value["mean"] - value["low"] for value in values],
            [value["high"] - value["mean"] for value in values],
        ]
        heights = [place + offset for place in range(len(sets))]
        marker = "o" if model == "jem" else "s"
        axis.errorbar(means, heights, xerr=spans, fmt=marker, color=figures.COLOURS[model], label=title, capsize=2)
    axis.axvline(0.5, color="#888888", linestyle="--", linewidth=1)
    axis.text(0.51, 6.5, "chance", color="#555555", fontsize=9)
    axis.set(yticks=range(len(sets)), yticklabels=[_words(name) for name in sets], xlim=(0, 1.02), ylim=(6.6, -0.7),
             xlabel="AUROC of -|∇ log p~(x)|", title="which images are not digits?")  # fmt: skip
    axis.legend(loc="upper left", frameon=False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)


def _draw_robustness(axis: Any, summary: Numbers) -> None:
    for model, title in MODELS.items():
        values = summary[model]["pgd"]["linf"]
        sizes = [float(epsilon) for epsilon in values]
        style = "o-" if model == "jem" else "s--"
        axis.plot(sizes, [100 * value["mean"] for value in values.values()], style, color=figures.COLOURS[model],
                  label=title)  # fmt: skip
        low, high = ([100 * value[end] for value in values.values()] for end in ("low", "high"))
        axis.fill_between(sizes, low, high, color=figures.COLOURS[model], alpha=0.2, linewidth=0)
    axis.set(xlabel="L∞ ε, [0, 1] pixels", ylabel="accuracy, %", ylim=(-2, 102), title="under attack (PGD-20)")
    axis.legend(frameon=False)
    axis.grid(color="#dddddd", linewidth=0.6)


def _short(digits: Numbers) -> str:
    summary = digits["summary"]
    auroc = lambda model, name: _plain(summary[model]["auroc"][name]["approximate_mass"])  # noqa: E731
    rows = [
        ("accuracy", *(_percent(summary[model]["accuracy"]) for model in MODELS)),
        ("calibration error (ECE, 15 bins)", *(_percent(summary[model]["ece"]) for model in MODELS)),
        *(
            (f"AUROC of -\\|∇ log p~(x)\\|, {words}", *(auroc(model, name) for model in MODELS))
            for name, words in (
                ("midpoints_of_classes", "midpoints of two classes"),
                ("rotated", "rotated digits"),
                ("photographs", "patches of photographs"),
            )
        ),
        (
            "AUROC of max p(y\\|x), midpoints of two classes",
            *(_plain(summary[model]["auroc"]["midpoints_of_classes"]["max_posterior"]) for model in MODELS),
        ),
        ("accuracy under PGD-20, L∞ ε 0.1", *(_percent(summary[model]["pgd"]["linf"]["0.1"]) for model in MODELS)),
        ("accuracy under PGD-20, L2 ε 0.5", *(_percent(summary[model]["pgd"]["l2"]["0.5"]) for model in MODELS)),
    ]
    lines = table(("", "JEM", "plain classifier"), rows)
    command = summary["command"]
    return (
        f"{_of_what(digits)}; means, in brackets the least and the greatest:\n\n{lines}\n\n"
        "The JEM is as accurate, notices what is no digit by the gradient of its log density, withstands larger "
        "attacks, and draws digits. It is *less* well calibrated here, being underconfident, and its max p(y|x) "
        "detects less on some sets. The whole command took "
        f"{_range(command['command_seconds'], 's')} and at most {command['peak_memory_mib']['high']:.0f} MiB of memory."
        f"\n\n{divergence_page.in_a_sentence(RESULTS / 'divergence.json')}"
    )


def _of_what(result: Numbers) -> str:
    runs = result["runs"]
    seeds = len(runs if isinstance(runs, list) else next(iter(runs.values())))
    return f"{seeds} seeds, 500 test images, on {result['cores']} CPU cores (`{result['command']}`)"


def _classifying(summary: Numbers) -> str:
    columns = (
        ("accuracy", "accuracy", "_percent"), ("NLL, nats", "nll", ""), ("Brier", "brier", ""),
        ("ECE", "ece", "_percent"), ("ECE, scaled", "ece_scaled", "_percent"), ("NLL, scaled", "nll_scaled", ""),
    )  # fmt: skip
    rows = [
        (
            title,
            *(
                (_percent if how else _plain)(summary[model][name]) if name in summary[model] else "–"
                for _, name, how in columns
            ),
        )
        for model, title in MODELS.items()
    ]
    return table(("", *(title for title, _, _ in columns)), rows)


def _detecting(summary: Numbers) -> str:
    sets = list(summary["jem"]["auroc"])
    rows = []
    for score in SCORES:
        for model, title in MODELS.items():
            cells = []
            for name in sets:
                both = {other: summary[other]["auroc"][name][score]["mean"] for other in MODELS}
                cell = _plain(summary[model]["auroc"][name][score])
                cells.append(f"**{cell}**" if both[model] == max(both.values()) else cell)
            formula = ood.SCORES[score].replace("|", "\\|")
            rows.append((f"{formula}, {title}", *cells))
    return table(("score", *(_words(name) for name in sets)), rows)


def _attacking(summary: Numbers, norm: str) -> str:
    epsilons = list(summary["jem"]["pgd"][norm])
    rows = [
        (title, *(_percent(summary[model]["pgd"][norm][epsilon]) for epsilon in epsilons))
        for model, title in MODELS.items()
    ]
    return table((f"{'L∞' if norm == 'linf' else 'L2'} ε", *epsilons), rows)


def _refined(summary: Numbers) -> str:
    found = summary["jem"]["pgd_refined"]
    epsilons = list(next(iter(found.values())))
    rows = []
    for name, values in found.items():
        _, steps, mode = name.split("_", 2)
        how = "" if steps == "0" else f", {mode.replace('_', ' ')}"
        rows.append((f"JEM-{steps}{how}", *(_percent(values[epsilon]) for epsilon in epsilons)))
    return table(("L∞ ε", *epsilons), rows)


def _drawing(summary: Numbers) -> str:
    jem, other = summary["jem"]["distal"], summary["baseline"]["distal"]
    buffer, fresh = summary["replay_buffer"], summary["fresh_chains"]
    agreed = "taken_for_the_class_by_the_other"
    return (
        "From noise until it is 90 % sure of a class, 50 images: what the JEM arrives at, the classifier takes for the "
        f"same class in {_percent(jem[agreed])} of cases; what the classifier arrives at, the JEM does in "
        f"{_percent(other[agreed])}. Median steps: {jem['median_steps']['mean']:.0f} and "
        f"{other['median_steps']['mean']:.0f}.\n\n"
        "The whole replay buffer, clipped to [-1, 1], is labelled by the separately trained classifier with a mean "
        f"confidence of {_plain(buffer['mean_confidence'])}; the rarest class is {_percent(buffer['rarest_class'])} of "
        f"it and the commonest {_percent(buffer['commonest_class'])}. Chains that start afresh and take 1,000 steps: "
        f"{_plain(fresh['mean_confidence'])}; {_percent(fresh['rarest_class'])} and "
        f"{_percent(fresh['commonest_class'])}."
    )


def _claims(summary: Numbers) -> str:
    rows = [
        (name.replace("|", "\\|"), *(
            f"{100 * values[model]['accuracy_mean']:.1f} % "
            f"({100 * values[model]['accuracy_min']:.1f} to {100 * values[model]['accuracy_max']:.1f})"
            for model in MODELS
        ), *(f"{100 * values[model]['ece_mean']:.1f} %" for model in MODELS))
        for name, values in summary.items()
    ]  # fmt: skip
    return table(("training", "JEM", "classifier", "JEM's ECE", "classifier's ECE"), rows)


def _percent(value: Numbers) -> str:
    mean, low, high = (100 * value[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def _plain(value: Numbers) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _range(value: Numbers, unit: str) -> str:
    return f"{value['low']:.0f} to {value['high']:.0f} {unit}"


def _words(name: str) -> str:
    return re.sub("_", " ", name)


if __name__ == "__main__":
    main()
