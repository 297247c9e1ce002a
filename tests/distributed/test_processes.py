"""Several processes on one machine: the same run, stopped and gone on with together, and no process left waiting."""

import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from command import HELPERS, TINY, Command, contents, finished_run, free_port, metrics
from programs import side_by_side

from jem_jax.runs import checkpoint
from jem_jax.training import recovery

SOON = (
    "from jem_jax.commands import modes\nfrom jem_jax.distributed import processes\n"
    "processes._SILENT_SECONDS = 5\nmodes._SHARED_SECONDS = 1\n"
)


def _pair(cwd, *arguments, before=""):
    """Two processes of two devices each."""
    cluster = (f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2")
    return [
        Command(*arguments, *cluster, f"--process_id={number}", cwd=cwd, before=before, JAX_NUM_CPU_DEVICES="2")
        for number in (0, 1)
    ]


def _said(text):
    """Its lines, but for those that gloo prints."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
def test_the_best_and_the_regular_checkpoints_are_saved_at_once(tmp_path):
    """Their processes once took a barrier of the one for the other's, and waited for ever."""
    address = f"127.0.0.1:{free_port()}"
    program = [sys.executable, "-m", "programs.side_by_side", address]
    pair = [subprocess.Popen([*program, number, str(tmp_path)], cwd=HELPERS) for number in ("0", "1")]
    try:
        assert [process.wait(120) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    last = side_by_side.STEPS
    assert checkpoint.steps(tmp_path / "best") == [last]
    assert checkpoint.steps(tmp_path / "checkpoints") == [last - 1, last]


@pytest.mark.slow
def test_both_recover_together_and_where_one_is_killed_the_other_ends_with_an_error_and_both_go_on(tmp_path):
    run = tmp_path / "runs" / "digits"
    wild = ("--config.optimizer.learning_rate=90", "--config.recovery.learning_rate_factor=0.0005",
            "--config.recovery.patience=3", "--config.recovery.chain_steps_factor=1",
            "--config.training.epochs=10000")  # fmt: skip
    saved = 0
    for number in (0, 1):
        # The same command of both goes on.
        pair = _pair(tmp_path, *TINY, *wild, before=SOON)
        pair[0].wait_for(lambda before=saved: max(checkpoint.steps(run / "checkpoints"), default=0) > before)
        killed, other = pair[number], pair[1 - number]
        killed.process.kill()
        started = time.monotonic()
        status, _, errors = other.wait(60)
        assert status not in (0, None)
        assert "Traceback" not in errors
        # Twice the time that processes may be silent, which is five seconds here, and some for a busy machine.
        assert time.monotonic() - started < 30
        killed.wait()
        saved = checkpoint.steps(run / "checkpoints")[-1]
    assert len(recovery.read(run)) >= 1
    logged = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in logged[:saved]] == list(range(1, saved + 1))
    assert all(np.isfinite(line["loss"]) for line in logged)


# What each of the two processes is given, and what both say.
WRONG = (
    ("--config.seed=0", "--config.seed=1", "the processes were started with different settings"),
    ("--config.seed=1", "--config.seed=1", "holds a run of other settings: seed is 0 there, 1 here"),
    ("--workdir=new", "--workdir=elsewhere", "workdir elsewhere is not the same folder on all processes"),
)
ONE_AFTER_THE_OTHER = f"""
import sys
from jem_jax.main import main
for case in {WRONG}:
    assert main([*sys.argv[1:], case[int(sys.argv[-1][-1])]]) == 2
    processes._join = lambda _: None
sys.exit()
"""


def test_what_one_process_finds_wrong_ends_both_with_one_line(tmp_path):
    run = tmp_path / "runs" / "digits"
    shutil.copytree(finished_run(), run)
    before = contents(run)
    for process in _pair(tmp_path, *TINY, before=SOON + ONE_AFTER_THE_OTHER):
        status, _, errors = process.wait()
        assert status == 2
        for line, (*_, said) in zip(_said(errors), WRONG, strict=True):
            assert said in line
    assert contents(run) == before
    assert not (tmp_path / "elsewhere").exists()
