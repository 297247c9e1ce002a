"""Metrics of a run in progress: metrics.jsonl, TensorBoard and the progress bar."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from jem_jax.common import files

FILE = "metrics.jsonl"
TIME_FIELDS = ("seconds", "iterations_per_second")
_SECONDS_BETWEEN_LINES = 15.0
_SHOWN = {"loss": "loss", "accuracy": "acc", "log_px_data": "log p data", "log_px_samples": "log p samples"}


class Recorder:
    """Writes a run's metrics. Only the first process writes.

    Args:
      directory: gets metrics.jsonl and tensorboard/.
      title: stands before the progress bar.
      first_step: iterations already done; lines of metrics.jsonl past it are cut.
      total_steps: of the whole run.
      events: recovery records; they survive rollbacks. Those that metrics.jsonl lacks are added.
      writes: whether this process writes.
    """

    def __init__(
        self,
        directory: Path,
        title: str,
        first_step: int,
        total_steps: int,
        events: Sequence[dict[str, Any]] = (),
        writes: bool = True,
    ) -> None:
        self._directory, self._writes = directory, writes
        self._title, self._total, self._step = title, total_steps, first_step
        self._started = self._logged = self._printed = time.monotonic()
        if not writes:
            return
        present = self._open(first_step)
        for event in events:
            if event["recovery"] not in present:
                self.record(first_step, event)
        # Without a terminal the bar is off, and `progress` prints a line now and then.
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc=title, unit="it", disable=None, dynamic_ncols=True, leave=True
        )

    def rewind(self, step: int, event: dict[str, Any], text: str) -> None:
        """Cuts the lines past the iteration that a run went back to, and adds one about that.

        Args:
          event: for metrics.jsonl and TensorBoard.
          text: for the screen.
        """
        self._step, self._logged = step, time.monotonic()
        if not self._writes:
            return
        self._file.close()
        self._board.close()
        self._open(step)
        self.record(step, event)
        self._board.add(step, summary.text("recovery", text))
        self._board.flush()
        self._bar.n = step
        self._bar.refresh()
        tqdm.write(f"{self._title}: {text}")

    def end(self, step: int, event: dict[str, Any], text: str) -> None:
        """Records in metrics.jsonl and TensorBoard why the run ended for good at an iteration."""
        if self._writes:
            self.record(step, event)
            self._board.add(step, summary.text("divergence", text))
            self._board.flush()

    def _open(self, step: int) -> set[int]:
        path = self._directory / FILE
        events = cut(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _Board(self._directory / "tensorboard", step)
        return events

    def progress(self, step: int, values: dict[str, float]) -> None:
        """A line of training metrics at an iteration, and the bar moved on to it."""
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._logged, 1e-9)
        self._step, self._logged = step, now
        if self._writes:
            shown = ", ".join(f"{short} {values[name]:.3g}" for name, short in _SHOWN.items() if name in values)
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            if self._bar.disable and now - self._printed > _SECONDS_BETWEEN_LINES:
                self._printed = now
                left = duration((self._total - step) / rate)
                print(f"{self._title} {step}/{self._total}: {shown}, {rate:.3g} it/s, {left} left", flush=True)
        self.record(step, {**values, "iterations_per_second": rate})

    def record(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl; its numbers go to TensorBoard too."""
        if not self._writes:
            return
        # JSON has no NaN.
        values = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        line = {"step": step, **values, "seconds": round(time.monotonic() - self._started, 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add(step, summary.scalar(name, value))
        self._board.flush()

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._writes:
            self._bar.close()
            self._file.close()
            self._board.close()


class _Board:
    """TensorBoard's event file, written in the caller's thread, which gets the errors.

    SummaryWriter writes in a thread of its own. A full disk ends that thread, and the next call then waits for ever.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # TensorBoard hides what earlier processes wrote past this iteration.
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, content: Any) -> None:
        """A point of a curve, or a note."""
        self._write(Event(step=step, summary=content))

    def flush(self) -> None:
        """Everything so far into the file."""
        self._events.flush()

    def close(self) -> None:
        """Closes the file. Everything was flushed before, so an error of a full disk was raised before too."""
        with contextlib.suppress(OSError):
            self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without damaged and unfinished ones; empty where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [values for line in text.split("\n") if (values := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def cut(path: Path, last_step: int) -> set[int]:
    """Drops the lines of a metrics.jsonl past an iteration, and damaged or unfinished ones.

    Returns:
      The numbers of its recoveries, whose lines all stay.
    """
    if not path.exists():
        return set()
    lines = [values for values in read(path) if "recovery" in values or 0 < values["step"] <= last_step]
    files.write_text(path, "".join(json.dumps(values) + "\n" for values in lines))
    return {values["recovery"] for values in lines if isinstance(values.get("recovery"), int)}


def duration(seconds: float) -> str:
    """A time span as a person says it: 45 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
