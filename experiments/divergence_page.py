"""The part of docs/results.md about divergence, from what experiments/divergence.py stored."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]


def sections(path: Path) -> list[str]:
    """Two tables, of runs at settings that diverge and of healthy ones; none where nothing was stored."""
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    wild: dict[str, list[Run]] = {}
    healthy: dict[str, list[Run]] = {}
    for key, run in results["runs"].items():
        name = key.rpartition("/")[0]
        (healthy if name.startswith("healthy ") else wild).setdefault(name, []).append(run)
    parts = ["## Divergence"]
    if wild:
        parts += [f"{results['what']} Made by `{results['command']}`.", _outcomes(wild), _finding(wild)]
    if healthy:
        about = "the alarms that the default limits raised, and the extremes of any log line"
        parts += [f"Healthy runs, with the minutes and iterations of all together: {about}.", _extremes(healthy)]
    return parts


def _outcomes(wild: Mapping[str, Sequence[Run]]) -> str:
    head = ("", "runs", "broke off", "working models", "best last accuracy", "recoveries")
    rows = []
    for name, runs in wild.items():
        best = max(run["accuracy"] or 0 for run in runs)
        counts = (sum(bool(run["error"]) for run in runs), sum(run["works"] for run in runs))
        rows.append((name, len(runs), *counts, f"{100 * best:.0f} %", sum(len(run["recoveries"]) for run in runs)))
    return _table(head, rows)


def _finding(wild: Mapping[str, Sequence[Run]]) -> str:
    saved = {name: f"{sum(run['works'] for run in runs)} of {len(runs)}" for name, runs in wild.items()
             if any(run["works"] for run in runs)}  # fmt: skip
    told = ", ".join(f"{name} ({share})" for name, share in saved.items())
    return f"Working models came of: {told or 'nothing'}. No run of the other variants ended with one."


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
    return _table(head, rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
