"""The digits run over several seeds: accuracy, time and memory of the whole command.

    python experiments/digits_seeds.py

Runs `python -m jem_jax.main --config=configs/digits.py` once for each seed, one after another, each in a fresh process
and workdir, and writes what came out to experiments/results/digits_seeds.json.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from runs import run_command, store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs seeds 0, 1, … (default 3)")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_command("digits", Path(folder) / str(seed), [f"seed={seed}"]) for seed in range(seeds)]
    summary = {
        "jem_accuracy_mean": statistics.mean(one["jem"]["accuracy"] for one in runs),
        "baseline_accuracy_mean": statistics.mean(one["baseline"]["accuracy"] for one in runs),
        "training_seconds_max": max(one["run"]["seconds"]["training"] for one in runs),
        "command_seconds_max": max(one["command_seconds"] for one in runs),
        "peak_memory_mib_max": max(one["peak_memory_mib"] for one in runs),
    }
    store("digits_seeds", "python experiments/digits_seeds.py", summary, runs)


if __name__ == "__main__":
    main()
