"""The part of docs/results.md about divergence, from what experiments/divergence.py stored."""

from collections.abc import Mapping
from typing import Any

import divergence


def section(results: Mapping[str, Any]) -> str:
    """Two tables: what became of runs at settings that diverge, and the alarms of healthy ones."""
    wild: dict[str, list[Mapping[str, Any]]] = {}
    healthy: dict[str, list[Mapping[str, Any]]] = {}
    for key, run in results["runs"].items():
        name = key.rpartition("/")[0]
        (healthy if name.startswith("healthy ") else wild).setdefault(name, []).append(run)
    parts = [
        "## Divergence",
        f"Digits without warm-up at ten times the learning rate, 12 epochs (`{results['command']}`). A model works if "
        f"its test accuracy is at least {100 * divergence.LEAST_ACCURACY:.0f} % and data and samples end at most "
        f"{divergence.LARGEST_GAP:.0f} nats apart.",
        _table(
            ("", "runs", "broke off", "working models", "recoveries"),
            [
                (name, len(runs), sum(run["status"] != 0 for run in runs), sum(run["works"] for run in runs),
                 sum(len(run["recoveries"]) for run in runs))
                for name, runs in wild.items()
            ],
        ),
    ]  # fmt: skip
    if healthy:
        parts += [
            "Healthy runs, and the alarms that the default limits raised:",
            _table(
                ("", "runs", "iterations", "alarms", "largest gap, nats", "least spread", "largest rms"),
                [
                    (name.removeprefix("healthy "), len(runs), sum(run["iterations"] for run in runs),
                     sum(len(run["recoveries"]) for run in runs), f"{max(run['largest_gap'] for run in runs):.2f}",
                     f"{min(run['least_spread'] for run in runs):.2f}",
                     f"{max(run['largest_rms'] for run in runs):.2f}")
                    for name, runs in healthy.items()
                ],
            ),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
