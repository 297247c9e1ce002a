"""The report's plots, in one style: two colours that colour-blind readers tell apart, units on every axis."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jem_jax.common import files
from jem_jax.evaluation.calibration import Reliability
from jem_jax.report.inputs import TITLES
from jem_jax.runs import fonts, image_grid

COLOURS = {"jem": "#0072B2", "baseline": "#D55E00"}
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    # Names from outside are words, whatever dollar signs they hold.
    "text.parse_math": False,
}


class AttackLine(NamedTuple):
    """Accuracy of one model over ε."""

    name: str
    colour: str
    style: str
    epsilons: Sequence[float]
    accuracies: Sequence[float]


class TrainingLine(NamedTuple):
    """One metric over iterations."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def save(figure: Any, path: Path) -> Path:
    """Writes the PNG whole or not at all, and makes its folder."""
    with files.whole(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": image_grid.MADE_BY})
    return path


@contextmanager
def _drawn(
    path: Path,
    rows: int,
    columns: int,
    style: Mapping[str, Any] | None = None,
    figsize: tuple[float, float] | None = None,
    **how: Any,
) -> Iterator[Any]:
    """Axes [rows, columns] to draw in; at the end the PNG is written.

    Args:
      style: more of matplotlib's settings.
      how: more of what `Figure.subplots` takes, and `figsize`.
    """
    fonts.import_matplotlib()
    from matplotlib import style as styles
    from matplotlib.figure import Figure

    # Neither pyplot, whose backend is the user's, nor the settings of a matplotlibrc, such as LaTeX for every text.
    with styles.context(["default", {**_STYLE, **(style or {})}]):
        figure = Figure(figsize=figsize)
        yield figure.subplots(rows, columns, squeeze=False, **how)
        save(figure, path)


def confusion(counts: Mapping[str, np.ndarray], class_names: Sequence[str], path: Path) -> Path:
    """Confusion matrices side by side; counts are written where there are few classes."""
    few = len(class_names) <= 12
    style = {"axes.grid": False, "font.family": fonts.families(class_names if few else ())}
    class_names = [fonts.written(name)[0] for name in class_names]
    # Inches, with room for names of more than a few characters on both sides.
    side = 4.2 + 0.085 * max(0, max(map(len, class_names)) - 6) * few
    with _drawn(path, 1, len(counts), style, figsize=(side * len(counts), side)) as axes:
        for axis, (name, matrix) in zip(axes[0], counts.items(), strict=True):
            axis.imshow(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
            axis.set(title=TITLES[name], xlabel="predicted class", ylabel="class")
            if few:
                places = range(len(class_names))
                turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
                axis.set_xticks(places, class_names, **({} if max(map(len, class_names)) < 3 else turned))
                axis.set_yticks(places, class_names)
                for (row, column), count in np.ndenumerate(matrix):
                    if count:
                        light = count > matrix[row].sum() / 2
                        colour = "white" if light else "black"
                        axis.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    return path


def reliability(diagrams: Mapping[str, tuple[str, Reliability]], path: Path) -> Path:
    """Reliability diagrams side by side: accuracy of each bin over its confidence, and how many examples it holds.

    Args:
      diagrams: name -> title and diagram.
    """
    size = (3.1 * len(diagrams), 4.2)
    with _drawn(path, 2, len(diagrams), figsize=size, height_ratios=(3, 1), sharex=True) as axes:
        for column, (name, (title, diagram)) in enumerate(diagrams.items()):
            colour = COLOURS[name.partition(" ")[0]]
            widths, middles = np.diff(diagram.edges), (diagram.edges[1:] + diagram.edges[:-1]) / 2
            top, bottom = axes[:, column]
            top.bar(middles, diagram.accuracy, widths, color=colour, alpha=0.75, edgecolor="white", linewidth=0.5)
            top.plot([0, 1], [0, 1], "--", color="#444444", linewidth=1)
            top.set(title=title, xlim=(0, 1), ylim=(0, 1))
            bottom.bar(middles, diagram.counts / diagram.counts.sum(), widths, color="#999999", edgecolor="white")
            bottom.set(xlabel="confidence")
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share")
    return path


def histograms(
    scores: Mapping[str, Mapping[str, np.ndarray]], sets: Sequence[str], formulas: Mapping[str, str], path: Path
) -> Path:
    """Histograms of scores: a row for each model and score, test images against each set.

    Args:
      scores: row title -> set -> [N]; the set "test" is drawn in grey in every column.
      sets: the columns.
      formulas: row title -> axis label.
    """
    size = (1.6 * len(sets), 1.5 * len(scores))
    style = {"font.size": 8, "font.family": fonts.families(sets)}
    with _drawn(path, len(scores), len(sets), style, figsize=size) as axes:
        for row, (title, by_set) in enumerate(scores.items()):
            colour = COLOURS["jem" if title.startswith(TITLES["jem"]) else "baseline"]
            for column, name in enumerate(sets):
                axis = axes[row, column]
                both = np.concatenate([by_set["test"], by_set[name]])
                finite = both[np.isfinite(both)]
                low, high = np.quantile(finite, [0.005, 0.995]) if len(finite) else (0, 1)
                bins = np.linspace(low, high if high > low else low + 1, 30)
                for values, shade, label in ((by_set["test"], "#999999", "test"), (by_set[name], colour, name)):
                    heights = np.histogram(np.clip(values, low, high), bins, density=True)[0]
                    axis.stairs(heights, bins, fill=True, color=shade, alpha=0.6, label=label)
                axis.set_yticks([])
                axis.locator_params(axis="x", nbins=3)
                if row == 0:
                    axis.set_title(fonts.written(name)[0].replace("_", " "), fontsize=8)
                if column == 0:
                    # Model, score and formula on lines of their own: a row is too low for two of them in one line.
                    axis.set_ylabel("\n".join([*title.split(", ", 1), formulas[title]]))
    return path


def curves(panels: Sequence[tuple[str, str, Sequence[AttackLine]]], path: Path) -> Path:
    """Accuracy against ε, one panel a norm: (title, label of the ε axis, lines)."""
    with _drawn(path, 1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True) as axes:
        for axis, (title, label, lines) in zip(axes[0], panels, strict=True):
            for line in lines:
                heights = [100 * value for value in line.accuracies]
                axis.plot(line.epsilons, heights, line.style, color=line.colour, label=line.name, ms=4)
            axis.set(title=title, xlabel=label, ylim=(-2, 102))
            axis.legend(fontsize=8)
        axes[0, 0].set_ylabel("accuracy under attack, %")
    return path


def training(series: Mapping[str, tuple[str, Sequence[TrainingLine]]], path: Path) -> Path:
    """Metrics over iterations: panel title -> (axis label, lines)."""
    with _drawn(path, 1, len(series), figsize=(4 * len(series), 3.2)) as axes:
        for axis, (title, (label, lines)) in zip(axes[0], series.items(), strict=True):
            for line, colour in zip(lines, ("#0072B2", "#D55E00", "#009E73"), strict=False):
                axis.plot(line.steps, line.values, color=colour, label=line.name, linewidth=1.2)
            axis.set(title=title, xlabel="iteration", ylabel=label)
            axis.legend(fontsize=8)
    return path
