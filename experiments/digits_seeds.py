"""The digits run over several seeds: accuracy, time and memory of the whole command.

    python experiments/digits_seeds.py

Runs `python -m jem_jax.main --config=configs/digits.py` once for each seed, one after another, each in a fresh process
and workdir, and writes what came out to experiments/results/digits_seeds.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "digits_seeds.json"


def run(seed: int, folder: Path) -> dict[str, Any]:
    """One run of the command: its report, wall seconds and peak resident memory."""
    workdir = folder / str(seed)
    command = [sys.executable, "-m", "jem_jax.main", "--config=configs/digits.py", f"--workdir={workdir}"]
    started = time.monotonic()
    process = subprocess.Popen([*command, f"--config.seed={seed}"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run of seed {seed} failed with status {os.waitstatus_to_exitcode(status)}")
    report = json.loads((workdir / "report" / "report.json").read_text())
    return {
        "seed": seed,
        "command_seconds": round(time.monotonic() - started, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "training_seconds": report["run"]["seconds"]["training"],
        "jem": report["jem"],
        "baseline": report["baseline"],
        "run": report["run"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs seeds 0, 1, … (default 3)")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder)) for seed in range(seeds)]
    summary = {
        "jem_accuracy_mean": statistics.mean(one["jem"]["accuracy"] for one in runs),
        "baseline_accuracy_mean": statistics.mean(one["baseline"]["accuracy"] for one in runs),
        "training_seconds_max": max(one["training_seconds"] for one in runs),
        "command_seconds_max": max(one["command_seconds"] for one in runs),
        "peak_memory_mib_max": max(one["peak_memory_mib"] for one in runs),
    }
    result = {
        "command": "python experiments/digits_seeds.py",
        "cores": os.cpu_count(),
        "summary": summary,
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
