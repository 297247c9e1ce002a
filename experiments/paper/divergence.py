"""Short digits runs at settings that diverge: how many end with a working model, with recovery and with remedies.

    python -m experiments.paper.divergence --seeds=10
    python -m experiments.paper.divergence --healthy
    python -m experiments.paper.divergence --healthy --data fashion_mnist=PATH.npz --data cifar10=PATH.npz

The first trains every variant of `SETTINGS` with every seed, in one process on one CPU device, for an hour and a half.
A model works if its last validation accuracy is at least 80 %, and data and samples end at most 10 nats apart. The
others train healthy runs, and store their extremes and the false alarms. Writes experiments/results/divergence.json
after every run, and resumes from there.
"""

import argparse
import contextlib
import io
import itertools
import json
import runpy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.runs import RESULTS, ROOT
from jem_jax import config as configuration
from jem_jax import datasets
from jem_jax.common.errors import UserError
from jem_jax.distributed import processes
from jem_jax.distributed.interrupts import Interrupted
from jem_jax.training import loop

FILE = RESULTS / "divergence.json"
LEAST_ACCURACY, LARGEST_GAP = 0.8, 10.0
ALONE = {"recovery.max_recoveries": 0, "recovery.patience": 10**6}
"""Without recovery, and ended by what no run survives alone: a gap or saturation may pass by itself"""
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": ALONE,
    "recovery": {},
    "recovery, only the learning rate": {"recovery.chain_steps_factor": 1.0},
    "warm-up over 50 iterations": {**ALONE, "optimizer.warmup_steps": 50},
    "warm-up and recovery": {"optimizer.warmup_steps": 50},
    "half the learning rate": {**ALONE, "optimizer.learning_rate": 0.0015},
    "twice the chain steps": {**ALONE, "sampler.num_steps": 10},
    "4 times the chain steps": {**ALONE, "sampler.num_steps": 20},
    "score clipped to ±0.1": {**ALONE, "sampler.grad_clip": 0.1},
    "batch norm": {**ALONE, "model.norm": "batch"},
    "energy L2 penalty 0.1": {**ALONE, "objective.energy_l2": 0.1},
    "input noise 0.1": {**ALONE, "data.input_noise": 0.1},
    "softplus": {**ALONE, "model.activation": "softplus"},
    "swish": {**ALONE, "model.activation": "swish"},
}
_FEW = {"sampler.num_steps": 5, "training.log_every": 5, "training.validate_every": 1}
_WARMED = ("warm-up over 50 iterations", "warm-up and recovery")
_MORE = (
    "recovery, only the learning rate", "half the learning rate", "twice the chain steps",
    "4 times the chain steps",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What diverges, and what is tried against it."""

    what: str
    settings: dict[str, Any]
    """over those of configs/digits_paper.py"""
    variants: tuple[str, ...]


SETTINGS = {
    "few steps": Setting(
        "configs/digits_paper.py with a quarter of its chain steps (5 of 20), for its 720 iterations",
        _FEW,
        tuple(name for name in VARIANTS if name not in _WARMED),
    ),
    "harsh": Setting(
        "the same with 10 times the learning rate and no warm-up, for 144 iterations",
        {
            **_FEW, "training.epochs": 8, "training.checkpoint_every": 1, "optimizer.decay_epochs": (),
            "optimizer.warmup_steps": 0, "optimizer.learning_rate": 0.03,
        },
        tuple(name for name in VARIANTS if name not in _MORE),
    ),
}  # fmt: skip
Planned = tuple[str, str, dict[str, Any], float]
"""A run's key, the config file's name, its settings, and after how many seconds it is stopped"""


class _Deadline:
    """Stops a training after a time, as a signal would."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def requested(self, *_: int) -> bool:
        return time.monotonic() > self._end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, help="how many seeds (default 10, healthy 3)")
    parser.add_argument("--first", type=int, default=0, help="the first seed, to share the work out (default 0)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="only these")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="only these")
    parser.add_argument("--healthy", action="store_true", help="runs of healthy settings, whose alarms are counted")
    parser.add_argument("--minutes", type=float, default=10, help="length of a healthy run (default 10)")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help="an .npz for configs/NAME.py")
    flags = parser.parse_args()
    processes.start(processes.Cluster(), 1, 1)
    with tempfile.TemporaryDirectory() as cache:
        # Runs that differ in their seed alone share a program.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for key, name, settings, seconds in _healthy(flags) if flags.healthy else _wild(flags):
            if key not in read()["runs"]:
                found = outcome(name, settings, seconds)
                # Programs of past runs map memory in pieces, of which a process may have 65,530.
                jax.clear_caches()
                _store(key, found)
                print(key, found, flush=True)


def read() -> dict[str, Any]:
    """What was stored so far: {"runs": {"setting: variant/seed": outcome}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}


def outcome(name: str, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """How one run ended.

    Args:
      name: of a file in configs/.
      settings: {"group.key": value}, over that file's.
      seconds: stop it after so long.
    """
    loose = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    loose.update_from_flattened_dict(settings)
    config = configuration.validate(loose)
    started, error = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            loop.train(config, datasets.load(config.data), Path(folder), "JEM", _Deadline(seconds))  # type: ignore[arg-type]
        except Interrupted:
            pass
        except UserError as ended:
            error = str(ended)
        metrics = Path(folder) / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return _read_lines(lines, error) | {"seconds": round(time.monotonic() - started, 1)}


def _read_lines(lines: Sequence[dict[str, Any]], error: str) -> dict[str, Any]:
    logged = [line for line in lines if line.get("log_px_data") is not None and line["log_px_samples"] is not None]
    gaps = [abs(line["log_px_data"] - line["log_px_samples"]) for line in logged]
    accuracy = next((line["validation_accuracy"] for line in reversed(lines) if "validation_accuracy" in line), None)
    works = not error and accuracy is not None and accuracy >= LEAST_ACCURACY and gaps[-1] <= LARGEST_GAP
    spreads, sizes = ([line[name] for line in logged] for name in ("samples_spread", "samples_rms"))
    return {
        "works": works,
        "accuracy": accuracy,
        "gap": gaps[-1] if gaps else None,
        "recoveries": [line for line in lines if "recovery" in line],
        "iterations": lines[-1]["step"] if lines else 0,
        "largest_gap": max(gaps, default=None),
        "spread": [min(spreads, default=None), max(spreads, default=None)],
        "rms": [min(sizes, default=None), max(sizes, default=None)],
        "error": error,
    }


def _store(key: str, found: dict[str, Any]) -> None:
    results = read()
    whats = {name: setting.what for name, setting in SETTINGS.items()}
    results |= {"command": "python -m experiments.paper.divergence", "what": whats}
    results["runs"][key] = found
    partial = FILE.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(FILE)


def _seeds(flags: argparse.Namespace, count: int) -> range:
    return range(flags.first, flags.first + (flags.seeds or count))


def _wild(flags: argparse.Namespace) -> Iterator[Planned]:
    # Variant by variant: one that was measured at all was measured for every seed.
    for setting, name in itertools.product(flags.settings, flags.variants):
        if name in SETTINGS[setting].variants:
            for seed in _seeds(flags, 10):
                settings = {**SETTINGS[setting].settings, **VARIANTS[name], "seed": seed}
                yield f"{setting}: {name}/{seed}", "digits_paper", settings, 3600


def _healthy(flags: argparse.Namespace) -> Iterator[Planned]:
    paths = dict(pair.split("=", 1) for pair in flags.data) or {"digits": ""}
    for seed in _seeds(flags, 3):
        for name, path in paths.items():
            config = "cifar10_small" if name == "cifar10" else name
            settings = {"training.epochs": 100_000, "training.log_every": 1, "seed": seed}
            data = {"data.name": path} if path else {}
            yield f"healthy {name}/{seed}", config, {**settings, **data}, 60 * flags.minutes


if __name__ == "__main__":
    main()
