"""A run knows its data by their content: other content is noticed, another place or spelling is none of its concern."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from command import SHORTEST, digits_npz, finished_run

from jem_jax.datasets import Split, ood_sets
from jem_jax.main import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the digits in d.npz and a finished run on that; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    digits_npz(folder / "d.npz")
    file = shutil.copytree(finished_run(), folder / "run") / "run.json"
    facts = json.loads(file.read_text())
    facts["config"]["data"]["name"] = str(folder / "d.npz")
    # The training images have another order there. The run notes the data that it finds.
    del facts["data"]
    file.write_text(json.dumps(facts))
    assert main([*SHORTEST, f"--config.data.name={folder / 'd.npz'}", f"--workdir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of it, which is the working folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(name, *more):
    """The exit status of the run's command on that data."""
    return main([*SHORTEST, f"--config.data.name={name}", "--workdir=run", *more])


def nll():
    """What the report says."""
    return json.loads(Path("run/report/report.json").read_text())["jem"]["nll"]


def test_fingerprint_tells_contents_apart():
    data = tiny.dataset()
    assert dataclasses.replace(data, name="elsewhere").fingerprint == data.fingerprint
    for change in (
        {"class_names": ("a", "c", "b")},
        {"train": Split(data.train.images[::-1], data.train.labels[::-1])},
        {"test": Split(data.test.images, (data.test.labels + 1) % 3)},
        {"validation": data.test, "test": data.validation},
        {"test": data.test.rows(np.arange(11))},
    ):
        assert dataclasses.replace(data, **change).fingerprint != data.fingerprint


def test_same_content_elsewhere_is_the_same_data_also_of_a_run_that_did_not_note_it(folder, finished, capsys):
    file = folder / "run" / "run.json"
    facts = json.loads(file.read_text())
    data = facts.pop("data")
    file.write_text(json.dumps(facts))
    (folder / "moved").mkdir()
    (folder / "link.npz").symlink_to(folder / "d.npz")
    shutil.copy(folder / "d.npz", folder / "moved")
    noted = str(finished / "d.npz")
    for place in (noted, "d.npz", "moved/../moved/d.npz", "link.npz"):
        assert command(place, "--mode=evaluate") == 0
        output, errors = capsys.readouterr()
        assert "classification: as before" in output
        assert ("run.json does not say which data it is of; noted" in errors) == (place == noted)
        assert json.loads(file.read_text())["data"] == data
        assert command(place) == 0
        assert json.loads(file.read_text())["config"]["data"]["name"] == place


def test_changed_content_is_refused_or_measured_again_unless_it_has_other_classes(folder, capsys):
    before = nll()
    data = str(folder / "d.npz")
    # The run knows the data by another spelling than this one.
    assert command("d.npz") == 0
    digits_npz(folder / "d.npz", 1, "abcdefghij")
    capsys.readouterr()
    assert command(data, "--config.training.epochs=2") == 2
    assert "holds a run of other data: " in capsys.readouterr().err
    assert command(data, "--mode=evaluate") == 0
    output, errors = capsys.readouterr()
    assert "as before" not in output
    assert "holds a run of other data" in errors
    assert nll() != before
    assert "trained on other data" in (folder / "run" / "report" / "report.html").read_text()
    digits_npz(folder / "d.npz")
    assert command(data) == 0
    assert nll() == before
    np.savez("d.npz", images=np.zeros((30, 8, 8), np.uint8), labels=np.arange(30) % 3)
    assert command("d.npz", "--mode=evaluate") == 2
    assert "are 0, 1, 2; those of the run 0, 1, 2, 3" in capsys.readouterr().err


def test_outside_set_that_changed_is_measured_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(ood_sets, "builtin", lambda *_: {})
    digits_npz(folder / "outside.npz")
    flags = ("--config.evaluation.sections=ood", "--config.evaluation.ood_images=20",
             "--config.evaluation.ood_sets=outside.npz")  # fmt: skip
    outside = lambda: json.loads(Path("run/report/report.json").read_text())["jem"]["ood"]["outside.npz"]  # noqa: E731
    assert command("d.npz", *flags) == 0
    before = outside()
    capsys.readouterr()
    assert command("d.npz", *flags, "--mode=evaluate") == 0
    assert "ood: as before" in capsys.readouterr().out
    assert command("d.npz", *flags) == 0
    assert "holds a finished run" in capsys.readouterr().out
    # Of the same size and time.
    digits_npz(folder / "outside.npz", shift=3)
    assert command("d.npz", *flags) == 0
    output = capsys.readouterr().out
    assert "holds a finished run" not in output
    assert "as before" not in output
    assert outside() != before
