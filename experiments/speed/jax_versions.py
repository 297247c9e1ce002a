"""How fast a CPU trains with several versions of JAX.

    python -m experiments.speed.jax_versions FIRST/bin/python SECOND/bin/python

Each argument is the interpreter of a virtual environment with jem_jax and some version of JAX. The first is the
reference. They take turns; medians are of five rounds after a warm-up. Writes experiments/results/jax_versions.json.
"""

import argparse
import contextlib
import tempfile
from typing import Any

from experiments.runs import store
from experiments.speed.benchmark_cases import SLOTS, Case
from experiments.speed.workers import Worker, spread

CASES = (Case(10, 1, 8, 1, steps=20), Case(10, 1, 32, 3, steps=5), Case(16, 2, 32, 3, steps=5))
ROUNDS, ROUND_SECONDS = 5, 1.0
PARTS = ("iterations", "chains", "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="+", help="interpreters")
    pythons = parser.parse_args().python
    found = [_measure(case, pythons) for case in CASES]
    store(
        "jax_versions", "python -m experiments.speed.jax_versions " + " ".join(["PYTHON"] * len(pythons)), found, None
    )


def _measure(case: Case, pythons: list[str]) -> dict[str, Any]:
    """Seconds of an iteration and of its two parts by version of JAX, and of the first step."""
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        workers, found = {}, {}
        for python in pythons:
            environment = {"JAX_COMPILATION_CACHE_DIR": cache}
            worker = stack.enter_context(Worker("jax_worker.py", environment=environment, python=python))
            version = worker.ask("start", batch=case.batch, slots=SLOTS).partition(",")[0]
            first = worker.ask("prepare", shape=case.shape, settings=case.settings("float32"))["compile_seconds"]
            count = max(1, round(ROUND_SECONDS / worker.ask("iterations", count=1)))
            workers[version] = worker, count
            found[version] = {"compile_seconds": first}
        times: dict[str, dict[str, list[float]]] = {version: {part: [] for part in PARTS} for version in workers}
        for number in range(ROUNDS + 1):
            for version, (worker, count) in workers.items():
                for part in PARTS:
                    seconds = worker.ask(part, count=count)
                    if number:
                        times[version][part].append(seconds)
    for version, parts in times.items():
        found[version] |= {part: spread(values) for part, values in parts.items()}
    return {"case": case.name, "versions": found}


if __name__ == "__main__":
    main()
