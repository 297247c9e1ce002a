"""A disk that is full or read-only: one line, what was there is kept, and the run goes on once there is space."""

import shutil
import subprocess

import pytest
from command import SHORTEST, contents, finished_run, metrics

from jem_jax.main import main
from jem_jax.runs import checkpoint
from jem_jax.training import loop


@pytest.fixture
def disk(tmp_path):
    """A folder that is a small disk of its own; skipped where this user cannot mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a disk takes more rights than this user has")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(disk, left):
    """Takes all of a disk's space but so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


def _refused(capsys, *arguments):
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("jem-jax: ")]) == 1
    assert not [line for line in lines if "Traceback" in line]
    return next(line for line in lines if line.startswith("jem-jax: "))


@pytest.mark.parametrize("left", [0, 100_000])
def test_a_full_disk(disk, capsys, left):
    run = shutil.copytree(finished_run(), disk / "run")
    arguments = (*SHORTEST, f"--workdir={run}", "--config.training.epochs=3", "--config.training.checkpoint_every=1")
    before = contents(run / "checkpoints")
    ballast = _fill(disk, left)
    assert "no space left on" in _refused(capsys, *arguments).lower()
    assert checkpoint.damage(run / "checkpoints" / "18") is None
    after = contents(run / "checkpoints")
    assert {name: after.get(name) for name in before} == before

    ballast.unlink()
    assert main(arguments) == 0
    assert metrics(run)[-1]["step"] == 54


@pytest.mark.parametrize("step", [20, 36])
def test_a_disk_that_fills_up_while_a_run_goes_on(disk, capsys, monkeypatch, step):
    run = shutil.copytree(finished_run(), disk / "run")
    arguments = (*SHORTEST, f"--workdir={run}", "--config.training.epochs=3", "--config.training.checkpoint_every=1")
    log = loop._log

    def filling(training, recorder):
        log(training, recorder)
        if training.step == step:
            _fill(disk, 0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_log", filling)
        assert "no space left on" in _refused(capsys, *arguments).lower()
    assert checkpoint.newest_whole(run / "checkpoints")[0] == 18

    (disk / "ballast").unlink()
    assert main(arguments) == 0
    assert "going on from iteration 18 of 54" in capsys.readouterr().out
    assert metrics(run)[-1]["step"] == 54


def test_a_disk_that_becomes_read_only(disk, capsys):
    run = shutil.copytree(finished_run(), disk / "run")
    arguments = (*SHORTEST, f"--workdir={run}", "--config.training.epochs=2")
    before = contents(run)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = _refused(capsys, *arguments)
    assert line == f"jem-jax: workdir {run} cannot be written: Read-only file system; name another with --workdir"
    assert contents(run) == before

    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert main(arguments) == 0
    assert metrics(run)[-1]["step"] == 36
