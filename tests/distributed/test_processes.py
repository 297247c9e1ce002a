"""Several processes on one machine: the same run, stopped and gone on with together, and no process left waiting."""

import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from command import HELPERS, SHORTEST, TINY, Command, contents, finished_run, free_port, metrics
from programs import side_by_side

from jem_jax.main import main
from jem_jax.runs import checkpoint, workdir
from jem_jax.training import recovery, trained

EPOCHS = (*SHORTEST, "--config.training.checkpoint_every=1", "--config.training.keep_checkpoints=4")
"""To be given a number of epochs, 18 iterations each; one is what `finished_run` has done."""
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of three epochs in this process, on its four devices, its checkpoints of every epoch kept."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([*EPOCHS, "--config.training.epochs=3", f"--workdir={run}"]) == 0
    return run


def _assert_whole(run, step, undisturbed):
    """The last checkpoint is of that iteration, and to rounding what the undisturbed run had then, buffer and all."""
    facts = workdir.read_facts(run)
    state, buffer = trained.template(facts.config, facts.image_shape, facts.num_classes)
    wanted = trained.tree(checkpoint.template_of(state), buffer)
    assert checkpoint.steps(run / "checkpoints")[-1] == step
    ours, theirs = (
        tiny.leaves(checkpoint.restore(path / "checkpoints", wanted, step).tree) for path in (run, undisturbed)
    )
    assert ours["buffer"].shape == (128, 1, 8, 8, 1)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-2, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_devices(undisturbed, tmp_path):
    run = shutil.copytree(finished_run(), tmp_path / "run")
    arguments = (*EPOCHS, "--config.training.epochs=2", f"--workdir={run}")
    status, output, errors = Command(*arguments, cwd=tmp_path, JAX_NUM_CPU_DEVICES="1").wait()
    assert (status, errors) == (0, "")
    assert "JEM: going on from iteration 18 of 36" in output
    assert "JEM: 1 CPU device" in output
    _assert_whole(run, 36, undisturbed)
    # From one device to the four of this process.
    assert main([*EPOCHS, "--config.training.epochs=3", f"--workdir={run}"]) == 0
    _assert_whole(run, 54, undisturbed)


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
def test_two_processes_recover_together_and_the_report_says_so(tmp_path):
    run = tmp_path / "run"
    wild = ("--config.optimizer.learning_rate=90", "--config.recovery.learning_rate_factor=0.0005",
            "--config.recovery.patience=3", "--config.evaluation.sections=training")  # fmt: skip
    first, second = [process.wait() for process in _pair(tmp_path, *TINY, *wild, f"--workdir={run}")]
    assert (first[0], second[0]) == (0, 0)
    history = recovery.read(run)
    assert len(history) >= 1
    assert f"Recovery 1 of the JEM: it {recovery.in_words(history[0])}." in (run / "report" / "report.html").read_text()
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 19))
    assert all(np.isfinite(line["loss"]) for line in metrics(run) if "loss" in line)


@pytest.mark.slow
def test_where_one_is_killed_the_other_ends_with_an_error_and_both_go_on(tmp_path):
    run = tmp_path / "runs" / "digits"
    saved = 0
    for number in (0, 1):
        # The same command of both goes on.
        pair = _pair(tmp_path, *TINY, "--config.training.epochs=10000", before=SOON)
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
