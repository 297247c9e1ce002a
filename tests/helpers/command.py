"""The command as a user meets it, in this process or in one of its own, and what it leaves behind."""

import atexit
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jem_jax.datasets import digits
from jem_jax.main import main
from jem_jax.runs import checkpoint, workdir
from jem_jax.runs.metrics import TIME_FIELDS
from jem_jax.training import trained

HELPERS = Path(__file__).parent

SHORT = (
    "--config=digits",
    "--config.training.epochs=1",
    # No schedule then depends on the number of epochs, which may grow.
    "--config.schedule.learning_rate=steps",
    "--config.sampler.num_steps=1",
    "--config.sampler.buffer_size=64",
    "--config.evaluation.sample_steps=1",
    "--config.evaluation.num_samples=10",
    "--config.training.baseline=false",
    "--config.evaluation.sections=classification,samples",
)
"""A whole run on the digits, without a classifier beside it and with a short report: 18 iterations."""

TINY = (
    *SHORT,
    "--config.model.factory=tiny:mlp",
    "--config.sampler.num_steps=2",
    "--config.sampler.buffer_size=128",
    "--config.evaluation.sample_steps=5",
    "--config.training.log_every=1",
)
"""The same of a network that compiles in half the time."""

SHORTEST = (*TINY, "--config.evaluation.sections=classification")
"""The same with a report that compiles no chains."""


class Command:
    """The command in a process of its own, in a folder.

    Args:
      before: Python that runs before the command does, such as a change of a constant.
      flags: of XLA; None for those of all tests.
      environment: variables to set.
    """

    def __init__(
        self, *arguments: str, cwd: Path, before: str = "", flags: str | None = None, **environment: str
    ) -> None:
        how = ["-c", f"{before}\nimport sys\nfrom jem_jax.main import main\nsys.exit(main())"]
        how = how if before else ["-m", "jem_jax.main"]
        if flags is not None:
            environment["XLA_FLAGS"] = flags
        paths = [str(HELPERS), str(HELPERS / "without_torch"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, *how, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, seconds: float = 120) -> tuple[int, str, str]:
        """Its exit status, output and errors; an error if it takes longer."""
        try:
            output, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, errors = self.process.communicate()
            raise AssertionError(f"still running after {seconds} s:\n{output}\n{errors}") from None
        return self.process.returncode, output, errors

    def wait_for(self, happened: Callable[[], Any], seconds: float = 120) -> None:
        """Waits until something has happened; an error if the process ends before."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError("it did not happen:\n" + "\n".join(self.process.communicate()))
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def contents(path: Path) -> dict[str, str]:
    """A hash of every file below a folder, but for the lock; of a file its own."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.name != ".lock"]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIME_FIELDS} for line in lines]


def steps_logged(run: Path) -> int:
    """How many lines a metrics.jsonl has, 0 where there is none yet."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def restored(run: Path) -> checkpoint.Restored:
    """A run's last checkpoint."""
    facts = workdir.read_facts(run)
    state, buffer = trained.template(facts.config, facts.image_shape, facts.num_classes)
    return checkpoint.restore(run / workdir.CHECKPOINTS, trained.tree(checkpoint.template_of(state), buffer))


def digits_npz(path: Path, shift: int = 0, names: Sequence[str] = "0123456789") -> None:
    """The digits as an .npz, shifted down; files of all shifts have one size and one time."""
    data = digits.load()
    arrays = {"class_names": np.array(list(names))}
    for prefix, split in (("", data.train), ("val_", data.validation), ("test_", data.test)):
        arrays |= {f"{prefix}images": np.roll(split.images, shift, axis=1), f"{prefix}labels": split.labels}
    np.savez(path, **arrays)
    os.utime(path, ns=(10**18, 10**18))


@functools.cache
def finished_run() -> Path:
    """The workdir of a finished run of `TINY`, made once a session; to be copied, not changed."""
    folder = Path(tempfile.mkdtemp(prefix="jem_jax_run_"))
    atexit.register(shutil.rmtree, folder)
    assert main([*TINY, f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"
