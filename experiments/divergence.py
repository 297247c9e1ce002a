"""Digits runs at settings that diverge: how many end with a working model, with recovery, without it, with remedies.

    python experiments/divergence.py --seeds=10
    python experiments/divergence.py --healthy --data fashion_mnist=PATH.npz --data cifar10=PATH.npz

The first trains every variant of `VARIANTS` for every seed; a model works if its test accuracy is at least 90 % and the
last line of its metrics has a gap of at most 10 nats between data and samples. The second makes long healthy runs and
counts the alarms that the defaults raise. Writes experiments/results/divergence.json after every run, and goes on where
it was cut off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runs import RESULTS, ROOT

FILE = RESULTS / "divergence.json"
LEAST_ACCURACY, LARGEST_GAP = 0.9, 10.0
COMMON = (
    "training.epochs=12", "training.cpu_devices=1", "training.baseline=false", "optimizer.decay_epochs=()",
    "evaluation.sections=classification",
)  # fmt: skip
WILD = ("optimizer.warmup_steps=0", "optimizer.learning_rate=0.03")
"""No warm-up, and ten times the learning rate of configs/digits.py"""
ALONE = (*WILD, "recovery.max_recoveries=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "nothing": ALONE,
    "recovery": WILD,
    "recovery, patience 20": (*WILD, "recovery.patience=20", "recovery.max_gap=10"),
    "energy L2 penalty 0.1": (*ALONE, "objective.energy_l2=0.1"),
    "gradient clipped to ±0.1 in the chain": (*ALONE, "sampler.grad_clip=0.1"),
    "input noise 0.1": (*ALONE, "data.input_noise=0.1"),
    "swish": (*ALONE, "model.activation=swish"),
    "softplus": (*ALONE, "model.activation=softplus"),
    "batch norm": (*ALONE, "model.norm=batch"),
    "warm-up over 100 iterations": (*ALONE, "optimizer.warmup_steps=100"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, help="runs seeds 0, 1, … (default 10, healthy 3)")
    parser.add_argument(
        "--healthy", action="store_true", help="long runs of healthy settings, whose alarms are counted"
    )
    parser.add_argument("--minutes", type=float, default=10, help="length of a healthy run (default 10)")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help="an .npz for configs/NAME.py")
    flags = parser.parse_args()
    for key, config, settings, seconds in _healthy(flags) if flags.healthy else _wild(flags):
        results = read()
        if key not in results["runs"]:
            results["runs"][key] = outcome(config, settings, seconds)
            results["command"] = "python experiments/divergence.py"
            partial = FILE.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(FILE)
            print(key, results["runs"][key], flush=True)


def read() -> dict[str, Any]:
    """What was stored so far: {"runs": {"variant/seed": outcome}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}


def outcome(config: str, settings: Sequence[str], seconds: float | None) -> dict[str, Any]:
    """How one run ended.

    Args:
      seconds: stop it after so long; None: let it end.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = [f"--config.{setting}" for setting in settings]
        command = [sys.executable, "-m", "jem_jax.main", f"--config=configs/{config}.py", f"--workdir={run}", *flags]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            _, errors = process.communicate()
        status = process.returncode
        if status not in (0, 143) and "diverged" not in errors:
            raise SystemExit(f"{' '.join(command)} ended with status {status}: {errors}")
        return _read_run(run, status, errors) | {"seconds": round(time.monotonic() - started, 1)}


def _read_run(run: Path, status: int, errors: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line.get("log_px_data") is not None and line["log_px_samples"] is not None]
    gap = abs(logged[-1]["log_px_data"] - logged[-1]["log_px_samples"]) if logged else None
    report = run / "report" / "report.json"
    accuracy = json.loads(report.read_text())["jem"]["accuracy"] if report.exists() else None
    works = accuracy is not None and gap is not None and accuracy >= LEAST_ACCURACY and gap <= LARGEST_GAP
    return {
        "status": status,
        "works": works,
        "accuracy": accuracy,
        "gap": gap,
        "recoveries": [line for line in lines if "recovery" in line],
        "iterations": lines[-1]["step"] if lines else 0,
        "largest_gap": max((abs(line["log_px_data"] - line["log_px_samples"]) for line in logged), default=None),
        "least_spread": min((line["samples_spread"] for line in logged), default=None),
        "largest_rms": max((line["samples_rms"] for line in logged), default=None),
        "error": errors.strip().splitlines()[-1] if status not in (0, 143) else "",
    }


def _wild(flags: argparse.Namespace) -> Iterator[tuple[str, str, tuple[str, ...], float | None]]:
    # Seed by seed, so that variants can be compared however early this is stopped.
    for seed in range(flags.seeds or 10):
        for name, settings in VARIANTS.items():
            yield f"{name}/{seed}", "digits", (*COMMON, *settings, f"seed={seed}"), None


def _healthy(flags: argparse.Namespace) -> Iterator[tuple[str, str, tuple[str, ...], float | None]]:
    paths = {"digits": "", **dict(pair.split("=", 1) for pair in flags.data)}
    for seed in range(flags.seeds or 3):
        for name, path in paths.items():
            config = "cifar10_small" if name == "cifar10" else name
            data = (f"data.name={path}",) if path else ()
            settings = ("training.baseline=false", "training.epochs=100000", *data, f"seed={seed}")
            yield f"healthy {name}/{seed}", config, settings, 60 * flags.minutes


if __name__ == "__main__":
    main()
