"""The section of docs/results.md about the parts of SADA-JEM, and its figure, from what ablation.py stored."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from ablation import BENCHES

matplotlib.use("Agg")
from matplotlib import pyplot

from jem_jax.report import figures

Numbers = Mapping[str, Any]
PICTURE = "images/ablation.png"
_PUBLISHED = ("accuracy", "buffer's Fréchet distance")
_SETS = ("midpoints_of_classes", "rotated", "photographs")
_ATTACK = "under PGD, %"
_DETECTION = "AUROC of -\\|∇ log p~(x)\\|"
_FRECHET = "buffer's Fréchet distance"
_TIME = "training, s"
_LEAST_SEEDS = 2
COLUMNS: dict[str, tuple[Callable[[Numbers], float], str, int]] = {
    "accuracy, %": (lambda run: 100 * run["accuracy"], "{:.1f}", 1),
    "ECE, %": (lambda run: 100 * run["ece"], "{:.1f}", -1),
    _DETECTION: (lambda run: _auroc(run, "approximate_mass"), "{:.2f}", 1),
    "AUROC of log p~(x)": (lambda run: _auroc(run, "log_density"), "{:.2f}", 1),
    _ATTACK: (lambda run: 100 * run["pgd_linf"], "{:.0f}", 1),
    _FRECHET: (lambda run: run["buffer"]["frechet_distance"], "{:.1f}", -1),
    "buffer's confidence": (lambda run: run["buffer"]["mean_confidence"], "{:.2f}", 1),
    _TIME: (lambda run: run["training_seconds"], "{:.0f}", -1),
    "recoveries": (lambda run: run["recoveries"], "{:.1f}", -1),
}
"""{name: (value of a run, how it is written, 1 where more is better and -1 where less is)}"""
_DRAWN = ("accuracy, %", _DETECTION, _ATTACK, _FRECHET, _TIME)
WHAT = {
    "digits": ("digits", "the digits of configs/digits.py, 720 iterations"),
    "fashion_mnist": (
        "Fashion-MNIST",
        "27,000 images of Fashion-MNIST at 16×16, some 420 iterations of configs/fashion_mnist.py with the paper's "
        "step size of 1, a learning rate of 1e-3, and at first neither clip",
    ),
}
"""{name of a bench: (title, what)}"""


def section(stored: Mapping[str, Numbers]) -> str:
    """The tables, in words that hold for any outcome.

    Args:
      stored: {name of a bench: what ablation.py stored of it}.
    """
    tables = "\n\n".join(_table(name, of) for name, of in stored.items())
    return (
        "## From JEM to SADA-JEM, part by part\n\n"
        "Each row has one part more than the one above, with 10 SGLD steps; below, other numbers of steps. Means over "
        "seeds, in brackets the least and the greatest. AUROC is a mean over midpoints of two classes, rotated "
        "images and photographs; the buffers of a data set are judged by the features and predictions of one plain "
        "classifier, of another seed, against the training images as they are. JEM's p(x) learns from shifted ones, "
        "and so do all rows above the separate branches: part of their distance is that. Times are of a machine that "
        "did other work as well.\n\n"
        f"{tables}\n\n![Some of these columns]({PICTURE})"
    )


def _table(name: str, stored: Numbers) -> str:
    runs = _by_variant(stored)
    title, what = WHAT[name]
    rows = []
    for variant, some in runs.items():
        found = [_values(some, column) for column in COLUMNS]
        cells = [_spread(values, COLUMNS[column][1]) for values, column in zip(found, COLUMNS, strict=True)]
        failed = sum("failed" in run for run in some)
        rows.append((variant, *cells, f"{failed} of {len(some)}"))
    lines = [("", *COLUMNS, "without a model"), ["---"] * (len(COLUMNS) + 2), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    seeds = max(len(some) for some in runs.values())
    return (
        f"**{title}**: {what}; PGD within L∞ {BENCHES[name].attack}; {seeds} seeds, on {stored['cores']} CPU cores "
        f"(`{stored['command']}`).\n\n{table}\n\n{_changes(runs)}"
    )


def _changes(runs: Mapping[str, Sequence[Numbers]]) -> str:
    """What each part changed, and whether the published gains of the whole show."""
    parts = [name for name in runs if " K " not in name]
    lines = []
    for before, after in itertools.pairwise(parts):
        lines.append(f"- **{after}**: {_change(runs[before], runs[after])}.")
    better, worse = _apart(runs[parts[0]], runs[parts[-1]])
    gains = "; ".join(f"{column}, {'' if column in better else 'not '}seen here" for column in _PUBLISHED)
    losses = f" Worse than JEM's: {', '.join(worse)}." if worse else ""
    return (
        "A change beside the row above counts as seen where no seed of one row reaches a seed of the other.\n\n"
        + "\n".join(lines)
        + f"\n\nWhat the papers report of the whole on CIFAR-10: {gains}.{losses}"
    )


def _change(before: Sequence[Numbers], after: Sequence[Numbers]) -> str:
    if min(sum("failed" not in run for run in some) for some in (before, after)) < _LEAST_SEEDS:
        return "too few seeds ended with a model to say"
    better, worse = _apart(before, after)
    changes = [f"better {', '.join(better)}"] * bool(better) + [f"worse {', '.join(worse)}"] * bool(worse)
    return "; ".join(changes) or "nothing is apart"


def _apart(before: Sequence[Numbers], after: Sequence[Numbers]) -> tuple[list[str], list[str]]:
    """Columns in which all seeds of `after` are better than all of `before`, and those in which all are worse."""
    better, worse = [], []
    for column, (_, _, sign) in COLUMNS.items():
        old, new = ([sign * value for value in _values(some, column)] for some in (before, after))
        # Times are of a machine that did other work.
        if column == _TIME or not (old and new):
            continue
        if min(new) > max(old):
            better.append(column.partition(", ")[0])
        elif max(new) < min(old):
            worse.append(column.partition(", ")[0])
    return better, worse


def _auroc(run: Numbers, score: str) -> float:
    """The mean over sets of other images."""
    return statistics.mean(run["auroc"][name][score] for name in _SETS)


def _values(some: Sequence[Numbers], column: str) -> list[float]:
    """A column of the runs that ended with a model."""
    return [COLUMNS[column][0](run) for run in some if "failed" not in run]


def picture(stored: Mapping[str, Numbers], path: Path) -> None:
    """Some columns as points, one row a variant, one row of axes a data set.

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
                for row, some in enumerate(runs.values()):
                    found = _values(some, column)
                    axis.plot(found, [row] * len(found), "o", color=figures.COLOURS["jem"], alpha=0.5)
                    if found:
                        axis.plot(statistics.mean(found), row, "|", color="black", ms=14)
                    elif axis is axes[0]:
                        axis.text(0.5, row, "no model", transform=axis.get_yaxis_transform(), ha="center", va="center")
                axis.set(title=column.replace("\\", ""), yticks=range(len(runs)), ylim=(len(runs) - 0.5, -0.5))
                axis.set_yticklabels(list(runs) if axis is axes[0] else [""] * len(runs))
                axis.grid(color="#dddddd", linewidth=0.6)
            axes[_DRAWN.index(_FRECHET)].set_xscale("log")
            axes[0].set_ylabel(WHAT[name][0], fontsize=12)
        figures.save(figure, path)


def _by_variant(stored: Numbers) -> dict[str, list[Numbers]]:
    runs: dict[str, list[Numbers]] = {}
    for name, run in stored["runs"].items():
        runs.setdefault(name.rpartition("/")[0], []).append(run)
    return runs


def _spread(values: Sequence[float], how: str) -> str:
    if not values:
        return ""
    return f"{how.format(statistics.mean(values))} ({how.format(min(values))} to {how.format(max(values))})"
