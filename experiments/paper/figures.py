"""The paper's tables and figures, made again from finished runs (Grathwohl et al. 2020, section 5).

    python -m experiments.paper.figures hybrid runs/cifar10 runs/cifar100 runs/svhn   accuracy, samples
    python -m experiments.paper.figures calibration runs/cifar100                     reliability diagrams
    python -m experiments.paper.figures ood runs/cifar10                              AUROC of every score on every set
    python -m experiments.paper.figures histograms runs/cifar10                       scores of test and other images
    python -m experiments.paper.figures robustness runs/cifar10                       accuracy over the attack's size
    python -m experiments.paper.figures distal runs/cifar10                           distal adversarial examples
    python -m experiments.paper.figures samples runs/cifar10 runs/svhn                replay buffer and fresh chains

Every RUN is a workdir with its report; `--mode=evaluate` makes one. The paper's out-of-distribution sets are chosen
when it is made: --config.evaluation.ood_sets=svhn_cropped,cifar100. Tables are printed and written as Markdown,
figures as PNG, into --out (default runs/paper). Accuracy of the plain classifier stands beside that of the JEM, as does
everything else that both have. The Fréchet distance and the Inception-style score are of the classifier's own
features: they are not the paper's FID and IS, which need an export (--mode=sample) and a tool for them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import image as mpl_image
from matplotlib import pyplot

from jem_jax import report
from jem_jax.common import files
from jem_jax.evaluation import ood
from jem_jax.report import figures
from jem_jax.report.figures import COLOURS, AttackLine

MODELS = {"jem": "JEM", "baseline": "classifier"}
Reports = Mapping[str, report.Report]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    flags = parser.parse_args()
    made = WHAT[flags.what]({run.name: read(run) for run in flags.runs}, flags.out / flags.what)
    print(f"wrote {made}")


def read(run: Path) -> report.Report:
    """A run's report; ends the program where there is none."""
    found = report.read(run)
    if found is None:
        sys.exit(f"{run} holds no report; make it with --mode=evaluate --workdir={run}")
    return found


def hybrid(reports: Reports, out: Path) -> Path:
    """Accuracy of both models, and how good the JEM's samples are."""
    rows = []
    for run, found in reports.items():
        quality = _section(found, run, "sample_quality", "jem")["sample_quality"].get("replay buffer", {})
        drawn = [f"{quality[name]:.2f}" if name in quality else "" for name in QUALITY]
        rows += [
            (run, title, f"{100 * found.values[model]['accuracy']:.2f} %", *(drawn if model == "jem" else ("", "")))
            for model, title in MODELS.items()
            if "accuracy" in found.values.get(model, {})
        ]
    return _table(("run", "model", "accuracy", *QUALITY.values()), rows, out)


def detection(reports: Reports, out: Path) -> Path:
    """AUROC of every score of both models on every set."""
    rows = []
    for run, found in reports.items():
        for model, title in MODELS.items():
            if model not in found.values:
                continue
            sets = _section(found, run, "ood", model)["ood"]
            rows += [
                (run, name.replace("_", " "), title, *(f"{scores[score]['auroc']:.3f}" for score in ood.SCORES))
                for name, scores in sets.items()
            ]
    return _table(("run", "outside", "model", *ood.SCORES.values()), rows, out)


def robustness(reports: Reports, out: Path) -> Path:
    """Accuracy over ε, one panel a run and norm."""
    panels = []
    for run, found in reports.items():
        for norm, axis in (("linf", "L∞ ε, [0, 1] pixels"), ("l2", "L2 ε, [0, 1] pixels")):
            lines = []
            for model, title in MODELS.items():
                if model in found.values:
                    values = _section(found, run, "pgd", model)["pgd"][norm]
                    sizes = [float(epsilon) for epsilon in values]
                    lines.append(AttackLine(title, COLOURS[model], "o-", sizes, list(values.values())))
            panels.append((run, axis, lines))
    return figures.curves(panels, out.with_suffix(".png"))


def gallery(*names: str) -> Callable[[Reports, Path], Path]:
    """A figure of the reports' own pictures, one row a run."""

    def draw(reports: Reports, out: Path) -> Path:
        figure, axes = pyplot.subplots(
            len(reports), len(names), squeeze=False, figsize=(7 * len(names), 5 * len(reports)), layout="constrained"
        )
        for row, (run, found) in zip(axes, reports.items(), strict=True):
            for axis, name in zip(row, names, strict=True):
                axis.set_axis_off()
                axis.set_title(f"{run}: {name.replace('_', ' ')}")
                file = found.folder / f"{name}.png"
                if not file.is_file():
                    sys.exit(f"{run}'s report has no {name}; --mode=evaluate with evaluation.sections=all draws it")
                picture = mpl_image.imread(file)
                axis.imshow(picture, cmap="gray", interpolation="nearest")
        return figures.save(figure, out.with_suffix(".png"))

    return draw


def _section(found: report.Report, run: str, key: str, model: str) -> dict[str, Any]:
    values = found.values[model]
    if key not in values:
        sys.exit(f"{run}'s report has no {key} of its {MODELS[model]}; --mode=evaluate with evaluation.sections=all")
    return values


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], out: Path) -> Path:
    words = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in words) + "\n"
    print(text)
    path = out.with_suffix(".md")
    files.write_text(path, text)
    return path


QUALITY = {"inception_style_score": "Inception-style score", "frechet_distance": "Fréchet distance"}
WHAT: dict[str, Callable[[Reports, Path], Path]] = {
    "hybrid": hybrid,
    "calibration": gallery("reliability"),
    "ood": detection,
    "histograms": gallery("ood_histograms"),
    "robustness": robustness,
    "distal": gallery("distal_jem", "distal_baseline"),
    "samples": gallery("buffer_by_class", "samples_by_class"),
}


if __name__ == "__main__":
    main()
