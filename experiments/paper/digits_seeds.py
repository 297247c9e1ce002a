"""The digits run over several seeds: everything in its report, and time and memory of the whole command.

    python -m experiments.paper.digits_seeds

Runs `python -m jem_jax.main --config=configs/digits.py` for each seed, each in a fresh process and workdir. Writes
experiments/results/digits_seeds.json, and the first seed's replay buffer as docs/pages/images/digits_buffer.png.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.runs import IMAGES, run_command, store

Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs seeds 0, 1, … (default 3)")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_command("digits", Path(folder) / str(seed), [f"seed={seed}"]) for seed in range(seeds)]
        shutil.copy(Path(folder) / "0" / "report" / "buffer_by_class.png", IMAGES / "digits_buffer.png")
    summary = {model: _summary(runs, model) for model in ("jem", "baseline")}
    for source in ("replay buffer", "fresh chains"):
        summary[source.replace(" ", "_")] = {
            name: _spread(run["jem"]["sample_quality"][source][name] for run in runs)
            for name in ("mean_confidence", "rarest_class", "commonest_class")
        }
    summary["command"] = {
        "training_seconds": _spread(run["run"]["seconds"]["training"] for run in runs),
        "evaluation_seconds": _spread(run["run"]["seconds"]["evaluation"] for run in runs),
        "command_seconds": _spread(run["command_seconds"] for run in runs),
        "peak_memory_mib": _spread(run["peak_memory_mib"] for run in runs),
    }
    store("digits_seeds", "python -m experiments.paper.digits_seeds", summary, runs)


def _summary(runs: Sequence[Report], model: str) -> dict[str, Any]:
    """Every number of a model's report under its name, as mean, least and greatest over the runs."""
    some = runs[0][model]
    across: Callable[..., dict[str, float]] = lambda *path: _spread(_at(run[model], path) for run in runs)  # noqa: E731
    summary: dict[str, Any] = {
        name: across(name) for name in ("accuracy", "nll", "brier", "ece", "mce") if name in some
    }
    # A seed whose validation images have no best temperature has none of these.
    scaled = [run[model] for run in runs if run[model].get("temperature") is not None]
    for name in ("ece_scaled", "nll_scaled", "temperature") if scaled else ():
        summary[name] = _spread(values[name] for values in scaled)
    summary["temperature_seeds"] = len(scaled)
    summary["auroc"] = {
        name: {score: across("ood", name, score, "auroc") for score in scores} for name, scores in some["ood"].items()
    }
    summary["pgd"] = {
        norm: {epsilon: across("pgd", norm, epsilon) for epsilon in values}
        for norm, values in some["pgd"].items()
        if norm != "refined_linf"
    }
    refined = some["pgd"].get("refined_linf", {})
    summary["pgd_refined"] = {
        name: {epsilon: across("pgd", "refined_linf", name, epsilon) for epsilon in values}
        for name, values in refined.items()
    }
    summary["distal"] = {name: across("distal", name) for name in some["distal"]}
    return summary


def _at(values: Any, path: Sequence[str]) -> float:
    for name in path:
        values = values[name]
    return float(values)


def _spread(values: Any) -> dict[str, float]:
    numbers = list(values)
    digits = lambda value: float(f"{value:.5g}")  # noqa: E731
    return {"mean": digits(statistics.mean(numbers)), "low": digits(min(numbers)), "high": digits(max(numbers))}


if __name__ == "__main__":
    main()
