"""How the cost of an iteration grows, what devices exchange, and where the time of an iteration goes.

    python -m experiments.speed.scaling --preset=cpu

Changes one size at a time from a base. Time is expected to grow with arithmetic, and not with the buffer. Writes
experiments/results/scaling_PRESET.json and docs/pages/images/scaling_PRESET.png.
"""

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from experiments.runs import IMAGES, store
from experiments.speed.benchmark_cases import SLOTS, Case
from experiments.speed.workers import Worker

ROUNDS = 5
Numbers = dict[str, Any]

BASE = {
    "tiny": Case(10, 1, 8, 1, batch=8, steps=2),
    "cpu": Case(10, 1, 8, 1, steps=10),
    "gpu": Case(16, 4, 32, 3, steps=10),
}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"steps": (2, 4), "slots": (SLOTS, 20_000)},
    "cpu": {
        "steps": (5, 10, 20, 40),
        "batch": (32, 64, 128, 256),
        "width": (1, 2, 4),
        "side": (8, 16, 32),
        "classes": (10, 100, 1000),
        "slots": (SLOTS, 1_000_000),
    },
    "gpu": {
        "steps": (5, 10, 20, 40),
        "batch": (64, 256, 1024),
        "width": (2, 4, 8),
        "slots": (SLOTS, 100_000),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(BASE), default="cpu")
    preset = parser.parse_args().preset
    base = BASE[preset]
    dtype = "bfloat16" if preset == "gpu" else "float32"
    points = {axis: _along(base, axis, values, dtype) for axis, values in AXES[preset].items()}
    with Worker("jax_worker.py") as worker:
        _prepare(worker, dataclasses.replace(base, steps=20), SLOTS, dtype)
        parts = {
            name: statistics.median(worker.ask(name, count=5) for _ in range(ROUNDS))
            for name in ("iterations", "chains", "losses", "dispatch")
        }
        communication = worker.ask("communication")
    _plot(points, base.name, f"scaling_{preset}.png")
    summary = {"base": base.name, "points": points, "parts": parts, "communication": communication}
    store(f"scaling_{preset}", f"python -m experiments.speed.scaling --preset={preset}", summary, None)


def _along(base: Case, axis: str, values: tuple[int, ...], dtype: str) -> list[Numbers]:
    """Seconds of an iteration at each value, the values taken in turn; with the arithmetic."""
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        workers, points = [], []
        for value in values:
            worker = stack.enter_context(Worker("jax_worker.py", environment=environment))
            case = base if axis == "slots" else dataclasses.replace(base, **{axis: value})
            found = _prepare(worker, case, value if axis == "slots" else SLOTS, dtype)
            count = max(1, round(0.5 / worker.ask("iterations", count=1)))
            workers.append((worker, count))
            points.append({"value": value, "flops": found["flops"]})
        times = [[worker.ask("iterations", count=count) for worker, count in workers] for _ in range(ROUNDS)]
    for point, seconds in zip(points, zip(*times, strict=True), strict=True):
        point |= {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
        point["expected_seconds"] = points[0]["seconds"] * point["flops"] / points[0]["flops"]
        print(
            f"{axis} {point['value']}: {point['seconds']:.4f} s, expected {point['expected_seconds']:.4f}", flush=True
        )
    return points


def _prepare(worker: Worker, case: Case, slots: int, dtype: str) -> Numbers:
    worker.ask("start", batch=case.batch, slots=slots)
    settings = case.settings(dtype)
    settings["sampler"]["buffer_size"] = slots
    return worker.ask("prepare", shape=case.shape, settings=settings)


def _plot(points: dict[str, list[Numbers]], base: str, name: str) -> None:
    figure, axes = pyplot.subplots(
        2, -(-len(points) // 2), figsize=(9, 5.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(points) :]:
        panel.set_axis_off()
    for panel, (axis, some) in zip(axes.flat, points.items(), strict=False):
        values = [point["value"] for point in some]
        panel.loglog(values, [1 / point["expected_seconds"] for point in some], "--", color="grey", label="expected")
        panel.loglog(values, [1 / point["seconds"] for point in some], "o-", label="measured")
        panel.set_xlabel(axis)
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        panel.yaxis.set_major_formatter("{x:g}")
    for panel in axes[:, 0]:
        panel.set_ylabel("iterations/s")
    axes[0][0].legend()
    figure.suptitle(f"Base: {base}")
    figure.savefig(IMAGES / name, dpi=110)


if __name__ == "__main__":
    main()
