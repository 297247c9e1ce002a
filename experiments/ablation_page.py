"""The section of docs/results.md about the parts of SADA-JEM, and its figure, from what ablation.py stored."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from jem_jax.report import figures

Numbers = Mapping[str, Any]
PICTURE = "images/ablation.png"
_SETS = ("midpoints_of_classes", "rotated", "photographs")
_ATTACK = "under PGD, %"
COLUMNS: dict[str, tuple[Callable[[Numbers], float], str]] = {
    "accuracy, %": (lambda run: 100 * run["accuracy"], "{:.1f}"),
    "ECE, %": (lambda run: 100 * run["ece"], "{:.1f}"),
    "AUROC of -\\|∇ log p~(x)\\|": (
        lambda run: statistics.mean(run["auroc"][name]["approximate_mass"] for name in _SETS),
        "{:.2f}",
    ),
    _ATTACK: (lambda run: 100 * run["pgd_linf"], "{:.0f}"),
    "buffer's Fréchet distance": (lambda run: run["buffer"]["frechet_distance"], "{:.0f}"),
    "buffer's confidence": (lambda run: run["buffer"]["mean_confidence"], "{:.2f}"),
    "training, s": (lambda run: run["training_seconds"], "{:.0f}"),
    "recoveries": (lambda run: run["recoveries"], "{:.1f}"),
}
_DRAWN = ("accuracy, %", _ATTACK, "buffer's Fréchet distance", "training, s")
BENCHES = {
    "digits": ("digits", "the digits of configs/digits.py, 720 iterations", "0.1"),
    "fashion_mnist": (
        "Fashion-MNIST",
        "27,000 images of Fashion-MNIST at 16×16, 421 iterations of configs/fashion_mnist.py with the paper's step "
        "size of 1, a learning rate of 1e-3, and at first neither clip",
        "0.03",
    ),
}
"""{name: (title, what, ε of PGD)}"""


def section(stored: Mapping[str, Numbers]) -> str:
    """The tables, in words that hold for any outcome.

    Args:
      stored: {name of a bench: what ablation.py stored of it}.
    """
    tables = "\n\n".join(_table(name, of) for name, of in stored.items())
    return (
        "## From JEM to SADA-JEM, part by part\n\n"
        "Each row has one part more than the one above, with 10 SGLD steps; below, other numbers of steps. Means over "
        "seeds, in brackets the least and the greatest. AUROC is the mean over midpoints of two classes, rotated "
        "images and photographs; the buffers of a data set are judged by the features and predictions of one plain "
        f"classifier, of another seed.\n\n{tables}\n\n![Four of these columns]({PICTURE})"
    )


def _table(name: str, stored: Numbers) -> str:
    runs = _by_variant(stored)
    title, what, epsilon = BENCHES[name]
    rows = []
    for variant, some in runs.items():
        whole = [run for run in some if "failed" not in run]
        cells = [_spread([value(run) for run in whole], how) if whole else "" for value, how in COLUMNS.values()]
        rows.append((variant, *cells, f"{len(some) - len(whole)} of {len(some)}"))
    lines = [("", *COLUMNS, "without a model"), ["---"] * (len(COLUMNS) + 2), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    seeds = max(len(some) for some in runs.values())
    return (
        f"**{title}**: {what}; PGD within L∞ {epsilon}; {seeds} seeds, on {stored['cores']} CPU cores "
        f"(`{stored['command']}`).\n\n{table}"
    )


def picture(stored: Mapping[str, Numbers], path: Path) -> None:
    """Four columns as points, one row a variant, one row of axes a data set.

    Args:
      stored: as in `section`.
      path: of the PNG.
    """
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        size = (13, 3.7 * len(stored))
        figure, grid = pyplot.subplots(len(stored), len(_DRAWN), figsize=size, layout="constrained", squeeze=False)
        for axes, (name, of) in zip(grid, stored.items(), strict=True):
            runs = _by_variant(of)
            for axis, column in zip(axes, _DRAWN, strict=True):
                value = COLUMNS[column][0]
                for row, some in enumerate(runs.values()):
                    found = [value(run) for run in some if "failed" not in run]
                    axis.plot(found, [row] * len(found), "o", color=figures.COLOURS["jem"], alpha=0.5)
                    if found:
                        axis.plot(statistics.mean(found), row, "|", color="black", ms=14)
                names = list(runs) if axis is axes[0] else []
                axis.set(title=column, yticks=range(len(runs)), ylim=(len(runs) - 0.5, -0.5))
                axis.set_yticklabels(names or [""] * len(runs))
                axis.grid(color="#dddddd", linewidth=0.6)
            axes[0].set_title(f"{BENCHES[name][0]}: {_DRAWN[0]}")
        figures.save(figure, path)


def _by_variant(stored: Numbers) -> dict[str, list[Numbers]]:
    runs: dict[str, list[Numbers]] = {}
    for name, run in stored["runs"].items():
        runs.setdefault(name.rpartition("/")[0], []).append(run)
    return runs


def _spread(values: Sequence[float], how: str) -> str:
    return f"{how.format(statistics.mean(values))} ({how.format(min(values))} to {how.format(max(values))})"
