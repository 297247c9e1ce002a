"""Draws the figures of the pages from the raw results: docs/pages/images/digits_results.png and ablation.png.

python -m experiments.make_figures
"""

import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import image, pyplot

from experiments.make_tables import GRADIENT, MODELS, Numbers, by_variant, column_values, read, words
from experiments.runs import IMAGES
from jem_jax.report import figures

STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
BENCHES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
COLUMNS = ("accuracy, %", GRADIENT, "under PGD, %", "buffer's Fréchet distance", "training, s")
LOGARITHMIC = "buffer's Fréchet distance"


def main() -> None:
    with matplotlib.rc_context(STYLE):
        digits(read("digits_seeds")["summary"])
        ablation()


def digits(summary: Numbers) -> None:
    """Samples, AUROC and robustness side by side."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), width_ratios=(1, 1.15, 1), layout="constrained")
    axes[0].imshow(image.imread(IMAGES / "digits_buffer.png"), cmap="gray", interpolation="nearest")
    axes[0].set_axis_off()
    axes[0].set_title("samples: the replay buffer, by class")
    draw_detection(axes[1], summary)
    draw_robustness(axes[2], summary)
    figures.save(figure, IMAGES / "digits_results.png")


def draw_detection(axis: Any, summary: Numbers) -> None:
    """AUROC on every outside set: means, and lines from the least to the greatest."""
    sets = list(summary["jem"]["auroc"])
    for offset, (model, title) in zip((-0.14, 0.14), MODELS.items(), strict=True):
        values = [summary[model]["auroc"][name]["approximate_mass"] for name in sets]
        means = [value["mean"] for value in values]
        spans = [
            [value["mean"] - value["low"] for value in values],
            [value["high"] - value["mean"] for value in values],
        ]
        heights = [row + offset for row in range(len(sets))]
        marker = "o" if model == "jem" else "s"
        axis.errorbar(means, heights, xerr=spans, fmt=marker, color=figures.COLOURS[model], label=title, capsize=2)
    axis.axvline(0.5, color="#888888", linestyle="--", linewidth=1)
    axis.text(0.51, 6.5, "chance", color="#555555", fontsize=9)
    axis.set(yticks=range(len(sets)), yticklabels=[words(name) for name in sets], xlim=(0, 1.02), ylim=(6.6, -0.7),
             xlabel="AUROC of -|∇ log p~(x)|", title="out-of-distribution detection")  # fmt: skip
    axis.legend(loc="upper left", frameon=False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)


def draw_robustness(axis: Any, summary: Numbers) -> None:
    """Accuracy over the size of an attack; bands from the least to the greatest."""
    for model, title in MODELS.items():
        values = summary[model]["pgd"]["linf"]
        sizes = [float(epsilon) for epsilon in values]
        means, low, high = ([100 * value[name] for value in values.values()] for name in ("mean", "low", "high"))
        axis.plot(sizes, means, "o-" if model == "jem" else "s--", color=figures.COLOURS[model], label=title)
        axis.fill_between(sizes, low, high, color=figures.COLOURS[model], alpha=0.2, linewidth=0)
    axis.set(xlabel="L∞ ε, [0, 1] pixels", ylabel="accuracy, %", ylim=(-2, 102), title="under attack (PGD-20)")
    axis.legend(frameon=False)
    axis.grid(color="#dddddd", linewidth=0.6)


def ablation() -> None:
    """Some columns of the ablation as points, one row a variant, one row of axes a data set."""
    size = (13, 3.7 * len(BENCHES))
    figure, grid = pyplot.subplots(len(BENCHES), len(COLUMNS), figsize=size, layout="constrained", squeeze=False)
    for axes, (name, title) in zip(grid, BENCHES.items(), strict=True):
        variants = by_variant(read(f"ablation_{name}"))
        for axis, column in zip(axes, COLUMNS, strict=True):
            for row, runs in enumerate(variants.values()):
                values = column_values(runs, column)
                axis.plot(values, [row] * len(values), "o", color=figures.COLOURS["jem"], alpha=0.5)
                if values:
                    axis.plot(statistics.mean(values), row, "|", color="black", ms=14)
            axis.set(title=column.replace("\\", ""), yticks=range(len(variants)), ylim=(len(variants) - 0.5, -0.5))
            axis.set_yticklabels(list(variants) if axis is axes[0] else [""] * len(variants))
            axis.grid(color="#dddddd", linewidth=0.6)
            if column == LOGARITHMIC:
                axis.set_xscale("log")
        axes[0].set_ylabel(title, fontsize=12)
    figures.save(figure, IMAGES / "ablation.png")


if __name__ == "__main__":
    main()
