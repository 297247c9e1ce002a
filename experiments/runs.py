"""Runs of the command in processes of their own, and where their results go."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "pages" / "images"

_LONG = ("confusion", "recall", "precision")


def run_command(config: str, workdir: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Trains and evaluates once.

    Args:
      config: name of a file in configs/.
      workdir: an empty or missing folder.
      settings: "group.key=value".

    Returns:
      The report's values without its longest tables, with `settings`, `command_seconds` (wall) and
      `peak_memory_mib`.

    Raises:
      SystemExit: the run failed.
    """
    flags = [f"--config.{setting}" for setting in settings]
    command = [sys.executable, "-m", "jem_jax.main", f"--config=configs/{config}.py", f"--workdir={workdir}", *flags]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    report = json.loads((workdir / "report" / "report.json").read_text())
    for model in ("jem", "baseline"):
        for name in _LONG:
            report.get(model, {}).pop(name, None)
    for section in report["sections"].values():
        section.pop("how")
    return {
        "settings": list(settings),
        "command_seconds": round(time.monotonic() - started, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        **report,
    }


def store(name: str, command: str, summary: Any, runs: Any, quiet: bool = False) -> None:
    """Writes experiments/results/NAME.json with the command that made it, and prints the summary unless `quiet`."""
    result = {"command": command, **machine(), "summary": summary, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not quiet:
        print(json.dumps(summary, indent=1))


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    return {"cores": os.cpu_count(), "cpu": _cpu()}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
