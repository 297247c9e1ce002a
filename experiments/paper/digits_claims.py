"""Two of the paper's claims on digits, over several seeds.

    python -m experiments.paper.digits_claims

1. With few labels, p(x) learned from every image helps p(y|x): 5 and 20 labels a class. The classifier of the same
   shape sees the same labels.
2. log p(x) + log p(y|x) trains a better classifier than log p(x, y) does (section 4 of the paper).

Writes experiments/results/digits_claims.json.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.runs import run_command, store

VARIANTS = {
    "log p(x) + log p(y|x), all labels": [],
    "log p(x, y), all labels": ["objective.p_x=0", "objective.p_y_given_x=0", "objective.p_xy=1"],
    "log p(x) + log p(y|x), 20 labels a class": ["data.labels_per_class=20"],
    "log p(x) + log p(y|x), 5 labels a class": ["data.labels_per_class=5"],
}
QUICK = ["evaluation.sections=classification,calibration"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs seeds 0, 1, … of each variant (default 3)")
    seeds = range(parser.parse_args().seeds)
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(VARIANTS.items()):
            runs[name] = [
                # Which images are labelled changes with the seed too.
                run_command(
                    "digits_paper",
                    Path(folder) / f"{number}_{seed}",
                    [*settings, *QUICK, f"seed={seed}", f"data.labels_seed={seed}"],
                )
                for seed in seeds
            ]
    summary = {name: {model: _spread(of, model) for model in ("jem", "baseline")} for name, of in runs.items()}
    store("digits_claims", "python -m experiments.paper.digits_claims", summary, runs)


def _spread(runs: list[dict[str, Any]], model: str) -> dict[str, float]:
    accuracies = [run[model]["accuracy"] for run in runs]
    return {
        "accuracy_mean": round(statistics.mean(accuracies), 4),
        "accuracy_min": min(accuracies),
        "accuracy_max": max(accuracies),
        "ece_mean": round(statistics.mean(run[model]["ece"] for run in runs), 4),
    }


if __name__ == "__main__":
    main()
