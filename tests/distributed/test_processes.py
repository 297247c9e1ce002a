"""Several processes on one machine: the same run, stopped and gone on with together, and no process left waiting."""

import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from command import HELPERS, SHORTEST, TINY, Command, contents, finished_run, free_port, metrics, restored, steps_logged
from programs import side_by_side

from jem_jax import datasets
from jem_jax.commands import config_files
from jem_jax.commands.command_line import overrides
from jem_jax.distributed.interrupts import Interrupted
from jem_jax.main import main
from jem_jax.runs import checkpoint, workdir
from jem_jax.training import loop, recovery, trained

LONG = (*SHORTEST, "--config.training.epochs=4")
STEPS = 72
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


def _stopped_at(step, run):
    """The checkpoint of the same run in this process, on its four devices, at an iteration."""
    config = config_files.read("digits", overrides(None, LONG[1:]))
    with pytest.raises(Interrupted):
        loop.train(config, datasets.load(config.data), run, "one process", tiny.Stop(step))
    shutil.copy(finished_run() / "run.json", run)
    return restored(run).tree


@pytest.mark.slow
def test_two_processes_train_as_one_stop_together_and_one_goes_on(tmp_path, capsys):
    run = tmp_path / "runs" / "digits"
    # Streamed batches are the harder way to the same numbers; the one process has its images on the devices.
    processes = _pair(tmp_path, *LONG, "--config.data.place=host")
    processes[0].wait_for(lambda: steps_logged(run) >= 12)
    processes[1].send(signal.SIGTERM)
    ended = [process.wait() for process in processes]
    assert [status for status, _, _ in ended] == [143, 143]
    stopped = [re.search(rf"stopped at iteration (\d+) of {STEPS}; saved", output) for _, output, _ in ended]
    step = int(stopped[0].group(1))
    assert int(stopped[1].group(1)) == step

    # The same numbers as one process of four devices.
    logged = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, step + 1))
    for ours, theirs in zip(logged[:10], metrics(finished_run()), strict=False):
        names = theirs.keys() - {"step", "epoch"}
        tolerance = 1e-5 if theirs["step"] == 1 else 1e-3
        np.testing.assert_allclose([ours[name] for name in names], [theirs[name] for name in names], rtol=tolerance)

    # All that both had is in the checkpoint, the buffer whole.
    assert checkpoint.damage(run / "checkpoints" / str(step)) is None
    ours, theirs = tiny.leaves(restored(run).tree), tiny.leaves(_stopped_at(step, tmp_path / "alone"))
    assert ours["buffer"].shape == (128, 1, 8, 8, 1)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-2, atol=1e-3, err_msg=name)

    capsys.readouterr()
    assert main([*LONG, f"--workdir={run}"]) == 0
    assert f"JEM: going on from iteration {step} of {STEPS}" in capsys.readouterr().out
    assert metrics(run)[-1]["step"] == STEPS


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
def test_a_run_of_one_process_goes_on_with_two_and_the_first_alone_reports(undisturbed, tmp_path):
    run = shutil.copytree(finished_run(), tmp_path / "run")
    shutil.rmtree(run / "report")
    arguments = (*EPOCHS, "--config.training.epochs=2", f"--workdir={run}")
    first, second = [process.wait() for process in _pair(tmp_path, *arguments)]
    assert (first[0], second[0]) == (0, 0)
    assert "JEM: going on from iteration 18 of 36" in first[1]
    assert "JEM: 4 CPU devices in 2 processes" in first[1]
    _assert_whole(run, 36, undisturbed)
    assert f"{run}/report/report.json" in first[1]
    assert _said(second[1]) == []
    assert (run / "report" / "report.html").exists()


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
def test_where_one_is_killed_the_other_ends_with_an_error_and_both_go_on(tmp_path, capsys):
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
    # With fewer epochs it reaches an end.
    epochs = saved // 18 + 1
    assert main([*SHORTEST, f"--config.training.epochs={epochs}", f"--workdir={run}"]) == 0
    assert f"JEM: going on from iteration {saved} of {18 * epochs}" in capsys.readouterr().out
    assert metrics(run)[-1]["step"] == 18 * epochs


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
