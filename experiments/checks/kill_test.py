"""Whether a run that is killed again and again ends bit for bit as an untouched one.

    python -m experiments.checks.kill_test

Trains the digits twice with the same command. The second run is killed with SIGKILL at 20 random moments of a seed:
while it starts, while it trains, and every fifth time while it writes a checkpoint. Then every array of the last
checkpoints and every line of both metrics.jsonl are compared, except times. The exit status is 1 if they differ.
Writes experiments/results/kill_test.json. Takes about three minutes on two cores.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.runs import ROOT, store
from jem_jax.runs import checkpoint, workdir
from jem_jax.runs.metrics import TIME_FIELDS
from jem_jax.training import trained

SETTINGS = (
    "training.epochs=30", "training.baseline=false", "training.log_every=3", "training.validate_every=1",
    "training.checkpoint_every=1", "evaluation.sections=classification",
)  # fmt: skip
_STARTING_SECONDS = 12
_PAUSE = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        if _start(undisturbed).wait():
            raise SystemExit("the undisturbed run failed")
        kills = _kill_all(killed, given.kills, random.Random(given.seed), len(_lines(undisturbed)))
        status = _start(killed).wait()
        differences = ["the last command failed"] if status else _differences(undisturbed, killed)
        arrays = len(_arrays(undisturbed))
    summary = {
        "kills": len(kills),
        "in_a_checkpoint_write": sum(kill["unfinished_checkpoint"] for kill in kills),
        "arrays_compared": arrays,
        "differences": differences,
    }
    store(
        "kill_test", f"python -m experiments.checks.kill_test --kills={given.kills} --seed={given.seed}", summary, kills
    )
    sys.exit(1 if differences else 0)


def _kill_all(run: Path, count: int, moments: random.Random, total: int) -> list[dict[str, Any]]:
    kills = []
    for number in range(count):
        # So far that all of them come before the run's end.
        line = int(total * (number + moments.random()) / (count + 1))
        kind = ("starting", "training", "training", "training", "writing")[number % 5]
        kill = _kill(run, kind, line, moments)
        print(f"kill {number + 1} of {count}: {kill}", flush=True)
        kills.append(kill)
    return kills


def _kill(run: Path, kind: str, line: int, moments: random.Random) -> dict[str, Any]:
    """Starts the command and kills it: after some seconds, soon after a line of the log, or in a write after it."""
    delay = moments.uniform(0, _STARTING_SECONDS if kind == "starting" else 0.5)
    process = _start(run)
    if kind != "starting":
        _wait(process, lambda: len(_lines(run)) > line)
    if kind == "writing":
        _wait(process, lambda: _unfinished(run))
    else:
        time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended before it could be killed, with status {process.returncode}")
    lines = _lines(run)
    return {
        "moment": kind,
        "iteration_logged": json.loads(lines[-1])["step"] if lines else 0,
        "unfinished_checkpoint": bool(_unfinished(run)),
    }


def _start(run: Path) -> subprocess.Popen:
    flags = [f"--config.{setting}" for setting in SETTINGS]
    command = [sys.executable, "-m", "jem_jax.main", "--config=configs/digits.py", f"--workdir={run}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def _wait(process: subprocess.Popen, happened: Callable[[], Any]) -> None:
    while not happened():
        if process.poll() is not None:
            raise SystemExit(f"the run ended before it could be killed, with status {process.returncode}")
        time.sleep(_PAUSE)


def _unfinished(run: Path) -> list[Path]:
    """Folders of checkpoints that are being written: Orbax's own under another name, and those without a manifest."""
    folder = run / workdir.CHECKPOINTS
    if not folder.is_dir():
        return []
    return [*folder.glob("*.orbax-checkpoint-tmp*"), *checkpoint.unfinished(folder)]


def _lines(run: Path) -> list[str]:
    """The whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def _differences(run: Path, other: Path) -> list[str]:
    ours, theirs = _arrays(run), _arrays(other)
    different = sorted(ours.keys() ^ theirs.keys())
    different += [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    return different + ([] if _metrics(run) == _metrics(other) else ["metrics.jsonl"])


def _arrays(run: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of all that the last checkpoint holds."""
    facts = workdir.read_facts(run)
    state, buffer = trained.template(facts.config, facts.image_shape, facts.num_classes)
    found = checkpoint.restore(run / workdir.CHECKPOINTS, trained.tree(checkpoint.template_of(state), buffer))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(found.tree)}
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def _metrics(run: Path) -> list[dict[str, Any]]:
    values = [json.loads(line) for line in _lines(run)]
    return [{name: value for name, value in line.items() if name not in TIME_FIELDS} for line in values]


if __name__ == "__main__":
    main()
