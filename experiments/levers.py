"""What each thing that makes training fast gives: the whole iteration with it and without it.

    python experiments/levers.py --preset=cpu

One process with everything, one for each lever that is switched off and one for what a user can add, in turn, while the
others wait; medians of five rounds after a warm one, with the least and the greatest. A lever that cannot be measured
says why. Writes experiments/results/levers_PRESET.json after every case. Takes some five minutes on two cores.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmark_cases import SLOTS, Case
from runs import store
from workers import Worker, spread

ALL = "all"
ROUNDS, ROUND_SECONDS = 5, 1.0


@dataclass(frozen=True)
class Lever:
    """How a process differs from the one with everything."""

    name: str
    without: str = ""
    """what jax_worker.py switches off"""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def _flags(text: str) -> dict[str, str]:
    return {"XLA_FLAGS": text}


CASES = {
    "tiny": [Case(10, 1, 8, 1, batch=8, steps=2)],
    "cpu": [Case(10, 1, 8, 1, steps=20), Case(10, 1, 32, 3, steps=5)],
    "gpu": [Case(16, 4, 32, 3, steps=10), Case(28, 10, 32, 3, steps=20)],
}
_UNROLLED = Lever("unrolled", settings={"sampler": {"unroll": 5}})
LEVERS = {
    "tiny": [Lever("one pass", without="one pass"), _UNROLLED],
    "cpu": [
        *(
            Lever(name, without=name)
            for name in (
                "input gradient as a convolution", "matrix products", "parts of a batch", "a device for each core"
            )
        ),
        Lever("huge pages", environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    ],
    "gpu": [
        Lever("bfloat16", settings={"model": {"dtype": "float32"}}),
        Lever("one pass", without="one pass"),
        _UNROLLED,
        Lever("command buffers", environment=_flags("--xla_gpu_enable_command_buffer=")),
        Lever("loops in command buffers", environment=_flags("--xla_gpu_enable_command_buffer=+WHILE")),
        Lever("autotuning", environment=_flags("--xla_gpu_autotune_level=0")),
        Lever("NCHW", environment=_flags("--xla_gpu_force_conv_nchw=true")),
        Lever("NHWC", environment=_flags("--xla_gpu_force_conv_nhwc=true")),
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(CASES), default="cpu")
    preset = parser.parse_args().preset
    found: list[dict[str, Any]] = []
    for case in CASES[preset]:
        found.append(_measure(case, preset))
        store(f"levers_{preset}", f"python experiments/levers.py --preset={preset}", found, None, quiet=True)


def _measure(case: Case, preset: str) -> dict[str, Any]:
    """Seconds of an iteration as it is, without each lever, and with what can be added."""
    dtype = "bfloat16" if preset == "gpu" else "float32"
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers, counts = {}, {}
        for lever in (Lever(ALL), *LEVERS[preset]):
            environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **lever.environment}
            worker = stack.enter_context(Worker("jax_worker.py", environment=environment))
            try:
                worker.ask("start", batch=case.batch, slots=SLOTS, without=lever.without)
                worker.ask("prepare", shape=case.shape, settings=_merged(case.settings(dtype), lever.settings))
                counts[lever.name] = max(1, round(ROUND_SECONDS / worker.ask("iterations", count=1)))
            except RuntimeError as error:
                failed[lever.name] = str(error)
                print(f"{case.name}, {lever.name} failed: {error}", flush=True)
                continue
            workers[lever.name] = worker
        times: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(ROUNDS + 1):
            for name, worker in workers.items():
                seconds = worker.ask("iterations", count=counts[name])
                if number:
                    times[name].append(seconds)
    seconds = {name: spread(values) for name, values in times.items()}
    for name, one in seconds.items():
        print(f"{case.name}, {name}: {1e3 * one['median']:.1f} ms", flush=True)
    return {"case": case.name, "seconds": seconds, "failed": failed}


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {group: {**values, **changes.get(group, {})} for group, values in settings.items()}


if __name__ == "__main__":
    main()
