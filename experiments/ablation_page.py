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
COLUMNS: dict[str, tuple[Callable[[Numbers], float], str]] = {
    "accuracy, %": (lambda run: 100 * run["accuracy"], "{:.1f}"),
    "ECE, %": (lambda run: 100 * run["ece"], "{:.1f}"),
    "AUROC of -\\|∇ log p~(x)\\|": (
        lambda run: statistics.mean(run["auroc"][name]["approximate_mass"] for name in _SETS),
        "{:.2f}",
    ),
    "PGD L∞ 0.1, %": (lambda run: 100 * run["pgd_linf_0.1"], "{:.0f}"),
    "buffer's Fréchet distance": (lambda run: run["buffer"]["frechet_distance"], "{:.2f}"),
    "buffer's confidence": (lambda run: run["buffer"]["mean_confidence"], "{:.3f}"),
    "training, s": (lambda run: run["training_seconds"], "{:.0f}"),
    "recoveries": (lambda run: run["recoveries"], "{:.1f}"),
}
_DRAWN = ("accuracy, %", "PGD L∞ 0.1, %", "buffer's Fréchet distance", "training, s")


def section(stored: Numbers) -> str:
    """The table, in words that hold for any outcome."""
    runs = _by_variant(stored)
    seeds = max(len(some) for some in runs.values())
    rows = []
    for name, some in runs.items():
        whole = [run for run in some if "failed" not in run]
        cells = [_spread([value(run) for run in whole], how) if whole else "" for value, how in COLUMNS.values()]
        rows.append((name, *cells, f"{len(some) - len(whole)} of {len(some)}"))
    lines = [("", *COLUMNS, "without a model"), ["---"] * (len(COLUMNS) + 2), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "## Digits: from JEM to SADA-JEM\n\n"
        f"{seeds} seeds at most, on {stored['cores']} CPU cores (`{stored['command']}`); means, in brackets the least "
        "and the greatest. Each row has one part more than the one above, with 10 SGLD steps; below, other numbers of "
        "steps. AUROC is the mean over midpoints of two classes, rotated digits and photographs; all buffers are "
        "judged by the features and predictions of one plain classifier, of another seed.\n\n"
        f"{table}\n\n![Four of these columns]({PICTURE})"
    )


def picture(stored: Numbers, path: Path) -> None:
    """Four columns as points, one row a variant."""
    runs = _by_variant(stored)
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, len(_DRAWN), figsize=(13, 4), sharey=True, layout="constrained")
        for axis, column in zip(axes, _DRAWN, strict=True):
            value = COLUMNS[column][0]
            for row, some in enumerate(runs.values()):
                found = [value(run) for run in some if "failed" not in run]
                axis.plot(found, [row] * len(found), "o", color=figures.COLOURS["jem"], alpha=0.5)
                if found:
                    axis.plot(statistics.mean(found), row, "|", color="black", ms=14)
            axis.set(title=column, yticks=range(len(runs)), yticklabels=list(runs), ylim=(len(runs) - 0.5, -0.5))
            axis.grid(color="#dddddd", linewidth=0.6)
        figures.save(figure, path)


def _by_variant(stored: Numbers) -> dict[str, list[Numbers]]:
    runs: dict[str, list[Numbers]] = {}
    for name, run in stored["runs"].items():
        runs.setdefault(name.rpartition("/")[0], []).append(run)
    return runs


def _spread(values: Sequence[float], how: str) -> str:
    return f"{how.format(statistics.mean(values))} ({how.format(min(values))} to {how.format(max(values))})"
