"""The part of docs/results.md about divergence, from what experiments/divergence.py stored."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import table

Run = Mapping[str, Any]


def sections(path: Path) -> list[str]:
    """Tables, of runs at settings that diverge and of healthy ones; none where nothing was stored."""
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    wild, healthy = _sorted(results)
    parts = ["## Divergence"]
    if wild:
        parts.append(
            f"Made by `{results['command']}`. A model works if its last validation accuracy is at least 80 % and data "
            "and samples end at most 10 nats apart. A run without recovery is broken off where |log p~| passes 1e6 or "
            "a number is not finite, and for no slower fault; one with recovery when its recoveries are used up."
        )
        for setting, variants in wild.items():
            always = [name for name, runs in variants.items() if _working(runs) == len(runs)]
            helped = f"Every seed ended with a working model with: {'; '.join(always) or 'nothing of these'}."
            parts += [f"**{results['what'][setting]}**:", _outcomes(variants), helped]
    if healthy:
        about = "the alarms that the default limits raised, and the extremes of any log line"
        parts += [f"Healthy runs, with the minutes and iterations of all together: {about}.", _extremes(healthy)]
    return parts


def in_a_sentence(path: Path) -> str:
    """What recovery by itself does for the runs of the first setting."""
    results = json.loads(path.read_text())
    setting, variants = next(iter(_sorted(results)[0].items()))
    alone, recovering = variants["nothing"], variants["recovery"]
    return (
        f"Of {len(alone)} runs that all diverge ({results['what'][setting]}), {_working(alone)} ended with a working "
        f"model without recovery, {_working(recovering)} with it."
    )


def _sorted(results: Mapping[str, Any]) -> tuple[dict[str, dict[str, list[Run]]], dict[str, list[Run]]]:
    """The runs by setting and variant, and the healthy ones by data set."""
    wild: dict[str, dict[str, list[Run]]] = {}
    healthy: dict[str, list[Run]] = {}
    for key, run in results["runs"].items():
        name = key.rpartition("/")[0]
        if name.startswith("healthy "):
            healthy.setdefault(name, []).append(run)
        else:
            setting, _, variant = name.partition(": ")
            wild.setdefault(setting, {}).setdefault(variant, []).append(run)
    return wild, healthy


def _working(runs: Sequence[Run]) -> int:
    return sum(run["works"] for run in runs)


def _outcomes(variants: Mapping[str, Sequence[Run]]) -> str:
    head = ("", "working models", "broken off", "median last accuracy", "recoveries")
    rows = []
    for name, runs in variants.items():
        working, broken = _working(runs), sum(bool(run["error"]) for run in runs)
        accuracy = statistics.median(run["accuracy"] or 0 for run in runs)
        recoveries = sum(len(run["recoveries"]) for run in runs)
        rows.append((name, f"{working} of {len(runs)}", broken, f"{100 * accuracy:.0f} %", recoveries))
    return table(head, rows)


def _extremes(healthy: Mapping[str, Sequence[Run]]) -> str:
    head = ("", "runs", "minutes", "iterations", "alarms", "largest gap, nats", "spread", "rms")
    rows = []
    for name, runs in healthy.items():
        spans = [
            f"{min(run[kind][0] for run in runs):.2f} to {max(run[kind][1] for run in runs):.2f}"
            for kind in ("spread", "rms")
        ]
        alarms = sum(len(run["recoveries"]) for run in runs)
        gap = f"{max(run['largest_gap'] for run in runs):.2f}"
        minutes = f"{sum(run['seconds'] for run in runs) / 60:.0f}"
        iterations = f"{sum(run['iterations'] for run in runs):,}"
        rows.append((name.removeprefix("healthy "), len(runs), minutes, iterations, alarms, gap, *spans))
    return table(head, rows)
