"""How fast jem_jax trains, beside PyTorch written as the official code does it and as an expert would.

    python experiments/benchmark.py --preset=cpu

Every program runs in a process of its own, in turn, while the others wait; all start from the same weights, and their
logits are compared first. Medians of five rounds, each after an iteration that is not counted, with the least and the
greatest. Prints a table and writes experiments/results/benchmark_PRESET.json, which experiments/performance_page.py
makes docs/performance.md from.

Our program augments its images and writes its metrics' sums as it always does; PyTorch gets batches that are ready.
With --forecast it also trains configs/digits.py once, and compares the start-up line with what it took.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_cases import CASES, COMPILED_CASES, PROGRAMS, SLOTS, Case, Program
from runs import ROOT, store
from workers import Worker, spread

ROUND_SECONDS = 1.0
"""A round repeats what is shorter than this"""
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of logits, which are about 0.1 at the start, between programs on the same weights"""

Numbers = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(CASES), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--forecast", action="store_true", help="train configs/digits.py too: half a minute on 2 cores")
    flags = parser.parse_args()
    products = _products(flags.preset)
    cases = []
    for number, case in enumerate(CASES[flags.preset]):
        print(f"{case.name}:", flush=True)
        compiles = flags.preset != "cpu" or number < COMPILED_CASES
        programs = [p for p in PROGRAMS[flags.preset] if compiles or p.style != "tuned, compiled"]
        cases.append(_measure(case, programs, flags.rounds, products))
    summary: Numbers = {"products_flops": products, "cases": cases}
    if flags.forecast:
        summary["forecast"] = _forecast()
    command = f"python experiments/benchmark.py --preset={flags.preset}" + " --forecast" * flags.forecast
    store(f"benchmark_{flags.preset}", command, summary, None)


def _products(preset: str) -> dict[str, float]:
    """The machine's rate of matrix products in FLOP/s by dtype: the better of what the two frameworks reach."""
    side, dtypes = (8192, ("float32", "bfloat16")) if preset == "gpu" else (2048, ("float32",))
    rates: dict[str, float] = {}
    for script in ("jax_worker.py", "torch_worker.py"):
        with Worker(script) as worker:
            for dtype in dtypes:
                found = worker.ask("products", side=side, dtype=dtype, count=5)
                rates[dtype] = max(rates.get(dtype, 0.0), found)
    return rates


def _measure(case: Case, programs: Sequence[Program], rounds: int, products: dict[str, float]) -> Numbers:
    """All numbers of a case, one entry a program."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        weights, cache = Path(folder) / "weights.npz", {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        workers, found = {}, {}
        for program in programs:
            environment = {**cache, **dict(program.environment)}
            worker = workers[program.name] = stack.enter_context(Worker(program.worker, environment=environment))
            found[program.name] = _prepare(worker, case, program, weights)
            if program.worker == "jax_worker.py":
                with Worker(program.worker, environment=environment) as again:
                    cached = _prepare(again, case, program, Path(folder) / "unused.npz")["compile_seconds"]
                found[program.name]["cached_compile_seconds"] = cached
        _same_logits(programs, found)
        times: dict[str, dict[str, list[float]]] = {name: {"iteration": [], "chain": []} for name in workers}
        counts = {name: _count(worker) for name, worker in workers.items()}
        for _ in range(rounds):
            for name, worker in workers.items():
                # While the others ran, caches went cold and the system may have reclaimed memory.
                worker.ask("iterations", count=1)
                times[name]["iteration"].append(worker.ask("iterations", count=counts[name]))
                times[name]["chain"].append(worker.ask("chains", count=counts[name]))
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
    flops = next(values["flops"] for values in found.values() if "flops" in values)
    results = []
    for program in programs:
        own = times[program.name]
        result = {
            "program": program.name,
            "dtype": program.dtype,
            "iteration_seconds": spread(own["iteration"]),
            "chain_steps_per_second": spread([case.steps / seconds for seconds in own["chain"]]),
            "memory": memory[program.name],
            **{key: value for key, value in found[program.name].items() if key not in ("logits", "flops")},
        }
        achieved = flops / result["iteration_seconds"]["median"]
        result |= {"flops_per_second": achieved, "share_of_products": achieved / products[program.dtype]}
        results.append(result)
        print(f"  {_line(result)}", flush=True)
    return {
        "case": case.name,
        "shape": case.shape,
        "batch": case.batch,
        "steps": case.steps,
        "flops": flops,
        "programs": results,
    }


def _prepare(worker: Worker, case: Case, program: Program, weights: Path) -> Numbers:
    if program.worker == "torch_worker.py":
        settings: Numbers = {"batch": case.batch, "steps": case.steps, "style": program.style, "tf32": program.tf32}
        return worker.ask("prepare", shape=case.shape, weights=str(weights), **settings)
    versions = worker.ask("start", batch=case.batch, slots=SLOTS)
    settings = case.settings(program.dtype)
    return {"versions": versions, **worker.ask("prepare", shape=case.shape, settings=settings, weights=str(weights))}


def _same_logits(programs: Sequence[Program], found: dict[str, Numbers]) -> None:
    """Stops the benchmark if programs that are compared do not compute the same network."""
    expected = next(np.array(found[p.name]["logits"]) for p in programs if p.dtype == "float32")
    for program in programs:
        error = float(np.abs(np.array(found[program.name]["logits"]) - expected).max())
        found[program.name]["logits_error"] = error
        # The stored logits of PyTorch are its plain float32 ones, of either style.
        if error > TOLERANCE[program.dtype]:
            raise SystemExit(f"{program.name}: logits differ by {error:.2g} on the same weights")


def _count(worker: Worker) -> int:
    """How many iterations make a round, after a first call of everything that is timed."""
    worker.ask("chains", count=1)
    return max(1, round(ROUND_SECONDS / max(worker.ask("iterations", count=1), 1e-4)))


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
    main()
