"""What each optimisation gives: the whole iteration with it and without it.

    python -m experiments.speed.levers --preset=cpu

One process has all optimisations, and one lacks each of them; others add what a user can add. They take turns. Reports
medians of five rounds after a warm-up, with the least and the greatest. A lever that fails is stored with its reason.
Writes experiments/results/levers_PRESET.json after every case. Takes about five minutes on two cores.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from experiments.runs import store
from experiments.speed.benchmark_cases import MANY_CORES, SLOTS, Case
from experiments.speed.workers import Worker, spread
from jem_jax import config as configuration
from jem_jax.commands import config_files

ALL = "all"
ROUNDS, ROUND_SECONDS = 5, 0.5
Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Lever:
    """How a process differs from the one with everything."""

    name: str
    without: str = ""
    """what jax_worker.py switches off"""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is trained, and the levers that are tried on it."""

    name: str
    shape: Mapping[str, int]
    settings: Settings
    levers: Sequence[Lever]


def _of_case(case: Case, dtype: str, levers: Sequence[Lever]) -> Subject:
    return Subject(case.name, case.shape, case.settings(dtype), levers)


def _of_config(name: str, case: Case, levers: Sequence[Lever]) -> Subject:
    """A config file's training, on images of a case."""
    settings = configuration.as_dict(config_files.read(name, []))
    return Subject(f"configs/{name}.py", case.shape, settings, levers)


def _flags(text: str) -> dict[str, str]:
    return {"XLA_FLAGS": text}


_ONE_PASS, _CAST = Lever("one pass", without="one pass"), Lever("cast once", without="cast once")
_UNROLLED = Lever("unrolled", settings={"sampler": {"unroll": 5}})
_GRAPHS = "--xla_gpu_enable_command_buffer="
_LOOP = Lever("convolutions and loop in graphs", environment=_flags(_GRAPHS + "+CONVOLUTION,+WHILE"))
_CPU = [
    *(
        Lever(name, without=name)
        for name in (
            "input gradient as a convolution", "matrix products", "parts of a batch", "a device for each core"
        )
    ),
    Lever("huge pages", environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
]  # fmt: skip
_LARGE = [
    _CAST,
    _ONE_PASS,
    Lever("fused convolutions", environment=_flags("--xla_gpu_experimental_enable_conv_fusion=true")),
    Lever("eight elements a thread", environment=_flags("--xla_gpu_experimental_allow_unroll_factor_eight=true")),
    _LOOP,
]
_FAST = [
    _CAST,
    _LOOP,
    Lever("batches of twice the size", settings={"training": {"batch_size": 128, "labelled_batch_size": 256}}),
]
_REST = [
    _UNROLLED,
    Lever("graphs", environment=_flags(_GRAPHS)),
    Lever("autotuning", environment=_flags("--xla_gpu_autotune_level=0")),
    Lever("NCHW", environment=_flags("--xla_gpu_force_conv_nchw=true")),
    Lever("NHWC", environment=_flags("--xla_gpu_force_conv_nhwc=true")),
]


def _subjects(preset: str) -> list[Subject]:
    if preset == "cpu":
        return [_of_case(Case(10, 1, side, channels, steps=steps), "float32", _CPU) for side, channels, steps in
                ((8, 1, 20), (32, 3, 5))]  # fmt: skip
    if preset == "tiny":
        return [_of_case(Case(10, 1, 8, 1, batch=8, steps=2), "float32", [_ONE_PASS, _UNROLLED])]
    large = Case(28, 10, 32, 3, steps=20)
    if preset == "gpu":
        return [_of_case(large, "bfloat16", _LARGE), _of_config("cifar10_fast", large, _FAST)]
    return [_of_case(large, "bfloat16", _REST)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("tiny", "cpu", "gpu", "gpu_rest"), default="cpu")
    preset = parser.parse_args().preset
    subjects, found = _subjects(preset), []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(_side_by_side(len(subjects))) as pool:
        for one in list(pool.map(lambda subject: _Prepared(subject, stack), subjects)):
            found.append(one.measure())
            store(f"levers_{preset}", f"python -m experiments.speed.levers --preset={preset}", found, None, quiet=True)


def _side_by_side(most: int) -> int:
    return most if (os.cpu_count() or 1) > MANY_CORES else 1


class _Prepared:
    """The processes of a subject, compiled: with everything, without each lever, and with what can be added."""

    def __init__(self, subject: Subject, stack: contextlib.ExitStack) -> None:
        self.subject = subject
        self.workers: dict[str, Worker] = {}
        self.counts: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        for lever in (Lever(ALL), *subject.levers):
            environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **lever.environment}
            self.workers[lever.name] = stack.enter_context(Worker("jax_worker.py", environment=environment))
        # The first one alone, so that the others find what it has tuned.
        self._prepare(Lever(ALL))
        with ThreadPoolExecutor(_side_by_side(len(subject.levers))) as pool:
            list(pool.map(self._prepare, subject.levers))

    def _prepare(self, lever: Lever) -> None:
        settings, worker = _merged(self.subject.settings, lever.settings), self.workers[lever.name]
        try:
            worker.ask("start", batch=settings["training"]["batch_size"], slots=SLOTS, without=lever.without)
            worker.ask("prepare", shape=self.subject.shape, settings=settings)
            self.counts[lever.name] = max(1, round(ROUND_SECONDS / worker.ask("iterations", count=1)))
        except RuntimeError as error:
            self.failed[lever.name] = str(error)
            print(f"{self.subject.name}, {lever.name} failed: {error}", flush=True)

    def measure(self) -> dict[str, Any]:
        """Seconds of an iteration of each."""
        times: dict[str, list[float]] = {name: [] for name in self.counts}
        for number in range(ROUNDS + 1):
            for name, count in self.counts.items():
                seconds = self.workers[name].ask("iterations", count=count)
                if number:
                    times[name].append(seconds)
        found = {name: spread(values) for name, values in times.items()}
        for name, one in found.items():
            print(f"{self.subject.name}, {name}: {1e3 * one['median']:.1f} ms", flush=True)
        return {"case": self.subject.name, "seconds": found, "failed": self.failed}


def _merged(settings: Settings, changes: Settings) -> dict[str, Any]:
    return {
        group: {**values, **changes.get(group, {})} if isinstance(values, Mapping) else values
        for group, values in settings.items()
    }


if __name__ == "__main__":
    main()
