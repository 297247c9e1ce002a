"""Interrupted anywhere, a run goes on as if nothing had happened."""

import shutil
import signal
import time

import pytest
import tiny
from command import SHORTEST, TINY, Command, finished_run, metrics, restored, steps_logged

from jem_jax.commands import modes
from jem_jax.main import main
from jem_jax.runs import checkpoint
from jem_jax.training import loop

# A window of the log is seven iterations, so that interruptions fall into one.
SOME = (
    *SHORTEST, "--config.training.epochs=3", "--config.training.checkpoint_every=1", "--config.training.log_every=7",
)  # fmt: skip
LONG = (*SOME, "--config.training.epochs=8")

HANGS = """
import time
from jem_jax.runs import checkpoint
write = checkpoint._write_manifest
def hang_at_the_second(path, is_regular):
    if path.parent.name == "checkpoints" and path.name != "18":
        time.sleep(600)
    write(path, is_regular)
checkpoint._write_manifest = hang_at_the_second
"""


@pytest.mark.slow
def test_stopped_killed_and_gone_on_with_it_is_the_same_run_bit_for_bit(tmp_path, capsys):
    run = tmp_path / "runs" / "digits"
    command = Command(*LONG, cwd=tmp_path)
    command.wait_for(lambda: steps_logged(run) >= 3)
    command.send(signal.SIGINT)
    status, output, errors = command.wait()
    assert status == 130
    assert "stopping after this iteration; once more leaves at once" in errors
    stopped = checkpoint.steps(run / "checkpoints")[-1]
    assert f"stopped at iteration {stopped} of 144; saved in runs/digits. The same command goes on" in output
    assert checkpoint.damage(run / "checkpoints" / str(stopped)) is None
    # Killed in the middle of the write of a checkpoint.
    command = Command(*LONG, cwd=tmp_path, before=HANGS)
    command.wait_for((run / "checkpoints" / "36").exists)
    command.send(signal.SIGKILL)
    assert command.wait()[0] == -9
    assert checkpoint.unfinished(run / "checkpoints") == [run / "checkpoints" / "36"]
    assert not (run / "report").exists()
    whole = checkpoint.steps(run / "checkpoints")[-1]
    undisturbed = tmp_path / "undisturbed"
    for workdir in (undisturbed, run):
        assert main([*LONG, f"--workdir={workdir}"]) == 0
    assert tiny.differing(restored(run).tree, restored(undisturbed).tree) == []
    assert metrics(run) == metrics(undisturbed)
    said = capsys.readouterr()
    assert said.err == ""
    assert f"JEM: going on from iteration {whole} of 144" in said.out


def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_is_whole(tmp_path, capsys):
    run = tmp_path / "runs" / "digits"
    command = Command(*SOME, cwd=tmp_path, before=HANGS)
    command.wait_for((run / "checkpoints" / "36").exists)
    command.send(signal.SIGINT)
    time.sleep(1)
    assert command.process.poll() is None
    command.send(signal.SIGINT)
    assert command.wait(5)[0] == 130
    # The checkpoint that was being written is not one, and the one before is whole.
    assert checkpoint.steps(run / "checkpoints") == [18]
    assert checkpoint.damage(run / "checkpoints" / "18") is None
    assert main([*SOME, f"--workdir={run}"]) == 0
    output = capsys.readouterr().out
    assert "36 is not used: it was never finished; moved to" in output
    assert "JEM: going on from iteration 18 of 54" in output
    assert (run / "set_aside" / "checkpoints-36").is_dir()


def test_before_there_is_anything_to_save_ctrl_c_ends_it_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modes, "_check_shared", lambda _: signal.raise_signal(signal.SIGINT))
    assert main([*SOME, f"--workdir={tmp_path / 'run'}"]) == 130
    assert (tmp_path / "run" / "run.json").exists()
    assert capsys.readouterr() == ("", "jem-jax: stopped; the same command goes on\n")


def test_a_signal_after_the_last_iteration_leaves_the_report_to_the_next_command(tmp_path, monkeypatch, capsys):
    run, train = shutil.copytree(finished_run(), tmp_path / "run"), loop.train
    shutil.rmtree(run / "report")

    def train_and_be_stopped(*arguments):
        trained = train(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return trained

    monkeypatch.setattr(loop, "train", train_and_be_stopped)
    assert main([*TINY, f"--workdir={run}"]) == 143
    assert "stopped at iteration 18 of 18; saved in" in capsys.readouterr().out
    assert not (run / "report").exists()
