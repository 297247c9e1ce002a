"""How fast jem_jax trains beside PyTorch, written as the official code does it and as an expert would.

    python -m experiments.speed.benchmark --preset=cpu

Every program runs in a process of its own, and they take turns. All start from the same weights, and their logits are
compared first. Reports medians of five rounds, each after a warm-up iteration, with the least and the greatest. Writes
experiments/results/benchmark_PRESET.json after every case. A program that fails is left out with its reason, and makes
the exit status 1.

Our program augments its images and sums its metrics as always; PyTorch gets batches that are ready. --forecast also
trains configs/digits.py once, and compares the start-up line with the time it took.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import ROOT, store
from experiments.speed.benchmark_cases import CASES, MANY_CORES, PROGRAMS, SLOTS, Case, Program
from experiments.speed.profile_step import profile
from experiments.speed.workers import Worker, spread

ROUND_SECONDS = 1.0
"""A round repeats what is shorter than this"""
TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 0.1}
"""Of logits between programs on the same weights, as a part of the largest: another network is off by about 1"""

Numbers = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(CASES), default="cpu")
    parser.add_argument("--cases", type=int, default=None, help="only so many, the first (default all)")
    parser.add_argument("--rounds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--patience", type=float, default=900, help="seconds a program may take for one thing (900)")
    parser.add_argument("--cache", metavar="DIR", help="keep what is compiled here, to be found again by others")
    parser.add_argument("--profile", action="store_true", help="then profile our program too, as profile_step.py does")
    parser.add_argument("--forecast", action="store_true", help="train configs/digits.py too: half a minute on 2 cores")
    flags = parser.parse_args()
    command = f"python -m experiments.speed.benchmark --preset={flags.preset}" + " --forecast" * flags.forecast
    if flags.cases is not None:
        command += f" --cases={flags.cases}"
    command += " --profile" * flags.profile
    products = _products(flags.preset)
    cases: list[Numbers] = []
    summary: Numbers = {"products_flops": products, "cases": cases}
    for number, case in enumerate(CASES[flags.preset][: flags.cases]):
        print(f"{case.name}:", flush=True)
        programs = [program for program in PROGRAMS[flags.preset] if not (program.once and number)]
        cases.append(_measure(case, programs, flags, products))
        store(f"benchmark_{flags.preset}", command, summary, None, quiet=True)
    if flags.forecast:
        summary["forecast"] = _forecast()
        store(f"benchmark_{flags.preset}", command, summary, None, quiet=True)
    return int(any(case["failed"] for case in cases))


def _products(preset: str) -> dict[str, float]:
    """The machine's rate of matrix products in FLOP/s by precision: the better of what the two frameworks reach."""
    side, precisions = (8192, ("float32", "tf32", "bfloat16")) if preset == "gpu" else (2048, ("float32",))
    rates: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        scripts = ("jax_worker.py", "torch_worker.py")
        for worker in [stack.enter_context(Worker(script, environment=environment)) for script in scripts]:
            for precision in precisions:
                found = worker.ask("products", side=side, precision=precision, count=5)
                rates[precision] = max(rates.get(precision, 0.0), found)
    return rates


class _Entry:
    """A program of a case: its worker process, and what was found of it; `failed` says why no more is."""

    def __init__(
        self,
        program: Program,
        case: Case,
        stack: contextlib.ExitStack,
        environment: dict[str, str],
        patience: float,
    ) -> None:
        self.program, self.case = program, case
        self.environment = {**environment, **dict(program.environment)}
        self.worker = stack.enter_context(Worker(program.worker, environment=self.environment, patience=patience))
        self.found: Numbers = {}
        self.times: dict[str, list[float]] = {"iterations": [], "chains": []}
        self.count = 1
        self.failed = ""

    def attempt(self, measure: Callable[["_Entry"], None]) -> None:
        """Measures, unless it has failed, and keeps why if it fails now."""
        if self.failed:
            return
        try:
            measure(self)
        except (RuntimeError, ArithmeticError) as error:
            self.failed = str(error)
            print(f"  {self.program.name} failed: {error}", flush=True)

    @property
    def result(self) -> Numbers:
        """All numbers of it."""
        return {
            "program": self.program.name,
            "dtype": self.program.dtype,
            "iteration_seconds": spread(self.times["iterations"]),
            "chain_steps_per_second": spread([self.case.steps / seconds for seconds in self.times["chains"]]),
            **{key: value for key, value in self.found.items() if key not in ("logits", "flops")},
        }


def _measure(case: Case, programs: Sequence[Program], flags: argparse.Namespace, products: dict[str, float]) -> Numbers:
    """All numbers of a case, one entry a program."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        weights = Path(folder) / "weights.npz"
        environment = {"JAX_COMPILATION_CACHE_DIR": flags.cache or str(Path(folder) / "cache")}
        # All start at once, and are idle long before the first round.
        entries = [_Entry(program, case, stack, environment, flags.patience) for program in programs]
        for entry in entries:
            entry.attempt(lambda entry: _build(entry, weights))
        # What takes minutes to compile does so beside the others where there are cores for it.
        apart = [entry for entry in entries if entry.program.once and (os.cpu_count() or 1) > MANY_CORES]
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(entry.attempt, lambda entry: _compile(entry, weights)) for entry in apart]
            for entry in entries:
                if entry not in apart:
                    entry.attempt(lambda entry: _compile(entry, weights))
            for one in waiting:
                one.result()
        for entry in entries:
            entry.attempt(lambda entry: _compare(entry, entries))
            entry.attempt(_count)
        for _ in range(flags.rounds):
            for entry in entries:
                entry.attempt(_round)
        for entry in entries:
            entry.attempt(lambda entry: entry.found.update(memory=entry.worker.ask("memory")))
            if flags.profile and entry.program.worker == "jax_worker.py":
                entry.attempt(lambda entry: entry.found.update(profile=profile(entry.worker, entry.program.name)))
    flops = next((entry.found["flops"] for entry in entries if "flops" in entry.found), 0.0)
    results = []
    for entry in entries:
        if entry.failed:
            continue
        result = entry.result
        achieved = flops / result["iteration_seconds"]["median"]
        result |= {"flops_per_second": achieved, "share_of_products": achieved / products[entry.program.precision]}
        results.append(result)
        print(f"  {_line(result)}", flush=True)
    return {
        "case": case.name,
        "shape": case.shape,
        "batch": case.batch,
        "steps": case.steps,
        "flops": flops,
        "programs": results,
        "failed": {entry.program.name: entry.failed for entry in entries if entry.failed},
    }


def _build(entry: _Entry, weights: Path) -> None:
    """Builds our program, and stores its weights for the others."""
    if entry.program.worker == "jax_worker.py":
        entry.found = _build_ours(entry.worker, entry.case, entry.program, weights)


def _compile(entry: _Entry, weights: Path) -> None:
    """Compiles a program, if it is one to be compiled, in its first iteration; ours also where it is found compiled."""
    program, case = entry.program, entry.case
    if program.worker == "torch_worker.py":
        settings: Numbers = {"batch": case.batch, "steps": case.steps, "style": program.style, "tf32": program.tf32}
        entry.found = entry.worker.ask("prepare", shape=case.shape, weights=str(weights), **settings)
        return
    entry.found |= entry.worker.ask("compiled")
    with Worker(program.worker, environment=entry.environment) as again:
        _build_ours(again, case, program)
        entry.found["cached_compile_seconds"] = again.ask("compiled")["compile_seconds"]


def _build_ours(worker: Worker, case: Case, program: Program, weights: Path | str = "") -> Numbers:
    versions = worker.ask("start", batch=case.batch, slots=SLOTS)
    settings = case.settings(program.dtype)
    return {"versions": versions, **worker.ask("build", shape=case.shape, settings=settings, weights=str(weights))}


def _compare(entry: _Entry, entries: Sequence[_Entry]) -> None:
    """Fails a program that does not compute the same network as the first exact one."""
    exact = next((one for one in entries if one.program.precision == "float32" and not one.failed), entry)
    expected = np.array(exact.found["logits"])
    error = float(np.abs(np.array(entry.found["logits"]) - expected).max() / np.abs(expected).max())
    entry.found["logits_error"] = error
    # The stored logits of PyTorch are its plain float32 ones, of either style.
    if not error <= TOLERANCE[entry.program.precision]:
        raise ArithmeticError(f"its logits differ by {error:.2g} of the largest on the same weights")


def _count(entry: _Entry) -> None:
    """How many iterations make a round, after a first call of everything that is timed."""
    entry.worker.ask("chains", count=1)
    entry.count = max(1, round(ROUND_SECONDS / max(entry.worker.ask("iterations", count=1), 1e-4)))


def _round(entry: _Entry) -> None:
    # While the others ran, caches went cold and the system may have reclaimed memory.
    entry.worker.ask("iterations", count=1)
    for what, times in entry.times.items():
        times.append(entry.worker.ask(what, count=entry.count))


def _line(result: Numbers) -> str:
    seconds = result["iteration_seconds"]
    return (
        f"{result['program']:44} {1 / seconds['median']:9.3f} it/s ({1 / seconds['high']:.3f} to "
        f"{1 / seconds['low']:.3f}), {result['chain_steps_per_second']['median']:9.2f} steps/s, "
        f"{result['flops_per_second'] / 1e12:.3f} TFLOP/s ({result['share_of_products']:.0%}), "
        f"{result['memory']['bytes'] / 2**20:,.0f} MiB"
    )


def _forecast() -> Numbers:
    """The start-up line's estimate of the digits run, and what its iterations then took, validation and all."""
    settings = ["--config.training.baseline=false", "--config.evaluation.sections=classification"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "jem_jax.main", "--config=digits", f"--workdir={run}", *settings]
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        taken = float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"])
    announced = re.search(r"will take about ([^\n]+)", output)
    if announced is None:
        raise SystemExit(f"the digits run did not say how long it takes:\n{output}")
    found = {"announced_seconds": _seconds(announced[1]), "training_seconds": taken}
    return found | {"ratio": found["announced_seconds"] / taken}


def _seconds(text: str) -> float:
    """The inverse of `metrics.duration`."""
    units = {"s": 1, "min": 60, "h": 3600}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+) (s|min|h)", text)))


if __name__ == "__main__":
    sys.exit(main())
