"""The work that waits for a GPU, most valuable first, cut into pieces with a time limit each.

    python experiments/gpu_queue.py --list
    python experiments/gpu_queue.py --data=cifar10.npz ten_minutes classifier  these entries, in this order
    python experiments/gpu_queue.py --rehearse ten_minutes                      the same with tiny sizes, on a CPU

`--data` is CIFAR-10 as docs/pages/run.md describes an .npz. Where it does not travel whole, each call brings a part of
it with `--part=FILE`; parts are kept in --parts, outside the tree, and joined. Runs lie in --runs (default runs/queue)
and go on where an earlier piece was cut off. Each entry writes experiments/results/queue/ENTRY.json every few seconds:
its command, how far it is, its last metrics, and the report's numbers once there is a report. With --out these files
are copied there. The machine needs no network: a folder carried/wheels holds what its Python lacks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "queue"
_EVERY = 5.0
"""seconds between two looks at a running entry"""
_NUMBERS = "classification,calibration,ood,training"
"""the sections that take seconds"""
_TINY = (
    "model.depth=10", "model.width=1", "data.name=digits", "data.pad=1", "sampler.num_steps=1", "training.epochs=2",
    "training.batch_size=64", "training.labelled_batch_size=128", "sampler.buffer_size=640",
    "evaluation.attack_images=8", "evaluation.refined_images=4", "evaluation.num_samples=10",
    "evaluation.ood_images=20", "model.dtype=float32", "training.statistics_images=100", "evaluation.ood_sets=",
    "evaluation.sections=classification",
)  # fmt: skip


class Entry(NamedTuple):
    """A piece of work: one call of the main command."""

    question: str
    limit: int
    """seconds, after which the command is told to save and stop"""
    config: str
    settings: tuple[str, ...] = ()


ENTRIES = {
    "ten_minutes": Entry(
        "What does batch norm frozen from 60 % on reach?",
        400,
        "cifar10_ten_minutes",
        ("evaluation.sections=classification,calibration",),
    ),
    "twice_as_long": Entry(
        "What do 150 epochs reach? The paper's JEM has 92.9 %.",
        590,
        "cifar10_ten_minutes",
        ("training.epochs=150", "evaluation.sections=classification,calibration"),
    ),
    "running_norm": Entry(
        "What does the same reach without the freeze?",
        400,
        "cifar10_ten_minutes",
        ("schedule.freeze_norm=1.0", "evaluation.sections=classification,calibration"),
    ),
    "ten_minutes_report": Entry(
        "The whole report of the ten-minute run.", 590, "cifar10_ten_minutes", ("evaluation.attack_images=1000",)
    ),
    "classifier": Entry(
        "What does a plain classifier of the same schedule reach?",
        200,
        "cifar10_ten_minutes",
        ("objective.p_x=0.0", "objective.energy_l2=0.0", "optimizer.learning_rate=0.2", "optimizer.clip_norm=0.0",
         "schedule.freeze_norm=1.0", "training.epochs=60", f"evaluation.sections={_NUMBERS}"),
    ),
    "width_4": Entry(
        "Is a quarter of the arithmetic for four times the epochs better?",
        300,
        "cifar10_ten_minutes",
        ("model.width=4", "training.epochs=300", f"evaluation.sections={_NUMBERS}"),
    ),
    "full_p_x": Entry(
        "What does p(x) at full weight cost in accuracy, and does it keep p(x) in step?",
        600,
        "cifar10_ten_minutes",
        ("objective.p_x=1.0", "evaluation.sections=classification,calibration"),
    ),
    "late_sam": Entry(
        "What does ASAM in the last eighth give?",
        590,
        "cifar10_ten_minutes",
        ("optimizer.sam_rho=2.0", "schedule.sam_start=0.875", "training.epochs=160", f"evaluation.sections={_NUMBERS}"),
    ),
    "no_norm": Entry(
        "What does the gradient score of a network without norm layers reach, and its accuracy?",
        590,
        "cifar10_ten_minutes",
        ("model.norm=none", "schedule.freeze_norm=1.0", "sampler.batch_statistics=false",
         "optimizer.learning_rate=0.05", "training.epochs=150", f"evaluation.sections={_NUMBERS}"),
    ),
    "jem": Entry("JEM's own settings for 150 seconds.", 200, "cifar10",
                 ("model.dtype=bfloat16", "training.epochs=2", f"evaluation.sections={_NUMBERS}")),
    "jempp": Entry("JEM++'s settings for 150 seconds.", 200, "cifar10_jempp",
                   ("model.dtype=bfloat16", "training.epochs=3", f"evaluation.sections={_NUMBERS}")),
    "sada": Entry("SADA-JEM's settings for 150 seconds.", 200, "cifar10_sada",
                  ("model.dtype=bfloat16", "training.epochs=4", f"evaluation.sections={_NUMBERS}")),
    "digits": Entry("Does the digits' report take at most 40 seconds on a GPU?", 200, "digits"),
}  # fmt: skip
"""most valuable first"""


def main() -> int:
    """Runs the entries that are named, each within its limit; the exit status counts those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="ENTRY", choices=[[], *ENTRIES])
    parser.add_argument("--list", action="store_true", help="say what waits")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--data", help="CIFAR-10 as an .npz; default: the parts, or carried/cifar10.npz")
    parser.add_argument("--part", type=Path, help="an .npz with a part of the data set, to be kept and joined")
    parser.add_argument("--parts", type=Path, default=Path("/tmp/jem_jax_parts"), help="where parts are kept")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "queue")
    parser.add_argument("--out", type=Path, help="a folder that gets copies of results and logs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting for all")
    flags = parser.parse_args()
    if flags.list or not flags.entries:
        for name, entry in ENTRIES.items():
            print(f"{name:20} {entry.limit:4} s  {entry.question}")
        return 0
    flags.data = flags.data or str(_joined(flags.parts, flags.part) or ROOT / "carried" / "cifar10.npz")
    environment = os.environ if flags.rehearse else _with_site()
    failed = 0
    for name in flags.entries:
        failed += _run(name, ENTRIES[name], flags, environment)
    return failed


def _joined(folder: Path, part: Path | None) -> Path | None:
    """The parts brought so far as one .npz; None where there are none."""
    if part:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(part, folder / f"part_{part.name}")
    parts = [np.load(path, allow_pickle=False) for path in sorted(folder.glob("part_*.npz"))]
    if not parts:
        return None
    joined = {}
    for key in ("images", "labels", "test_images", "test_labels"):
        arrays = [arrays[key] for arrays in parts if key in arrays.files]
        joined |= {key: np.concatenate(arrays)} if arrays else {}
    np.savez(folder / "joined.npz", **joined)
    return folder / "joined.npz"


def _with_site() -> dict[str, str]:
    """The environment of a machine that has JAX but not this package: as an installed wheel lays it out."""
    site = Path(os.environ.get("SITE", "/tmp/jem_jax_site"))
    shutil.copytree(ROOT / "jem_jax", site / "jem_jax", dirs_exist_ok=True)
    shutil.copytree(ROOT / "configs", site / "jem_jax" / "configs", dirs_exist_ok=True)
    wheels = sorted((ROOT / "carried" / "wheels").glob("*.whl"))
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--upgrade", "--target", str(site), *map(str, wheels)], check=True)
    return {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def _run(name: str, entry: Entry, flags: argparse.Namespace, environment: Any) -> int:
    folder = flags.runs / (f"{name}_tiny" if flags.rehearse else name.removesuffix("_report"))
    settings = [f"data.name={flags.data}", *entry.settings, *flags.set]
    if flags.rehearse:
        settings = [*entry.settings, *_TINY, *flags.set]
    command = [
        sys.executable, "-m", "jem_jax.main", f"--config=configs/{entry.config}.py", f"--workdir={folder}",
        *(f"--config.{setting}" for setting in settings),
    ]  # fmt: skip
    print(f"== {name}: {' '.join(command)}", flush=True)
    flags.runs.mkdir(parents=True, exist_ok=True)
    log = flags.runs / f"{name}.log"
    started = time.monotonic()
    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        told = False
        while running.poll() is None:
            time.sleep(_EVERY if time.monotonic() - started > _EVERY else 0.2)
            spent = time.monotonic() - started
            _store(name, entry, command, folder, log, spent, None, flags)
            if spent > entry.limit and not told:
                running.terminate()
                told = True
            if spent > entry.limit + 30:
                running.kill()
    _store(name, entry, command, folder, log, time.monotonic() - started, running.returncode, flags)
    print("\n".join(log.read_text().splitlines()[-12:]), flush=True)
    return running.returncode != 0


def _store(
    name: str, entry: Entry, command: list[str], folder: Path, log: Path, spent: float, status: int | None,
    flags: argparse.Namespace,
) -> None:  # fmt: skip
    """Writes the entry's result as far as it goes."""
    lines = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    said = log.read_text()
    report = folder / "report" / "report.json"
    result = {
        "question": entry.question,
        "command": " ".join(["python", *command[1:]]),
        "machine": _machine(),
        "seconds": round(spent, 1),
        "limit": entry.limit,
        "status": status,
        "start": next((line for line in said.splitlines() if "compiled in" in line), None),
        "metrics": [line for line in lines if "validation_accuracy" in line or "recovery" in line] + lines[-2:],
        "report": json.loads(report.read_text()) if report.exists() and status == 0 else None,
    }
    target = RESULTS / f"{name}{'_tiny' if flags.rehearse else ''}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(target)
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, flags.out)
        shutil.copy(log, flags.out)
        if (folder / "metrics.jsonl").exists():
            shutil.copy(folder / "metrics.jsonl", flags.out / f"{name}_metrics.jsonl")


def _machine() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "CPU"
    except (OSError, subprocess.TimeoutExpired):
        return "CPU"


if __name__ == "__main__":
    sys.exit(main())
