"""The tables on the pages are those of the raw results, and the paper's tables and figures those of finished runs."""

import json
import re
import statistics
import sys

import numpy as np
import pytest
import scripts
from PIL import Image

make_tables, paper = scripts.load("make_tables"), scripts.load("figures")


@pytest.fixture(scope="module", params=make_tables.PAGES, ids=lambda page: page.name)
def text(request):
    return request.param.read_text(encoding="utf-8")


def test_pages_are_up_to_date_with_whole_tables_and_no_open_mark(text):
    assert make_tables.fill(text) == text
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(make_tables.MARKED.findall(text))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block.splitlines()[0]


def test_every_table_is_on_one_page():
    names = [name for page in make_tables.PAGES for _, name, _ in make_tables.MARKED.findall(page.read_text("utf-8"))]
    assert sorted(names) == sorted(make_tables.TABLES)


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        make_tables.fill("<!-- table: nonsense -->\n<!-- end -->")


def test_numbers_are_means_over_seeds():
    runs = make_tables.read("digits_seeds")["runs"]
    accuracies = [100 * run["jem"]["accuracy"] for run in runs]
    expected = f"{statistics.mean(accuracies):.1f} ({min(accuracies):.1f} to {max(accuracies):.1f})"
    assert f"| JEM | {expected} |" in make_tables.digits_classification()


def test_the_better_model_is_bold():
    assert make_tables.bold_best([0.2, 0.7], ["a", "b"], max) == ["a", "**b**"]
    assert make_tables.bold_best([0.2, 0.7], ["a", "b"], min) == ["**a**", "b"]


def test_a_change_counts_only_where_all_seeds_agree(monkeypatch):
    def run(accuracy):
        columns = {"accuracy": accuracy, "ece": 0.1, "pgd_linf": 0.5, "training_seconds": 1.0, "recoveries": 0}
        auroc = {name: {"approximate_mass": 0.5, "log_density": 0.5} for name in ("midpoints_of_classes", "rotated",
                                                                                  "photographs")}  # fmt: skip
        return {**columns, "auroc": auroc, "buffer": {"frechet_distance": 1.0, "mean_confidence": 0.5}}

    runs = {"JEM/0": run(0.5), "JEM/1": run(0.6), "+ a/0": run(0.7), "+ a/1": run(0.8), "+ b/0": run(0.65),
            "+ b/1": run(0.75)}  # fmt: skip
    monkeypatch.setattr(make_tables, "read", lambda _: {"runs": runs})
    rows = make_tables.ablation_changes("any").splitlines()[2:]
    assert rows == ["| + a | accuracy |  |", "| + b |  |  |", "| all of them, beside JEM | accuracy |  |"]


@pytest.fixture
def run(tmp_path):
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


def test_tables_hold_both_models_numbers(run, tmp_path, monkeypatch, capsys):
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


def test_every_figure_is_drawn(run, tmp_path):
    reports = {"one": paper.read(run), "another": paper.read(run)}
    for what in ("calibration", "histograms", "robustness", "distal", "samples"):
        with Image.open(paper.WHAT[what](reports, tmp_path / what)) as image:
            assert min(image.size) > 200


def test_what_a_report_lacks_is_said(run, tmp_path, monkeypatch):
    (run / "report" / "distal_jem.png").unlink()
    for what, folder, said in (
        ("distal", run, "digits's report has no distal_jem"),
        ("ood", tmp_path / "none", "none holds no report; make it with --mode=evaluate"),
    ):
        monkeypatch.setattr(sys, "argv", ["figures.py", what, str(folder), "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match=said):
            paper.main()
