"""Processes that wait idle until they are asked, so that measurements do not disturb each other.

A worker is a module that calls `serve` with its functions. `Worker` starts one and asks it, one line of JSON at a
time.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.runs import ROOT


class Worker:
    """A worker process; ends with the `with` block.

    Args:
      script: a file beside this one.
      environment: variables to set besides those of this process.
      patience: seconds that an answer may take.
      python: the interpreter; that of this process by default.
    """

    def __init__(
        self,
        script: str,
        environment: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
        patience: float = 3600,
    ) -> None:
        self._patience = patience
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed at exit)
        self._process = subprocess.Popen(
            [str(python), "-m", f"experiments.speed.{Path(script).stem}"],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, function: str, **arguments: Any) -> Any:
        """What the worker's function returns.

        Raises:
          RuntimeError: the worker ended, or was ended after `patience` seconds; with what it said last.
        """
        timer = threading.Timer(self._patience, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            return self._ask(function, arguments)
        finally:
            timer.cancel()

    def _ask(self, function: str, arguments: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([function, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"{self._process.args} ended:\n{self._errors.read()[-3000:]}")
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it ended before; `ask` says why
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers questions from standard input until it ends. What else is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(functions[name](**arguments)), file=answers, flush=True)


def resident_bytes() -> int:
    """Memory of this process that lies in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory of this process that lay in RAM at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def timed(run: Callable[[], Any], count: int, wait: Callable[[], Any] = lambda: None) -> float:
    """Seconds of a call, the mean of `count` after another, the last one waited for."""
    wait()
    started = time.perf_counter()
    for _ in range(count):
        run()
    wait()
    return (time.perf_counter() - started) / count
