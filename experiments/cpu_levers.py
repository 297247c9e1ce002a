"""What each thing that makes training fast on a CPU gives: the whole iteration with it and without it.

    python experiments/cpu_levers.py

One process with everything, one for each lever that is switched off and one for what a user can add, in turn, while the
others wait; medians of five rounds after a warm one, with the least and the greatest. Writes
experiments/results/cpu_levers.json. Takes some five minutes on two cores.
"""

import contextlib
from typing import Any

from benchmark_cases import SLOTS, Case
from runs import store
from workers import Worker, spread

CASES = (Case(10, 1, 8, 1, steps=20), Case(10, 1, 32, 3, steps=5))
ALL = "all"
LEVERS = ("input gradient as a convolution", "matrix products", "parts of a batch", "a device for each core")
"""As jax_worker.py switches them off"""
ADDED = {"huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
"""What only the environment that a process starts in can switch on"""
ROUNDS, ROUND_SECONDS = 5, 1.0


def main() -> None:
    store("cpu_levers", "python experiments/cpu_levers.py", [_measure(case) for case in CASES], None)


def _measure(case: Case) -> dict[str, Any]:
    """Seconds of an iteration as it is, without each lever, and with what can be added."""
    with contextlib.ExitStack() as stack:
        workers, counts = {}, {}
        for name in (ALL, *LEVERS, *ADDED):
            worker = workers[name] = stack.enter_context(Worker("jax_worker.py", environment=ADDED.get(name)))
            worker.ask("start", batch=case.batch, slots=SLOTS, without=name)
            worker.ask("prepare", shape=case.shape, settings=case.settings("float32"))
            counts[name] = max(1, round(ROUND_SECONDS / worker.ask("iterations", count=1)))
        times: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(ROUNDS + 1):
            for name, worker in workers.items():
                seconds = worker.ask("iterations", count=counts[name])
                if number:
                    times[name].append(seconds)
    seconds = {name: spread(values) for name, values in times.items()}
    for name, found in seconds.items():
        print(f"{case.name}, {name}: {1e3 * found['median']:.1f} ms", flush=True)
    return {"case": case.name, "seconds": seconds}


if __name__ == "__main__":
    main()
