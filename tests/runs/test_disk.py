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


def _command(run):
    """Of a second epoch, in which the disk has a fault."""
    return (*SHORTEST, f"--workdir={run}", "--config.training.epochs=2", "--config.training.checkpoint_every=1")


def _fill(disk, left):
    """Takes all of a disk's space but so many bytes."""
    (disk / "ballast").unlink(missing_ok=True)
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))


def _refused(capsys, run):
    capsys.readouterr()
    assert main(_command(run)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line]
    (line,) = (line for line in lines if line.startswith("jem-jax: "))
    return line


def test_a_disk_that_is_full_or_fills_up_or_can_only_be_read(disk, capsys, monkeypatch):
    run = shutil.copytree(finished_run(), disk / "run")
    before = contents(run)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = f"jem-jax: workdir {run} cannot be written: Read-only file system; name another with --workdir"
    assert _refused(capsys, run) == line
    assert contents(run) == before
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)

    checkpoints = contents(run / "checkpoints")
    _fill(disk, 100_000)
    assert "no space left on" in _refused(capsys, run).lower()
    after = contents(run / "checkpoints")
    assert {name: after.get(name) for name in checkpoints} == checkpoints

    (disk / "ballast").unlink()
    log = loop._log

    def filling(training, recorder):
        log(training, recorder)
        if training.step == 20:
            _fill(disk, 0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_log", filling)
        assert "no space left on" in _refused(capsys, run).lower()
    assert checkpoint.newest_whole(run / "checkpoints")[0] == 18

    (disk / "ballast").unlink()
    assert main(_command(run)) == 0
    assert "going on from iteration 18 of 36" in capsys.readouterr().out
    assert metrics(run)[-1]["step"] == 36
