"""An official checkpoint becomes a workdir that evaluates, samples and trains further."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from command import SHORT

import jem_jax
from jem_jax import import_official, main, torch_import

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CHECKPOINT = REFERENCE / "official_checkpoint_wrn_10_1.pt"
ARRAYS = REFERENCE / "official_wrn_10_1.npz"

pytestmark = pytest.mark.torch


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Of a short run on colour images of ten classes, on as many devices as a buffer of 20 chains divides among."""
    pytest.importorskip("torch")
    monkeypatch.setattr("jem_jax.distributed.processes.start", lambda *_: None)
    random = np.random.default_rng(0)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "images.npz", images=random.integers(0, 256, (80, 32, 32, 3), np.uint8), labels=labels)
    batches = [f"--config.training.{name}=4" for name in ("batch_size", "labelled_batch_size")]
    return [*SHORT, *batches, "--config.objective.energy_l2=0", f"--config.data.name={tmp_path / 'images.npz'}"]


def command(*arguments):
    return import_official.command([str(argument) for argument in arguments])


def _assert_official(logits):
    """They are those of the official network."""
    official = np.load(ARRAYS)
    ours = np.asarray(logits(official["x"].transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(ours, official["logits"], atol=1e-5 * abs(official["logits"]).max())


def test_the_workdir_holds_the_official_network_and_buffer_and_the_printed_command_evaluates(flags, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert command(CHECKPOINT, *flags, f"--workdir={workdir}") == 0
    printed = capsys.readouterr().out.splitlines()[-1].split()
    logits, buffer, config = jem_jax.load(workdir)
    _assert_official(logits)
    _, official_buffer = torch_import.read_checkpoint(CHECKPOINT)
    np.testing.assert_array_equal(buffer[:, 0], official_buffer.transpose(0, 2, 3, 1))
    assert (config.model.depth, config.model.width, config.sampler.buffer_size) == (10, 1, 20)
    assert printed[:3] == ["python", "-m", "jem_jax.main"]
    further = [argument for argument in printed[3:] if not argument.startswith("--mode")]
    for arguments, iterations in ((printed[3:], 0), (further, 64 // 4)):
        assert main.main(arguments) == 0
        report = json.loads((workdir / "report" / "report.json").read_text())
        assert report["run"]["iterations"] == iterations


@pytest.mark.parametrize(("p_x", "slots"), [("1.0", 40), ("0.0", None)])
def test_weights_without_a_buffer_are_evaluated_and_trained_further(flags, tmp_path, capsys, p_x, slots):
    torch = pytest.importorskip("torch")
    bare, run = tmp_path / "bare.pt", tmp_path / "run"
    torch.save(torch.load(CHECKPOINT, weights_only=True)["model_state_dict"], bare)
    settings = [f"--config.objective.p_x={p_x}", "--config.sampler.buffer_size=40"]
    assert command(bare, *flags, f"--workdir={run}", *settings) == 0
    printed = capsys.readouterr().out
    assert ("holds no replay buffer; its chains begin afresh" in printed) == (slots is not None)
    logits, buffer, _ = jem_jax.load(run)
    _assert_official(logits)
    assert (buffer is None) == (slots is None)
    if buffer is not None:
        assert buffer.shape == (slots, 1, 32, 32, 3)
        assert -1 <= buffer.min() < -0.9 < 0.9 < buffer.max() <= 1
    arguments = shlex.split(printed.splitlines()[-1])[3:]
    assert main.main([*arguments, "--config.evaluation.sections=classification"]) == 0
    arguments.remove("--mode=evaluate")
    assert main.main([*arguments, "--config.evaluation.sections=classification"]) == 0


def test_other_images_and_classes_and_a_workdir_that_is_not_empty_are_refused(flags, tmp_path, capsys):
    mine = tmp_path / "mine" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    np.savez(tmp_path / "two.npz", images=np.zeros((80, 32, 32, 3), np.uint8), labels=np.arange(80) % 2)
    for flag, said in (
        ("--config.data.name=digits", "the checkpoint is of images (32, 32, 3)"),
        (f"--config.data.name={tmp_path / 'two.npz'}", "has 10 classes"),
        (f"--workdir={mine.parent}", "is not empty (mine.txt)"),
    ):
        assert command(CHECKPOINT, *flags, f"--workdir={tmp_path / 'run'}", flag) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert mine.read_text() == "mine"
