"""The paper's tables and figures from finished runs."""

import json
import sys

import numpy as np
import pytest
import scripts
from PIL import Image


@pytest.fixture(scope="module")
def paper():
    return scripts.load("figures")


@pytest.fixture
def run(tmp_path, paper):
    """A workdir with a report, of which the JEM's numbers differ from the classifier's."""
    folder = tmp_path / "digits" / "report"
    folder.mkdir(parents=True)
    values = {"run": {"iterations": 1, "evaluation": {}, "seconds": {}}, "sections": {}}
    for model, accuracy in (("jem", 0.9), ("baseline", 0.95)):
        auroc = {score: {"auroc": accuracy - 0.1} for score in paper.ood.SCORES}
        values[model] = {
            "accuracy": accuracy,
            "ood": {"a_set": auroc},
            "pgd": {"linf": {"0.0": accuracy, "0.1": 0.5}, "l2": {"0.0": accuracy, "0.5": 0.4}},
        }
    quality = {"inception_style_score": 8.5, "frechet_distance": 1.25}
    values["jem"]["sample_quality"] = {"replay buffer": quality}
    (folder / "report.json").write_text(json.dumps(values))
    (folder / "report.html").write_text("")
    names = ("reliability", "ood_histograms", "distal_jem", "distal_baseline", "buffer_by_class", "samples_by_class")
    for name in names:
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(folder / f"{name}.png")
    return folder.parent


def test_tables_hold_both_models_numbers(run, paper, tmp_path, monkeypatch, capsys):
    for what in ("hybrid", "ood"):
        monkeypatch.setattr(sys, "argv", ["figures.py", what, str(run), "--out", str(tmp_path / "out")])
        paper.main()
        assert (tmp_path / "out" / f"{what}.md").read_text() in capsys.readouterr().out
    hybrid = (tmp_path / "out" / "hybrid.md").read_text()
    assert "| digits | JEM | 90.00 % | 8.50 | 1.25 |" in hybrid
    assert "| digits | classifier | 95.00 % |  |  |" in hybrid
    detection = (tmp_path / "out" / "ood.md").read_text()
    assert "| digits | a set | JEM | 0.800 |" in detection
    assert "| digits | a set | classifier | 0.850 |" in detection


def test_every_figure_is_drawn(run, paper, tmp_path):
    reports = {"one": paper.read(run), "another": paper.read(run)}
    for what in ("calibration", "histograms", "robustness", "distal", "samples"):
        with Image.open(paper.WHAT[what](reports, tmp_path / what)) as image:
            assert min(image.size) > 200


def test_what_a_report_lacks_is_said(run, paper, tmp_path, monkeypatch):
    (run / "report" / "distal_jem.png").unlink()
    for what, folder, said in (
        ("distal", run, "digits's report has no distal_jem"),
        ("ood", tmp_path / "none", "none holds no report; make it with --mode=evaluate"),
    ):
        monkeypatch.setattr(sys, "argv", ["figures.py", what, str(folder), "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match=said):
            paper.main()
