"""What a device does in a training iteration: time by kind and by kernel, its idle part, and layouts of convolutions.

    python -m experiments.speed.profile_step --preset=gpu

Traces a few iterations with JAX's profiler, after a warm-up. Times are sums over a GPU's streams, or a CPU's threads.
Writes experiments/results/profile_PRESET.json after every case.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from experiments.runs import store
from experiments.speed.benchmark_cases import SLOTS, Case
from experiments.speed.workers import Worker

CASES = {
    "tiny": [Case(10, 1, 8, 1, batch=8, steps=2)],
    "cpu": [Case(10, 1, 8, 1, steps=20), Case(16, 2, 32, 3, steps=5)],
    "gpu": [Case(28, 10, 32, 3, steps=20), Case(16, 4, 32, 3, steps=10), Case(10, 1, 8, 1, steps=20)],
}
ITERATIONS, WARM = 5, 3
MOST_KERNELS = 40
KINDS = (
    ("transfers", r"memcpy|memset"),
    ("exchange between devices", r"all-reduce|nccl"),
    ("changes of layout", r"nchwtonhwc|nhwctonchw|transpose|^copy"),
    # YNN is the library that computes them on a CPU.
    ("convolutions, with what is fused into them", r"conv(?!ert)|fprop|dgrad|wgrad|cudnn|implicit|ynn"),
    ("matrix products", r"gemm|cublas|cutlass|nvjet|^dot"),
)
"""Of kernels, by what their names hold: the first that fits; what fits none is `REST`"""
REST = "elementwise, reductions and random numbers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(CASES), default="cpu")
    preset = parser.parse_args().preset
    found: list[dict[str, Any]] = []
    for case in CASES[preset]:
        found.append(_profile(case, "bfloat16" if preset == "gpu" else "float32"))
        store(
            f"profile_{preset}", f"python -m experiments.speed.profile_step --preset={preset}", found, None, quiet=True
        )


def _profile(case: Case, dtype: str) -> dict[str, Any]:
    with Worker("jax_worker.py") as worker:
        worker.ask("start", batch=case.batch, slots=SLOTS)
        worker.ask("prepare", shape=case.shape, settings=case.settings(dtype))
        return {"case": case.name, **profile(worker, case.name), "layouts": worker.ask("layouts")}


def profile(worker: Worker, name: str) -> dict[str, Any]:
    """Where the time of iterations goes that a worker is ready for; prints it too."""
    with tempfile.TemporaryDirectory() as folder:
        worker.ask("iterations", count=WARM)
        alone = worker.ask("iterations", count=ITERATIONS)
        traced = worker.ask("trace", folder=folder, count=ITERATIONS)
        calls = list(_calls(next(Path(folder).rglob("*.xplane.pb"))))
    seconds, counts = Counter[str](), Counter[str]()
    for kernel, duration in calls:
        seconds[kernel] += duration / ITERATIONS
        counts[kernel] += 1
    kinds = Counter[str]()
    for kernel, duration in seconds.items():
        kinds[kind_of(kernel)] += duration
    busy = sum(kinds.values())
    print(f"{name}: {1e3 * alone:.2f} ms an iteration, {1e3 * busy:.2f} ms of kernels, {1e3 * traced:.2f} ms traced")
    for kind, duration in kinds.most_common():
        print(f"  {kind}: {1e3 * duration:.2f} ms", flush=True)
    kernels = [
        {"kernel": kernel[:160], "seconds": duration, "calls": counts[kernel] / ITERATIONS}
        for kernel, duration in seconds.most_common(MOST_KERNELS)
    ]
    return {
        "iteration_seconds": alone,
        "traced_iteration_seconds": traced,
        "kernel_seconds": busy,
        "kernel_calls": len(calls) / ITERATIONS,
        "kinds": dict(kinds.most_common()),
        "kernels": kernels,
    }


def _calls(path: Path) -> Iterator[tuple[str, float]]:
    """(kernel, seconds) of everything that ran on the devices."""
    planes = list(ProfileData.from_file(str(path)).planes)
    for plane in planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                # Its other lines tell the same time again, by operation and by program.
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns / 1e9) for event in line.events)
        elif plane.name == "/host:CPU" and not any(other.name.startswith("/device:") for other in planes):
            for line in plane.lines:
                for event in line.events:
                    if any(key == "hlo_op" for key, _ in event.stats):
                        yield re.sub(r"[.\d]+$", "", event.name), event.duration_ns / 1e9


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), REST)


if __name__ == "__main__":
    main()
