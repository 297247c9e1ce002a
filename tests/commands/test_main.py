"""The command: what it prints, what it leaves, and what it does when it is given again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import SHORTEST, TINY, contents, finished_run, metrics
from PIL import Image

from jem_jax import config as configuration
from jem_jax.common.errors import UserError
from jem_jax.main import main


def test_the_help_lists_every_flag_and_setting(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for described in configuration.describe():
        assert described in text
    modes = "--mode {train,evaluate,sample,export_model}"
    for flag in ("--config FILE", modes, "--workdir DIR", "--report_dir DIR", "--overwrite", "--distributed"):
        assert flag in text
    assert "runs/<config name>" in text
    assert "digits" in text.split("a config file, or one of:")[1].split("--mode")[0]
    options = text.split("settings, with their defaults:")[0]
    assert max(map(len, options.splitlines())) <= 80


def _report(run: Path) -> dict:
    return json.loads((run / "report" / "report.json").read_text())


def test_a_classifier_of_the_same_shape_is_trained_and_evaluated_beside_it(run, capsys):
    assert main([*SHORTEST, f"--workdir={run}", "--config.training.baseline=true"]) == 0
    report = _report(run)
    assert {"jem", "baseline", "run", "sections"} <= report.keys()
    for model in (report["jem"], report["baseline"]):
        assert 0 <= model["accuracy"] <= 1
        assert model["nll"] > 0
        assert (model["images"], model["split"], model["iteration"]) == (500, "test", 18)
    assert report["run"]["seconds"].keys() == {"training", "baseline", "evaluation"}
    for part in (run, run / "baseline"):
        assert metrics(part)[-1]["step"] == 18
        written = b"".join(path.read_bytes() for path in (part / "tensorboard").iterdir())
        assert all(tag in written for tag in (b"cross_entropy", b"validation_nll"))
        assert (b"log_px_samples" in written) == (part == run)
        assert (part / "checkpoints" / "18" / "manifest.json").exists()
        assert (part / "best" / "18" / "manifest.json").exists()
    assert "log_px_samples" not in metrics(run / "baseline")[0]
    accuracies = [f"{100 * report[model]['accuracy']:.2f} %" for model in ("jem", "baseline")]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy ")]
    assert all(accuracy in lines[-1] for accuracy in accuracies)


def test_the_same_command_again_finds_the_configs_run_finished_and_shows_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_idea.py").write_text("from jem_jax.configs.digits import get_config\n")
    run = shutil.copytree(finished_run(), Path("runs/my_idea"))
    kept = contents(run)
    assert main([*TINY, "--config=my_idea.py"]) == 0
    output = capsys.readouterr().out
    assert f"{run} holds a finished run of 18 iterations; its report:" in output
    assert f"{100 * _report(run)['jem']['accuracy']:.2f} %" in output
    assert f"{run}/report/samples.png" in output
    assert contents(run) == kept
    assert [path.name for path in Path("runs").iterdir()] == ["my_idea"]


def test_a_finished_run_is_evaluated_again_where_its_report_is_damaged_or_has_other_settings(run, capsys):
    kept = _report(run)["jem"]
    (run / "report" / "report.json").write_text("{")
    assert main([*TINY, f"--workdir={run}"]) == 0
    assert _report(run)["jem"] == kept
    more = "--config.evaluation.sections=classification,samples,calibration"
    assert main([*TINY, more, f"--workdir={run}", "--config.evaluation.ece_bins=5"]) == 0
    output = capsys.readouterr().out
    assert "finished run" not in output
    assert [line.split(":")[1].strip() for line in output.splitlines() if "/3] " in line].count("as before") == 2
    assert _report(run)["jem"]["ece_bins"] == 5


def test_evaluate_and_sample_write_their_results_and_nothing_else(run, capsys):
    old = _report(run)
    shutil.rmtree(run / "report")
    before = contents(run)
    assert main([*TINY, f"--workdir={run}", "--mode=evaluate"]) == 0
    new = _report(run)
    assert new["jem"] == old["jem"]
    assert new["sections"].keys() == old["sections"].keys()
    assert main([*TINY, f"--workdir={run}", "--mode=sample", "--config.evaluation.num_samples=20"]) == 0
    output = capsys.readouterr().out
    assert "report/samples.png" in output
    assert "drawing 20 samples in 5 steps" in output
    assert before.items() <= contents(run).items()
    for name in ("samples", "samples_by_class", "buffer_by_class"):
        pixels = np.asarray(Image.open(run / "samples" / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 8
        assert len(np.unique(pixels)) > 8


def test_debug_shows_the_traceback():
    with pytest.raises(UserError):
        main(["--debug", "--config=nope.py"])
