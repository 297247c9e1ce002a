"""Files that a run did not write are ignored and never deleted; a lock holds on every file system."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from command import SHORTEST, TINY, finished_run, restored

from jem_jax.common import files
from jem_jax.main import main
from jem_jax.runs import checkpoint, workdir
from jem_jax.runs.checkpoint import Checkpoints
from jem_jax.training import loop

FOREIGN = (
    ".DS_Store", "lost+found/", "log.txt", "notes.txt", "report/notes.txt", "report/mine.png", "samples/.DS_Store",
    "tensorboard/other/events.out.tfevents.1.vm", "checkpoints/.DS_Store", "checkpoints/lost+found/",
    "checkpoints/2024/thesis.tex", "set_aside/1/thesis.tex", "baseline/notes.txt", "export/",
)  # fmt: skip
"""in a workdir, a folder with a slash"""
INSIDE = (".DS_Store", "Thumbs.db", "tree/.nfs0001", "note/mine.txt")
"""in a checkpoint"""


def put(folder, names):
    """Makes files of a user's."""
    for name in names:
        file = folder / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_text("mine")


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished_run(), tmp_path / "run")


def test_they_are_no_damage_and_outlive_overwriting(run, capsys):
    put(run, FOREIGN)
    put(run / "checkpoints" / "18", INSIDE)
    assert main([*TINY, f"--workdir={run}", "--mode=evaluate"]) == 0
    assert "as before" in capsys.readouterr().out
    assert main([*SHORTEST, f"--workdir={run}", "--config.training.epochs=2"]) == 0
    output = capsys.readouterr().out
    assert "going on from iteration 18 of 36" in output
    # After more training all is measured anew.
    assert "as before" not in output
    # One of those kept is deleted now, with all that was written since.
    workdir._clear(run)
    left = {str(file.relative_to(run)) for file in run.rglob("*") if file.name != ".lock"}
    put(run / "wanted", (*FOREIGN, *(f"checkpoints/18.not_ours/{name}" for name in INSIDE)))
    wanted = {str(file.relative_to(run / "wanted")) for file in (run / "wanted").rglob("*")}
    assert left == wanted
    shutil.rmtree(run / "wanted")
    (run / "notes.txt").unlink()
    (run / "export").rmdir()
    for name in ("report", "checkpoints", "samples", "set_aside", "tensorboard", "baseline"):
        shutil.rmtree(run / name)
    # What is left now is in nobody's way.
    assert workdir._entries(run) == []


def test_a_clean_run_is_deleted_whole_but_for_a_link_to_a_folder(run, tmp_path):
    shutil.move(run / "checkpoints", tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    assert checkpoint.newest_whole(run / "checkpoints") == (18, {})
    assert main([*TINY, f"--workdir={run}", "--mode=sample"]) == 0
    checkpoint.set_aside(run / "best" / "18", run / "set_aside")
    workdir._clear(run)
    assert sorted(os.listdir(run)) == [".lock", "checkpoints"]
    assert (run / "checkpoints").is_symlink()
    assert os.listdir(tmp_path / "scratch") == []


def test_a_folder_deleted_under_its_run_is_a_run_again(tmp_path, monkeypatch, capsys):
    iterate = loop._iterate

    def deleting(training):
        iterate(training)
        if training.step == 9:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(loop, "_iterate", deleting)
    assert main([*TINY, f"--workdir={tmp_path / 'run'}"]) == 0
    assert "was deleted during the run; what was saved since is there" in capsys.readouterr().out
    assert tiny.differing(restored(tmp_path / "run").tree, restored(finished_run()).tree) == []


def test_logs_and_litter_are_not_in_the_way_of_a_new_run_and_other_files_are(tmp_path):
    put(tmp_path / "logs", (
        "log.txt", "slurm-17.out", "train.log", "nohup.out", ".bashrc", "jem.o1234", "jem.e1234.7", "train_log.txt",
        "slurm-17_3.txt", "core.4711", "Icon\r", "#snapshot/", "logs/17.out",
    ))  # fmt: skip
    assert workdir._entries(tmp_path / "logs") == []
    others = ["catalog.csv", "core.py", "empty/", "logic.py", "logs/mine.tex", "thesis.tex"]
    put(tmp_path / "others", others)
    assert workdir._entries(tmp_path / "others") == [name.partition("/")[0] for name in others]


def test_own_output_is_not_in_the_way(tmp_path):
    own = os.dup(1)
    with (tmp_path / "anything").open("w") as file:
        os.dup2(file.fileno(), 1)
        try:
            assert workdir._entries(tmp_path) == []
        finally:
            os.dup2(own, 1)
            os.close(own)
    assert workdir._entries(tmp_path) != []


def test_a_foreign_file_is_not_in_a_manifest(tmp_path, monkeypatch):
    write = checkpoint._write_manifest

    def late(path, is_regular):
        put(path, ["tree/.nfs0001"])
        write(path, is_regular)
        (path / "tree" / ".nfs0001").unlink()

    monkeypatch.setattr(checkpoint, "_write_manifest", late)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, {"x": np.zeros(2)}, {})
    checkpoints.close()
    assert checkpoint.damage(tmp_path / "3") is None


HOLD = "import time; from pathlib import Path; from jem_jax.common import files\n{}\nwith files.held(Path('lock')):\n"
NO_FLOCK = "import errno, fcntl\ndef none(*_): raise OSError(errno.{}, 'no')\nfcntl.flock = none"


@pytest.mark.parametrize("error", ["", "ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_one_program_holds_a_lock_until_it_is_gone(tmp_path, monkeypatch, error):
    if error:
        # What a real lock left does not count where there are none.
        (tmp_path / "lock").touch()
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(getattr(errno, error), "no")))
    program = HOLD.format(NO_FLOCK.format(error) if error else "") + "  print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError), files.held(tmp_path / "lock"):
        pass
    waited = []

    def end():
        waited.append(True)
        other.kill()
        other.wait()

    started = time.monotonic()
    with files.held(tmp_path / "lock", end):
        assert waited
    assert time.monotonic() - started < 10
    assert os.listdir(tmp_path) == ["lock"]
