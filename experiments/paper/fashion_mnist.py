"""The Fashion-MNIST run with its report.

    python -m experiments.paper.fashion_mnist

Runs `python -m jem_jax.main --config=configs/fashion_mnist.py`. Writes experiments/results/fashion_mnist.json and a
picture of the replay buffer. --data=FILE.npz takes the images from there instead of a download. A finished run in
--workdir is not run again.
"""

import argparse
import shutil
from pathlib import Path

from experiments.runs import IMAGES, run_command, store

NAMES = ("accuracy", "nll", "brier", "ece", "ece_interval", "mce", "ece_scaled", "temperature")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz (docs/pages/run.md); default: a download")
    parser.add_argument("--workdir", type=Path, default=Path("runs/fashion_mnist"))
    flags = parser.parse_args()
    settings = [f"data.name={flags.data.resolve()}"] if flags.data else []
    run = run_command("fashion_mnist", flags.workdir.resolve(), settings)
    # The file's place says nothing, and the time is that of a command that may have found the run finished.
    if flags.data:
        run["settings"], run["run"]["data"] = [f"data.name={flags.data.name}"], flags.data.name
    del run["command_seconds"], run["peak_memory_mib"]
    shutil.copy(flags.workdir / "report" / "buffer_by_class.png", IMAGES / "fashion_mnist_buffer.png")
    summary = {model: {name: run[model][name] for name in NAMES} for model in ("jem", "baseline")}
    store("fashion_mnist", "python -m experiments.paper.fashion_mnist", summary, [run])


if __name__ == "__main__":
    main()
