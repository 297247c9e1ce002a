"""Where people wait: the main command and the tests, beside those of another commit.

    python -m experiments.speed.minutes --against=COMMIT               the main command, three rounds: half an hour
    python -m experiments.speed.minutes --against=COMMIT --tests       the tests instead, once: an hour
    python -m experiments.speed.minutes --against=COMMIT --step        the paper's iteration instead: three minutes

Both commits run in turns on the same machine, with the same installed libraries. Each round of the command begins with
a cold compilation cache; a second run then finds what the first has compiled. CPU time counts all processes. Writes
experiments/results/minutes.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments.runs import RESULTS, ROOT, store

WATCHED = Path(__file__).with_name("watched.py")
CONFIG, PAPER = "configs/digits.py", "configs/digits_paper.py"
"""the main command's, and the one with the paper's settings, which older commits have in the first"""
STEP_ROUNDS = 5
COLD, WARM = 0.1, 0.2
"""seconds from which on a compilation counts, in the first run and in the second"""
TESTS = {
    "README's command": (),
    "slow tests": ("--no-cov", "-m", "slow"),
    "mathematics": ("--no-cov", "tests/paper", "tests/evaluation"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tests", action="store_true", help="the tests instead of the main command")
    parser.add_argument("--step", action="store_true", help="milliseconds of the paper's iteration instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        other = Path(scratch) / "other"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", other, given.against], cwd=ROOT, check=True)
        stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
        trees = {"before": other, "now": ROOT}
        if given.tests:
            found = {name: _tests(tree, Path(scratch) / f"{name}_python") for name, tree in trees.items()}
            summary = {"tests": {name: _ratios(found["before"].get(name), now) for name, now in found["now"].items()}}
        elif given.step:
            rounds = [
                {name: _iteration(tree, Path(scratch) / f"{name}_{number}") for name, tree in trees.items()}
                for number in range(STEP_ROUNDS)
            ]
            found = {"step": rounds}
            summary = {"step": _ratios(*([some[side] for some in rounds] for side in ("before", "now")))}
        else:
            rounds = [
                {name: _round(tree, Path(scratch) / f"{name}_{number}") for name, tree in trees.items()}
                for number in range(given.rounds)
            ]
            found = {"rounds": rounds}
            summary = {"command": _compared(rounds)}
    path = RESULTS / "minutes.json"
    old = json.loads(path.read_text()) if path.exists() else {"summary": {}, "runs": {}}
    summary, runs = old["summary"] | summary, old["runs"] | found
    command = f"python -m experiments.speed.minutes --against={given.against} --rounds={len(runs.get('rounds', ()))}"
    command += "".join(f", again with --{part}" for part in ("tests", "step") if part in summary)
    store("minutes", command, summary, runs)


def _round(tree: Path, scratch: Path) -> dict[str, dict[str, float]]:
    """A first run with nothing compiled, and a second one."""
    scratch.mkdir()
    return {kind: _command(tree, scratch / kind, scratch / "cache") for kind in ("cold", "warm")}


def _command(tree: Path, workdir: Path, cache: Path) -> dict[str, float]:
    """One run of the main command.

    Returns:
      Seconds: of wall clock and CPU, to the first line of metrics and to the first picture of samples; compilations of
      `COLD` and of `WARM` seconds or more; megabytes at most.
    """
    out = workdir.with_suffix(".json")
    log = workdir.with_suffix(".log").open("wb")
    command = [sys.executable, WATCHED, out, f"--config={CONFIG}", f"--workdir={workdir}"]
    began = time.time()
    process = subprocess.Popen(
        command, cwd=tree, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    first: dict[str, float] = {}
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if "first_metrics" not in first and (workdir / "metrics.jsonl").exists():
            first["first_metrics"] = time.time() - began
        if "first_picture" not in first and any((workdir / "samples").glob("*.png")):
            first["first_picture"] = time.time() - began
        if ended:
            break
        time.sleep(0.1)
    if status:
        raise SystemExit(f"{command} ended with status {os.waitstatus_to_exitcode(status)}; see {log.name}")
    seconds = json.loads(out.read_text())
    return {
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **{name: round(value, 1) for name, value in first.items()},
        "compilations": sum(value >= COLD for value in seconds),
        "long_compilations": sum(value >= WARM for value in seconds),
        "compiling_seconds": round(sum(seconds), 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
    }


def _iteration(tree: Path, workdir: Path) -> float:
    """Milliseconds of an iteration with the paper's settings: the median over the lines of metrics but the first."""
    config = PAPER if (tree / PAPER).exists() else CONFIG
    flags = ("training.epochs=8", "training.baseline=False", "evaluation.sections=classification")
    command = [sys.executable, "-m", "jem_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{flag}" for flag in flags]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return 1e3 / statistics.median([line["iterations_per_second"] for line in lines if "loss" in line][1:])


def _tests(tree: Path, environment: Path) -> dict[str, dict[str, float]]:
    """CPU and wall clock of the tests of a commit; of a kind that it does not know, none."""
    python = _with_its_own(tree, environment)
    found = {}
    for name, arguments in TESTS.items():
        if not all((tree / some).exists() for some in arguments if some.startswith("tests/")):
            continue
        began = time.time()
        process = subprocess.Popen([python, "-m", "pytest", "--quiet", *arguments], cwd=tree)
        _, status, usage = os.wait4(process.pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        # Above 1 no test ran: an older commit calls none of its tests slow.
        if ended <= 1:
            cpu_seconds = round(usage.ru_utime + usage.ru_stime, 1)
            found[name] = {"seconds": round(time.time() - began, 1), "cpu_seconds": cpu_seconds, "status": ended}
    both = [found[name] for name in tuple(TESTS)[:2] if name in found]
    sums = {name: round(sum(one[name] for one in both), 1) for name in ("seconds", "cpu_seconds")}
    found["README's command and slow tests"] = sums
    return found


def _with_its_own(tree: Path, environment: Path) -> Path:
    """A Python with this one's libraries, but the tree's jem_jax, which the processes that tests start find too."""
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    own = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    Path(own, "libraries.pth").write_text(sysconfig.get_path("purelib"))
    install = ("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(tree))
    subprocess.run([python, "-m", *install], check=True)
    return python


def _compared(rounds: list[dict[str, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of now to before within each."""
    return {
        kind: {
            name: _ratios(*([some[side][kind][name] for some in rounds] for side in ("before", "now")))
            for name in rounds[0]["now"][kind]
            if all(name in some["before"][kind] for some in rounds)
        }
        for kind in ("cold", "warm")
    }


def _ratios(before: Any, now: Any) -> dict[str, Any]:
    if isinstance(now, Mapping):
        names = ("seconds", "cpu_seconds")
        return {name: _ratios([before[name]], [now[name]]) if before else {"now": now[name]} for name in names}
    ratios = [b / a for a, b in zip(before, now, strict=True) if a]
    spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)} if ratios else {}
    return {"before": statistics.median(before), "now": statistics.median(now)} | spread


if __name__ == "__main__":
    main()
