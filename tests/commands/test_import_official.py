"""An official checkpoint becomes a workdir that evaluates, samples and trains further."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import jem_jax
from jem_jax import import_official, main, torch_import

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CHECKPOINT = REFERENCE / "official_checkpoint_wrn_10_1.pt"
ARRAYS = REFERENCE / "official_wrn_10_1.npz"

pytestmark = pytest.mark.torch


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Settings for colour images of ten classes, on as many devices as its buffer of 20 chains divides among."""
    pytest.importorskip("torch")
    monkeypatch.setattr("jem_jax.distributed.processes.start", lambda *_: None)
    random = np.random.default_rng(0)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "images.npz", images=random.integers(0, 256, (80, 32, 32, 3), np.uint8), labels=labels)
    file = tmp_path / "official.py"
    file.write_text(
        "from jem_jax.config import default\n"
        "def get_config():\n"
        "    config = default()\n"
        f"    config.data.name = {str(tmp_path / 'images.npz')!r}\n"
        "    config.training.batch_size = 4\n"
        "    config.training.epochs = 1\n"
        "    config.training.baseline = False\n"
        "    config.sampler.num_steps = 1\n"
        "    config.evaluation.sample_steps = 1\n"
        "    config.evaluation.num_samples = 10\n"
        "    config.evaluation.sections = 'classification,samples'\n"
        "    return config\n"
    )
    return file


def command(*arguments):
    return import_official.command([str(argument) for argument in arguments])


def _assert_official(logits):
    """They are those of the official network."""
    official = np.load(ARRAYS)
    ours = np.asarray(logits(official["x"].transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(ours, official["logits"], atol=1e-5 * abs(official["logits"]).max())


def test_the_workdir_holds_the_official_network_and_buffer_and_the_printed_command_evaluates(
    config_file, tmp_path, capsys
):
    workdir = tmp_path / "run"
    assert command(CHECKPOINT, f"--config={config_file}", f"--workdir={workdir}") == 0
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
def test_weights_without_a_buffer_are_evaluated_and_trained_further(config_file, tmp_path, capsys, p_x, slots):
    torch = pytest.importorskip("torch")
    bare, run = tmp_path / "bare.pt", tmp_path / "run"
    torch.save(torch.load(CHECKPOINT, weights_only=True)["model_state_dict"], bare)
    settings = [f"--config.objective.p_x={p_x}", "--config.sampler.buffer_size=40"]
    assert command(bare, f"--config={config_file}", f"--workdir={run}", *settings) == 0
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


def test_other_classes_and_other_images_are_refused(config_file, tmp_path, capsys):
    workdir = tmp_path / "run"
    digits = [CHECKPOINT, "--config=digits", f"--workdir={workdir}", "--config.training.batch_size=4"]
    assert command(*digits) == 2
    assert "the checkpoint is of images (32, 32, 3)" in capsys.readouterr().err
    np.savez(tmp_path / "two.npz", images=np.zeros((80, 32, 32, 3), np.uint8), labels=np.arange(80) % 2)
    two = f"--config.data.name={tmp_path / 'two.npz'}"
    assert command(CHECKPOINT, f"--config={config_file}", f"--workdir={workdir}", two) == 2
    assert "has 10 classes" in capsys.readouterr().err
    assert not workdir.exists()


def test_a_workdir_that_is_not_empty_is_left_alone(config_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert command(CHECKPOINT, f"--config={config_file}", f"--workdir={tmp_path / 'run'}") == 2
    assert "is not empty (mine.txt)" in capsys.readouterr().err
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"
